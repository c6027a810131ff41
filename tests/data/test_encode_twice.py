"""One shard is written by one process, and no dataset is committed without the index of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.config import DataUsageError, PrepareConfig
from data.jobs import Task
from data.prepare import STAGES, prepare, prepare_task
from data.verify import verify
from tests.data.prepared import tree
from tests.data.texts import prose, write_lines

CONFIG = PrepareConfig(vocab_size=400, val_fraction=0, part_bytes=4000, shard_bytes=12_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", [prose(400, seed=seed) for seed in range(60)])


def before_commit(path: Path, output: Path) -> None:
    for stage in STAGES[:-1]:
        prepare_task([str(path)], output, CONFIG, stage=stage, workers=1)


def test_a_shard_without_its_index_is_not_done(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before_commit(path, output)
    (output / "train/main/shard-000001.idx.json").unlink()
    with pytest.raises(DataUsageError, match="stage encode is not complete: 1 of its 2 jobs"):
        prepare_task([str(path)], output, CONFIG, stage="commit", workers=1)
    prepare(([str(path)]), output, CONFIG, workers=1)
    assert verify(output, full=True).ok


def test_what_another_process_has_written_meanwhile_is_left_alone(
    path: Path, tmp_path: Path
) -> None:
    """Both have seen that the shards are not there; the other one is faster."""
    output = tmp_path / "out"
    for stage in STAGES[:-2]:
        prepare_task([str(path)], output, CONFIG, stage=stage, workers=1)
    moments: list[int] = []

    def overtake(stage: str, done: int, total: int) -> None:
        if done and not moments:
            moments.append(0)
            share = Task(1, 2)
            prepare_task([str(path)], output, CONFIG, stage="encode", task=share, workers=1)
            moments[:] = [p.stat().st_mtime_ns for p in sorted(output.rglob("shard-000001*"))]

    prepare_task([str(path)], output, CONFIG, stage="encode", workers=1, progress=overtake)
    assert [p.stat().st_mtime_ns for p in sorted(output.rglob("shard-000001*"))] == moments
    assert len(moments) == 2
    prepare([str(path)], tmp_path / "expected", CONFIG, workers=1)
    prepare_task([str(path)], output, CONFIG, stage="commit", workers=1)
    assert tree(output) == tree(tmp_path / "expected")
