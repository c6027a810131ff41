"""A disk that is slow ends no run; one that takes nothing any more does, and its rank is named."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

import train.slices
import train.watch
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, train_run
from train.checkpoint import committed
from train.config import RunConfig
from train.world import World

STALL_SECONDS = 1.5


def on_slow_disk(world: World, made: RunConfig, run: Path, rank: int, pauses: list[float]) -> str:
    """Train; the disk of one rank makes it wait so long, piece after piece."""
    left, real = list(pauses), os.fdatasync

    def slow(descriptor: int) -> None:
        real(descriptor)
        if world.rank == rank and left:
            time.sleep(left.pop(0))

    os.fdatasync = slow
    train.slices.WRITE_BYTES = train.slices.SYNC_BYTES = 4096
    return train_run(world, made, run)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_save_may_take_longer_than_a_rank_may_stand_still(
    dataset: Path, tmp_path: Path, background: str
) -> None:
    made = config(
        dataset, "steps=1", f"stall_seconds={STALL_SECONDS}", f"checkpoint.background={background}"
    )
    begun = time.monotonic()
    assert run_ranks(2, on_slow_disk, made, tmp_path, 1, [0.5] * 8) == ["complete"] * 2
    assert time.monotonic() - begun > 2 * STALL_SECONDS
    assert committed(tmp_path) == [1]


def test_a_disk_that_takes_nothing_any_more_is_named_with_its_rank(
    dataset: Path, tmp_path: Path
) -> None:
    made = config(dataset, "steps=1", f"stall_seconds={STALL_SECONDS}")
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(2, on_slow_disk, made, tmp_path, 1, [0.5, 0.5, 3600.0])
    report = json.loads((tmp_path / "attempts/000001.stall.json").read_bytes())
    assert report["verdict"].startswith("rank 1 on ")
    assert "stands still at disk of step 1 for " in report["verdict"]
    assert {row["rank"]: row["phase"] for row in report["ranks"]} == {0: "peers", 1: "disk"}
    assert committed(tmp_path) == []


def from_slow_disk(world: World, made: RunConfig, run: Path) -> str:
    """Go on; the disk of rank 1 makes it wait at each of its first reads."""
    left, real = [0.5] * 6, os.pread

    def slow(*where: int) -> bytes:
        if world.rank == 1 and left:
            time.sleep(left.pop())
        return real(*where)

    os.pread = slow
    train.watch.START_SECONDS = STALL_SECONDS
    return train_run(world, made, run)


def test_a_load_may_take_longer_than_a_rank_may_stand_still(dataset: Path, tmp_path: Path) -> None:
    made = config(dataset, "steps=2", "checkpoint.every=1", f"stall_seconds={STALL_SECONDS}")
    assert run_ranks(2, train_run, made, tmp_path, 1) == ["stopped"] * 2
    begun = time.monotonic()
    assert run_ranks(2, from_slow_disk, made, tmp_path) == ["complete"] * 2
    assert time.monotonic() - begun > 2 * STALL_SECONDS
