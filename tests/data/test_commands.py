"""pipe: runs what a person wrote, checks how it ended and what it wrote, and nothing else."""

from __future__ import annotations

import gzip
import json
import shlex
import sys
from pathlib import Path

import pytest

from data import shards
from data.config import AccessError, DataConfig, DataError, DataUsageError
from data.inputs import find_files
from data.manifest import read_manifest
from data.places import place_of
from data.readers import Document, cut_parts, read_extent
from data.sources import open_datasets
from data.tokens import TokenSource
from data.verify import verify
from launcher.cli import run_command
from tests.data.tiny import documents, write_dataset

TEXTS = documents(60)
STREAM = [int(token) for text in TEXTS for token in text]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.cache._FIRST_PAUSE", 0.001)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_TOKENS", 500)
        write_dataset(tmp_path / "dataset", {"train/text": TEXTS})
    return tmp_path / "dataset"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def source(location: str, config: DataConfig) -> TokenSource:
    place = place_of(location, config, commands=True)
    return TokenSource(place, read_manifest(place), "train", "text")


def program(body: str) -> str:
    """A command of this Python that knows the file's name as `path`."""
    text = f"import sys, os; path = sys.argv[1]; out = sys.stdout.buffer; {body}"
    return f"pipe:{sys.executable} -c {shlex.quote(text)} {{path}}"


def test_a_command_gives_whole_shards_once(folder: Path, config: DataConfig) -> None:
    location = f"pipe:cat {folder}/{{path}}"
    found = source(location, config)
    assert found.read(0, found.num_tokens).tolist() == STREAM
    assert list(found.documents(0, 500)) == list(
        TokenSource(folder, read_manifest(folder), "train", "text").documents(0, 500)
    )
    assert verify(place_of(location, config, commands=True), full=True).ok
    for path in folder.rglob("shard-*"):
        path.unlink()
    again = source(location, config)
    assert again.read(0, again.num_tokens).tolist() == STREAM


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "out.write(open(f'{folder}/{{path}}', 'rb').read()[:2000]); out.flush(); "
            "sys.exit('the disk of the producer died')",
            r"shard-000000\.tar ended with status 1, .*it said: the disk of the producer died",
        ),
        (
            "out.write(open(f'{folder}/{{path}}', 'rb').read()[:2000]); print('cut', "
            "file=sys.stderr)",
            r"shard-000000\.tar \(status 0; it said: cut\) wrote other bytes than the file that",
        ),
        (
            "out.write(open(f'{folder}/{{path}}', 'rb').read() + b'x')",
            r"shard-000000\.tar \(status 0; it said: nothing\) wrote other bytes",
        ),
        ("os.kill(os.getpid(), 9)", r"ended with status -9, so what it wrote is not used; it sai"),
    ],
)
def test_a_producer_that_dies_or_lies_is_named_and_nothing_is_kept(
    folder: Path, config: DataConfig, body: str, message: str
) -> None:
    body = body.replace("{folder}", str(folder)).replace("{{path}}", "{path}")
    good = f"out.write(open(f'{folder}/{{path}}', 'rb').read())"
    location = program(
        f"exec({good!r}) if not path.endswith('.tar') else [{body.replace('; ', ', ')}]"
    )
    found = source(location, config)
    damaged = dict[int, str]()
    import numpy as np

    with pytest.raises(AccessError, match=message):
        found.read_rows([0], np.zeros((1, 10), dtype=np.uint32), [0], damaged)
    assert not damaged
    assert not list(Path(config.cache_dir).rglob("*.tar*"))


def test_a_command_that_cannot_start_or_names_no_place_is_refused(config: DataConfig) -> None:
    with pytest.raises(
        AccessError, match=r"no-such-program xmanifest\.json cannot be started: No such file"
    ):
        read_manifest(place_of("pipe:no-such-program x{path}", config, commands=True))
    with pytest.raises(DataUsageError, match=r"write \{path\} there, such as 'pipe:ssh host"):
        place_of("pipe:cat x", config, commands=True)
    with pytest.raises(DataUsageError, match=r"cannot be split into words: No closing quotation"):
        place_of("pipe:cat '{path}", config, commands=True)


def test_a_plan_that_is_missing_is_told_as_one(folder: Path, config: DataConfig) -> None:
    location = f"pipe:cat {folder}/{{path}}"
    with pytest.raises(DataUsageError, match=r"has no plan .*status 1.*`headrace data pack .*24`"):
        settings = config.model_copy(update={"packing": "best_fit"})
        open_datasets(location, seq_len=24, config=settings, commands=True)


@pytest.mark.parametrize("verb", ["verify", "stats"])
def test_plans_that_cannot_be_listed_are_told(
    folder: Path, verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    run_command(["data", verb, f"pipe:cat {folder}/{{path}}"], standalone=False)
    assert "were not looked at: elsewhere they cannot be listed" in capsys.readouterr().err
    run_command(["data", verb, str(folder)], standalone=False)
    assert "looked at" not in capsys.readouterr().err


def test_only_a_person_names_commands(folder: Path, config: DataConfig, tmp_path: Path) -> None:
    """Not a run directory, not a list, and no name inside a manifest becomes one."""
    location = f"pipe:cat {folder}/{{path}}"
    with pytest.raises(DataUsageError, match="only when they are written on the command line or"):
        open_datasets(location, seq_len=8, config=config)
    assert open_datasets(location, seq_len=8, config=config, commands=True).vocab_size == 300
    (tmp_path / "list").write_text("pipe:.jsonl:touch harm\n")
    with pytest.raises(DataUsageError, match=r"list:1: pipe:.*is not a path, pattern or URL"):
        find_files([f"@{tmp_path / 'list'}"], tmp_path / "keep")
    write_dataset(tmp_path / "evil", {"train/$(touch harm)": TEXTS})
    place = place_of(f"pipe:cat {tmp_path}/evil/{{path}}", config, commands=True)
    found = TokenSource(place, read_manifest(place), "train", "$(touch harm)")
    with pytest.raises(DataUsageError, match=r"a file called 'train/\$\(touch harm\)/.*no command"):
        found.read(0, 10)


def texts(inputs: list[str], keep: Path) -> list[str]:
    parts = cut_parts(find_files(inputs, keep), 2**20)
    items = [item for part in parts for extent in part for item in read_extent(extent)]
    return [item.text.decode() for item in items if isinstance(item, Document)]


def test_a_command_is_an_input_of_the_kind_that_is_named(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    (tmp_path / "a b.gz").write_bytes(gzip.compress(lines.encode()))
    assert texts([f"pipe:.jsonl:zcat {tmp_path}/'a b.gz'"], tmp_path / "k") == ["one", "two"]
    assert texts([f"pipe:.jsonl.gz:cat {tmp_path}/'a b.gz'"], tmp_path / "k") == ["one", "two"]
    assert texts(["pipe:.txt:echo '$HOME; *'"], tmp_path / "k") == ["$HOME; *\n"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("pipe:echo hello", r"does not say what the command writes; .*: pipe:\.jsonl:echo hello"),
        ("pipe:.txt:", "names no command"),
        ("pipe:.txt:true", r"the command wrote nothing"),
        ("pipe:.txt:sh -c 'echo half; echo no more >&2; exit 7'", r"status 7, .*said: no more"),
    ],
)
def test_an_input_command_that_fails_is_named(tmp_path: Path, named: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_files([named], tmp_path / "keep")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
