"""A cleaned dataset holds what the stages leave, to the byte, whoever cleaned and however often."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.claim import WORK
from data.clean import Cleaner
from data.config import CleanConfig, DataUsageError, PrepareConfig
from data.prepare import Summary, prepare
from data.tokenizer import load_tokenizer
from tests.data.prepared import stored, tree
from tests.data.test_dedup import edited, jaccard, real_texts
from tests.data.texts import prose, write_lines

SETTINGS = {"vocab_size": 400, "val_fraction": 0.3, "part_bytes": 9_000, "shard_bytes": 30_000}


def run(
    path: Path,
    output: Path,
    *,
    workers: int = 1,
    decontaminate: tuple[Path, ...] = (),
    settings: dict[str, Any] | None = None,
    **clean: object,
) -> Summary:
    config = PrepareConfig.model_validate(SETTINGS | (settings or {}) | {"clean": clean})
    return prepare([str(path)], output, config, workers=workers, decontaminate=decontaminate)


def texts_of(dataset: Path, side: str) -> list[str]:
    tokenizer = load_tokenizer(dataset)
    return [tokenizer.decode(ids) for ids in stored(dataset, side)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Originals and their near copies in random order, as JSON lines and one text file."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    rng = random.Random(0)
    originals = real_texts(50)
    texts = [*originals, *(edited(rng.choice(originals), 0.01, rng) for _ in range(40))]
    rng.shuffle(texts)
    write_lines(folder / "lines.jsonl", texts)
    (folder / "text.txt").write_text(prose(30_000))
    (folder / "twin.txt").write_text(prose(30_000))
    return folder


@pytest.fixture(scope="module")
def near(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("near") / "dataset"
    run(corpus, output, dedup="near", mask_pii=True)
    return output


def test_no_near_duplicates_lie_on_both_sides_of_the_split(
    corpus: Path, near: Path, tmp_path: Path
) -> None:
    run(corpus / "lines.jsonl", tmp_path / "raw")
    run(corpus / "lines.jsonl", tmp_path / "clean", dedup="near")

    def straddling(dataset: Path) -> int:
        sides = [[t for t in texts_of(dataset, side) if len(t) > 200] for side in ("train", "val")]
        assert min(map(len, sides)) > 3
        return sum(jaccard(train, val) > 0.85 for train in sides[0] for val in sides[1])

    assert straddling(tmp_path / "raw") > 5, "the input would show it"
    assert straddling(tmp_path / "clean") == 0


def test_what_is_dropped_is_accounted_for(near: Path) -> None:
    preparation = json.loads((near / "manifest.json").read_text())["preparation"]
    stages = {count["stage"]: count for count in preparation["clean"]["stages"]}
    assert list(stages) == ["mask_pii", "dedup"]
    assert stages["dedup"]["documents_in"] == stages["mask_pii"]["documents_out"] == 92
    dropped = stages["dedup"]["dropped"]["near duplicate"]
    assert 35 < dropped == 92 - stages["dedup"]["documents_out"]
    counts = json.loads((near / "manifest.json").read_text())["counts"]
    assert counts["documents"] == stages["dedup"]["documents_out"]
    stored_bytes = counts["text_bytes_train"] + counts["text_bytes_val"]
    assert stored_bytes == stages["dedup"]["bytes_out"]
    assert preparation["clean"]["dedup"]["min_shared"] == 0.75
    assert preparation["config"]["clean"]["dedup"] == "near"
    assert not (near / WORK).exists()


def test_the_bytes_do_not_depend_on_the_workers(corpus: Path, near: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "dataset", workers=3, dedup="near", mask_pii=True)
    assert tree(tmp_path / "dataset") == tree(near)


def test_the_same_command_is_complete_and_another_is_refused(
    corpus: Path, near: Path, tmp_path: Path
) -> None:
    assert run(corpus, near, dedup="near", mask_pii=True).was_complete
    with pytest.raises(DataUsageError, match=r":\n  --dedup: was near, is exact\ngive"):
        run(corpus, near, dedup="exact", mask_pii=True)
    with pytest.raises(
        DataUsageError, match=r"--dedup: was near, is off\n  --mask-pii: was on, is off\n"
    ):
        run(corpus, near)
    evaluation = tmp_path / "test.txt"
    evaluation.write_text(prose(500))
    with pytest.raises(
        DataUsageError, match=r"--decontaminate test\.txt: was not given, is [0-9a-f]{8}\n"
    ):
        run(corpus, near, dedup="near", mask_pii=True, decontaminate=(evaluation,))


def test_nothing_is_recorded_of_stages_that_are_off(corpus: Path, tmp_path: Path) -> None:
    preparation = run(corpus, tmp_path / "dataset").manifest.preparation
    assert "clean" not in preparation and "clean" not in preparation["config"]
    assert not Cleaner(CleanConfig()).is_on


def test_every_document_that_stays_is_stored_as_it_was_cleaned(tmp_path: Path) -> None:
    """Text that changes is not read from the bytes of its file; a dropped file leaves no trace."""
    folder = tmp_path / "in"
    folder.mkdir()
    long = "\ufeff" + prose(9_000, seed=1) + "mail a@b.org\0 e\u0301nd. " + prose(9_000, seed=2)
    (folder / "long.txt").write_text(long)
    (folder / "same.txt").write_text(long + "\n")
    evaluation = tmp_path / "test.txt"
    evaluation.write_text(prose(300, seed=7))
    write_lines(folder / "z.jsonl", ["\0\0", "\u00e9t\u00e9", prose(900, seed=7), prose(99)])
    clean = {"normalize": True, "mask_pii": True, "dedup": "exact"}
    summary = run(folder, tmp_path / "out", decontaminate=(evaluation,), **clean)
    expected = long[1:].replace("\0", "").replace("e\u0301", "\u00e9").replace("a@b.org", "<EMAIL>")
    found = [text for side in ("train", "val") for text in texts_of(tmp_path / "out", side)]
    runs = sorted((expected.find(text), text) for text in found if text in expected)
    assert "".join(text for _, text in runs) == expected
    assert {text for text in found if text not in expected} == {"\u00e9t\u00e9", prose(99)}
    report = summary.manifest.preparation["clean"]
    stages = {count["stage"]: count for count in report["stages"]}
    assert stages["normalize"]["dropped"] == {"nothing left": 1}
    # The reader takes the mark from the start of a file before any stage sees it.
    assert stages["normalize"]["found"] == {"NUL": 3, "not NFC": 2}
    assert stages["decontaminate"]["dropped"] == {"overlaps test.txt": 1}
    assert stages["decontaminate"]["found"]["13-grams of test.txt"] > 10
    assert stages["mask_pii"]["found"] == {"email": 2}
    assert stages["dedup"]["dropped"] == {"exact duplicate": 1}
    assert report["evaluation"][0]["name"] == "test.txt"


def test_input_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["short", "{}"])
    with pytest.raises(DataUsageError) as refused:
        run(path, tmp_path / "out", filter=True)
    assert "drops all 2 documents (1 C4: curly bracket, 1 Gopher: under 50 words)" in str(
        refused.value
    )
    assert "leave out the option that drops them: --filter" in str(refused.value)


KILLED = """
import os, signal, sys
from pathlib import Path
from data import prepare
from data.config import PrepareConfig

left = int(sys.argv[4])
def replace(*args, real=os.replace):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
os.replace = replace
config = PrepareConfig.model_validate_json(sys.argv[3])
prepare.prepare([sys.argv[1]], Path(sys.argv[2]), config, workers=1)
"""


@pytest.mark.parametrize("moment", [2, 9, 40, 70])
def test_a_kill_while_cleaning_leaves_what_the_same_command_completes(
    corpus: Path, near: Path, tmp_path: Path, moment: int
) -> None:
    config = PrepareConfig.model_validate(SETTINGS | {"clean": {"dedup": "near", "mask_pii": True}})
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "dataset")]
    command += [config.model_dump_json(), str(moment)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    work = tmp_path / "dataset" / WORK
    assert work.is_dir() and not (tmp_path / "dataset" / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in work.glob("clean-*/*.signatures.npy")}
    assert moment < 9 or finished
    run(corpus, tmp_path / "dataset", dedup="near", mask_pii=True)
    assert tree(tmp_path / "dataset") == tree(near)


def test_work_of_another_command_is_not_continued(corpus: Path, near: Path, tmp_path: Path) -> None:
    output = tmp_path / "dataset"
    too_large = {"vocab_size": 100_000}
    with pytest.raises(DataUsageError, match="too large for this text"):
        run(corpus, output, dedup="exact", settings=too_large)
    assert (output / WORK).is_dir()
    run(corpus, output, dedup="near", mask_pii=True)
    assert tree(output) == tree(near)


def test_no_mark_of_byte_order_stays_at_the_start_whatever_stands_before_it() -> None:
    cleaner = Cleaner(CleanConfig(normalize=True))
    for text in ("\ufeffabc", "\0\ufeffabc", "\ufeff\ufeffabc", "\ufeff\0\ufeff\0abc"):
        assert cleaner.changed(text.encode()) == b"abc"
        assert cleaner.clean(text.encode(), {}) == "abc"
    assert cleaner.changed("a\ufeffb".encode()) == "a\ufeffb".encode(), "inside it is a character"
