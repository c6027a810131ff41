"""Text that was another one while it was read is in no dataset; a file that was only moved is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import DataError, PrepareConfig
from data.prepare import STAGES, prepare, prepare_task
from data.stamps import InputChanged, Stamp, Touched, digest, moment, steadily, unchanged
from tests.data.prepared import tree
from tests.data.texts import prose, write_lines

CONFIG = PrepareConfig(vocab_size=400, val_fraction=0, part_bytes=4000, shard_bytes=12_000)


class Killed(BaseException):
    """Ends a call at once."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", [prose(400, seed=seed) for seed in range(120)])


def edit(path: Path, *, put_back_time: bool = False) -> None:
    """Other text of the same size."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"wheel", b"WRONG"))
    if put_back_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def staged(path: Path, output: Path, after: str, act: Callable[[], object]) -> None:
    for stage in STAGES:
        prepare_task([str(path)], output, CONFIG, stage=stage, workers=1)
        if stage == after:
            act()


@pytest.mark.parametrize("copy", [shutil.copy, shutil.copy2])
def test_a_kill_leaves_nothing_of_an_edit_that_was_put_back(
    path: Path, tmp_path: Path, copy: Callable[[Path, Path], object]
) -> None:
    shutil.copy2(path, tmp_path / "backup")
    prepare([str(path)], tmp_path / "expected", CONFIG, workers=1)

    def disturb(stage: str, done: int, total: int) -> None:
        if stage == "encode" and done == 0:
            edit(path)
        if stage == "encode" and done > total / 2:
            raise Killed

    with pytest.raises((Killed, DataError)):
        prepare([str(path)], tmp_path / "out", CONFIG, workers=1, progress=disturb)
    copy(tmp_path / "backup", path)
    prepare([str(path)], tmp_path / "out", CONFIG, workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_an_edit_between_stages_is_named_though_size_and_time_are_put_back(
    path: Path, tmp_path: Path
) -> None:
    for after in ("survey", "encode"):
        shutil.copy2(path, tmp_path / "backup")
        with pytest.raises(DataError, match=r"the input changed while it was .*a\.jsonl\), so"):
            staged(path, tmp_path / after, after, lambda: edit(path, put_back_time=True))
        assert not (tmp_path / after / "manifest.json").exists()
        shutil.copy2(tmp_path / "backup", path)


def test_a_file_that_is_only_linked_between_stages_is_what_it_was(
    path: Path, tmp_path: Path
) -> None:
    prepare([str(path)], tmp_path / "expected", CONFIG, workers=1)
    staged(path, tmp_path / "out", "tokenizer", lambda: os.link(path, tmp_path / "link"))
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_a_shard_of_other_work_is_not_taken_over(path: Path, tmp_path: Path) -> None:
    """As another version of this code leaves it, which cuts the same documents otherwise."""
    prepare([str(path)], tmp_path / "expected", CONFIG, workers=1)

    def foreign() -> None:
        [result] = (tmp_path / "out/headrace.work").glob("encode-*/000000.json")
        result.unlink()
        for name in ("shard-000000.tar", "shard-000000.idx.json"):
            found = tmp_path / "out/train/main" / name
            found.unlink()
            shutil.copy(tmp_path / "other/train/main" / name, found)
        prepare_task([str(path)], tmp_path / "out", CONFIG, stage="encode", workers=1)

    other = tmp_path / "b.jsonl"
    shutil.copy(path, other)
    edit(other)
    tokenizer = tmp_path / "expected" / "tokenizer.model"
    config = PrepareConfig(val_fraction=0, part_bytes=4000, shard_bytes=12_000)
    prepare([str(other)], tmp_path / "other", config, workers=1, tokenizer=tokenizer)
    staged(path, tmp_path / "out", "encode", foreign)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_reading_is_done_again_where_the_file_was_touched_meanwhile(path: Path) -> None:
    stamp = Stamp(*moment(path), xxh3=digest(path))
    reads = []

    def read(touches: int) -> bytes:
        with unchanged(path, stamp):
            reads.append(path.read_bytes())
            if len(reads) <= touches:
                path.chmod(0o600 + len(reads))
            return reads[-1]

    assert steadily(lambda: read(2)) == path.read_bytes()
    assert len(reads) == 3
    with pytest.raises(Touched, match=r"the input changed while it was .*a\.jsonl"):
        steadily(lambda: read(99))


def test_what_is_wrong_with_a_file_that_changed_is_that_it_changed(path: Path) -> None:
    stamp = Stamp(*moment(path))
    with pytest.raises(InputChanged), unchanged(path, stamp):
        path.write_text("other")
        raise DataError("broken JSON")
    path.unlink()
    with pytest.raises(InputChanged, match="No such file"), unchanged(path, stamp):
        pass


def test_a_file_that_grows_while_other_inputs_are_fetched_is_named(
    path: Path, tmp_path: Path
) -> None:
    more = write_lines(tmp_path / "more.jsonl", [prose(400, seed=seed) for seed in range(5)])
    script = f"print(open({str(more)!r}).read(), end='')"
    script += f"; open({str(path)!r}, 'a').write(open({str(more)!r}).read())"
    (tmp_path / "fetch.py").write_text(script)
    inputs = [str(path), f"pipe:.jsonl:{sys.executable} {tmp_path / 'fetch.py'}"]
    with pytest.raises(DataError, match=r"the input changed while it was .*a\.jsonl\), so"):
        prepare(inputs, tmp_path / "out", CONFIG, workers=1)
    assert prepare(inputs[:1], tmp_path / "again", CONFIG, workers=1).manifest.counts[
        "documents"
    ] == len(path.read_bytes().splitlines())
