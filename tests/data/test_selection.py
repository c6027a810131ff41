"""What of the input is read: patterns leave files out, binary ones stay out, all is counted."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pytest

from data.claim import WORK
from data.config import DataError, DataUsageError, PrepareConfig
from data.durable import read_sealed
from data.inputs import find_files
from data.jobs import Task
from data.prepare import STAGES, Summary, prepare, prepare_task
from data.readers import Document, cut_parts, read_extent
from data.selection import Selection
from launcher.lifecycle import Prepare
from launcher.show import show_preparation
from launcher.site import Site
from launcher.stages import resolve
from tests.data.prepared import tree
from tests.data.texts import prose, write_lines

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
SETTINGS = {"vocab_size": 330, "val_fraction": 0.2, "part_bytes": 2000}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A code tree: text, pictures, an archive, text that is not UTF-8."""
    files: dict[str, bytes] = {
        "main.py": prose(3000).encode(),
        "docs/index.html": prose(3000, seed=1).encode(),
        "docs/logo.png": PNG,
        "docs/old/latin.txt": b"caf\xe9 " + prose(500, seed=2).encode(),
        "lib/docs/a.html": prose(900, seed=3).encode(),
        "lib/lib.jar": b"PK\x03\x04 and more",
        "lib/lib.so": b"\x7fELF\x02\0\0",
        "lib/vendor/deep/x.js": prose(700, seed=4).encode(),
        "run": b"#!" + bytes(9),
    }
    folder = tmp_path / "code"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def left(inputs: list[str], *exclude: str) -> list[str]:
    """Names of the files that are read, below the tree."""
    files = find_files(inputs, selection=Selection(exclude))
    return [str(file.path).rpartition("/code/")[2] for file in files]


def run(code: Path, output: Path, *exclude: str, **settings: object) -> Summary:
    config = PrepareConfig.model_validate(SETTINGS | {"exclude": exclude} | settings)
    return prepare([str(code)], output, config, workers=1)


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("*.html", ["docs/index.html", "lib/docs/a.html"]),
        ("docs", ["docs/index.html", "docs/old/latin.txt", "lib/docs/a.html"]),
        ("docs/", ["docs/index.html", "docs/old/latin.txt", "lib/docs/a.html"]),
        ("docs/*.html", ["docs/index.html", "lib/docs/a.html"]),
        ("code/docs/*.html", ["docs/index.html"]),
        ("lib/*.js", []),
        ("lib/**/*.js", ["lib/vendor/deep/x.js"]),
        ("**/old", ["docs/old/latin.txt"]),
        ("vendor/deep", ["lib/vendor/deep/x.js"]),
        ("main.[ch]", []),
        ("code", []),
    ],
)
def test_a_pattern_is_for_files_and_folders_below_the_input(
    code: Path, pattern: str, gone: list[str]
) -> None:
    everything = left([str(code)])
    assert [name for name in everything if name not in left([str(code)], pattern)] == gone


def test_globs_lists_and_single_files_follow_the_patterns_too(code: Path, tmp_path: Path) -> None:
    assert left([f"{code}/*/*.html"], "lib") == ["docs/index.html"]
    assert left([f"{code}/*/*.html", str(code / "main.py")], "index*") == ["main.py"]
    (tmp_path / "list.txt").write_text("code/main.py\ncode/docs/index.html\n")
    assert left([f"@{tmp_path}/list.txt"], "*.html") == ["main.py"]


def test_binary_files_that_nobody_named_are_left_out_and_counted(code: Path) -> None:
    selection = Selection()
    files = find_files([str(code)], selection=selection)
    assert [file.name for file in files] == [
        "code/docs/index.html",
        "code/docs/old/latin.txt",
        "code/lib/docs/a.html",
        "code/lib/vendor/deep/x.js",
        "code/main.py",
    ]
    counts = {".jar": 1, ".png": 1, ".so": 1, "without suffix": 1}
    assert selection.to_json() == {"binary": counts}


def test_a_file_that_a_person_named_is_never_left_out_unasked(code: Path) -> None:
    with pytest.raises(DataUsageError, match=r"logo\.png: files ending in \.png cannot be read"):
        find_files([str(code / "docs" / "logo.png")])
    with pytest.raises(DataUsageError, match=r"lib\.jar is zip by its first bytes"):
        find_files([str(code / "lib" / "lib.jar")])
    (file,) = find_files([str(code / "run")])
    assert file.is_named, "it is text with NUL bytes, if somebody says so"


def test_nul_counts_where_git_looks_for_it_and_utf16_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "late.txt").write_bytes(b"x" * 8000 + b"\0")
    (folder / "early.txt").write_bytes(b"x" * 7999 + b"\0")
    (folder / "wide.txt").write_bytes("some words".encode("utf-16"))
    files = find_files([str(folder)])
    assert [file.path.name for file in files] == ["late.txt", "wide.txt"]
    part = cut_parts(files, 2**20)[0]
    with pytest.raises(DataError, match=r"wide\.txt: not UTF-8 .*iconv -f UTF-16"):
        [item for extent in part for item in read_extent(extent)]


def test_a_packed_binary_of_a_folder_yields_none_and_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.gz").write_bytes(gzip.compress(PNG))
    write_lines(folder / "b.jsonl", [prose(300, seed=seed) for seed in range(20)])
    summary = run(folder, tmp_path / "out")
    assert summary.manifest.preparation["dropped"] == {"binary file": 1}
    (file,) = find_files([str(folder / "a.gz")])
    (extent,) = cut_parts([file], 2**20)[0]
    with pytest.raises(DataError, match=r"a\.gz \(unpacked\): not UTF-8"):
        list(read_extent(extent))


def test_what_may_hold_text_is_refused_all_at_once_with_the_options(code: Path) -> None:
    for name in ("a.zip", "lib/b.zip", "docs/c d.PDF", "docs/packed"):
        (code / name).write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataUsageError) as refused:
        find_files([str(code)])
    message = str(refused.value)
    assert message.startswith(f"{code}/a.zip: files ending in .zip cannot be read; unpack or conv")
    assert "(3 more of the input cannot be read either)" in message
    options = "--exclude '*.zip' --exclude '*.PDF' --exclude packed"
    assert message.endswith(f"or leave what is no text out: {options}")
    assert len(left([str(code)], "*.zip", "*.PDF", "packed")) == 5


def test_what_is_excluded_is_not_even_looked_at(code: Path) -> None:
    (code / "gone.txt").symlink_to("nothing")
    (code / "twice.py").symlink_to("main.py")
    with pytest.raises(DataUsageError, match="link to nothing"):
        left([str(code)])
    with pytest.raises(DataUsageError, match=r"same file as .*or leave one out with --exclude"):
        left([str(code)], "gone.txt")
    assert "twice.py" not in left([str(code)], "gone.txt", "twice.py")


def test_no_file_left_is_refused_with_the_counts(code: Path) -> None:
    with pytest.raises(DataUsageError, match=r"left out are 9 by --exclude '\*'; give fewer"):
        left([str(code)], "*")
    with pytest.raises(DataUsageError, match=r"left out are 1 binary file \(1 \.png\); give"):
        find_files([f"{code}/*/logo*"])
    with pytest.raises(ValueError, match=r"--exclude '/' names no file; write a pattern of names"):
        PrepareConfig(exclude=("/",))


def test_text_that_is_no_utf8_names_the_file_and_both_ways_on(code: Path, tmp_path: Path) -> None:
    bad = code / "docs" / "old" / "latin.txt"
    with pytest.raises(DataError) as refused:
        run(code, tmp_path / "out")
    message = str(refused.value)
    assert message.startswith(f"{bad}: not UTF-8 at byte offset 3 (byte 0xe9")
    ways = f"leave it out with --exclude {bad}, or accept it with --on-bad-text replace or skip"
    assert message.endswith(ways)
    assert not (tmp_path / "out").exists()
    run(code, tmp_path / "out", str(bad))


def test_the_report_and_the_manifest_count_what_was_left_out(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(code, tmp_path / "out", "old", "*.htm")
    binary = {".jar": 1, ".png": 1, ".so": 1, "without suffix": 1}
    left_out = {"excluded": {"old": 1, "*.htm": 0}, "binary": binary}
    assert summary.manifest.preparation["left_out"] == left_out
    assert summary.manifest.preparation["config"]["exclude"] == ["old", "*.htm"]
    assert summary.manifest.counts["files"] == 4
    show_preparation(summary, as_json=False)
    printed = capsys.readouterr().out
    kinds = "1 .jar, 1 .png, 1 .so, 1 without suffix"
    assert f"left out of the input: 4 binary files ({kinds}), 1 by --exclude old\n" in printed
    assert "warning: --exclude '*.htm' names no file of the input; is it written as" in printed


def test_reruns_and_tasks_agree_on_the_patterns(code: Path, tmp_path: Path) -> None:
    summary = run(code, tmp_path / "out", "old")
    assert run(code, tmp_path / "out", "old").was_complete
    with pytest.raises(
        DataUsageError, match=r"begun by another command:\n  --exclude: was old, is old lib\n"
    ):
        run(code, tmp_path / "out", "old", "lib")
    config = PrepareConfig.model_validate(SETTINGS | {"exclude": ("old",)})

    def stage(name: str, settings: PrepareConfig) -> None:
        prepare_task(
            [str(code)], tmp_path / "tasks", settings, stage=name, task=Task(0, 1), workers=1
        )

    stage("plan", config)
    plan = read_sealed(tmp_path / "tasks" / WORK / "plan.json")
    assert plan["request"]["config"]["exclude"] == ["old"]
    other = PrepareConfig.model_validate(SETTINGS | {"exclude": ("docs",)})
    with pytest.raises(
        DataUsageError, match=r"planned by another command:\n  --exclude: was old, is docs\n"
    ):
        stage("read", other)
    # A binary file that comes later is in nobody's plan.
    (code / "late.png").write_bytes(PNG)
    for name in STAGES[1:]:
        stage(name, config)
    assert tree(tmp_path / "tasks") == tree(tmp_path / "out")
    assert summary.manifest.fingerprint


def test_a_life_cycle_keys_its_corpus_by_what_is_read(code: Path, tmp_path: Path) -> None:
    options = ("--exclude", "a=b", "--vocab-size=400", "--exclude=lib", "--exclude", "old")
    table = Prepare(inputs=(str(code),), output=str(tmp_path / "out"), options=options)
    (stage,) = resolve({"prepare": table}, Site())
    assert set(stage.origin.inputs) == {
        str(code / "main.py"),
        str(code / "docs" / "index.html"),
    }


def test_other_readers_of_a_folder_tell_what_they_left_out(
    code: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        find_files([str(code)])
    assert "left out of the input: 4 binary files (1 .jar," in caplog.text


def test_readers_give_the_documents_of_a_code_tree(code: Path) -> None:
    files = find_files([str(code)], selection=Selection(["latin.txt"]))
    found = [i for part in cut_parts(files, 2**20) for e in part for i in read_extent(e)]
    assert len(found) == 4 and all(isinstance(item, Document) for item in found)
