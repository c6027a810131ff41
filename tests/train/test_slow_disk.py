"""A disk that is slow ends no run; one that takes nothing any more does, and its rank is named."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import data.store
import train.slices
import train.watch
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, losses, train_run
from train.checkpoint import committed, step_folder
from train.config import RunConfig
from train.metrics import read_metrics
from train.mirror import Mirror
from train.pretrain import pretrain_on
from train.world import RankError, World

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


KEPT = ("steps=12", "checkpoint.every=4", "checkpoint.keep=1", "checkpoint.background=true")


def removing_slowly(world: World, made: RunConfig, run: Path) -> str:
    """Train; the removal of step 4 takes until three steps have followed the save of step 8."""
    real = shutil.rmtree

    def slow(folder: Path) -> None:
        assert committed(run)[0] == 8 and folder == step_folder(run, 4), folder
        until = time.monotonic() + 30
        while losses(run)[-1][0] < 11:
            assert time.monotonic() < until, "training waits for the removal"
            time.sleep(0.01)
        shutil.rmtree = real
        real(folder)

    shutil.rmtree = slow  # type: ignore[assignment]
    try:
        return train_run(world, made, run)
    finally:
        shutil.rmtree = real


def test_no_step_waits_for_the_removal_of_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    made = config(dataset, *KEPT)
    assert run_ranks(2, removing_slowly, made, tmp_path) == ["complete"] * 2
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000000012"]


def removing_in_vain(world: World, made: RunConfig, run: Path) -> str:
    """The error of a run whose disk removes nothing."""
    real = shutil.rmtree

    def refuse(folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder))

    shutil.rmtree = refuse  # type: ignore[assignment]
    try:
        with pytest.raises(RankError) as error:
            train_run(world, made, run)
    finally:
        shutil.rmtree = real
    return str(error.value)


def test_a_checkpoint_that_cannot_be_removed_is_told_on_every_rank(
    dataset: Path, tmp_path: Path
) -> None:
    first, second = run_ranks(2, removing_in_vain, config(dataset, *KEPT), tmp_path)
    assert first == second
    assert first.startswith(
        f"{step_folder(tmp_path, 4)} cannot be written: Operation not permitted"
    )
    assert committed(tmp_path) == [8]


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


def mending_slowly(world: World, made: RunConfig, run: Path) -> str:
    """Go on; the mirror makes a rank wait at each piece of a file."""
    real = data.store.FolderStore.read

    def slow(self: data.store.FolderStore, name: str, first: int = 0) -> Iterator[bytes]:
        for piece in real(self, name, first):
            if name.startswith("step-") and name.endswith(".safetensors"):
                time.sleep(0.5)
            yield piece

    data.store.FolderStore.read = slow  # type: ignore[method-assign]
    data.store.BLOCK_BYTES = 100_000
    train.watch.START_SECONDS = STALL_SECONDS
    return pretrain_on(world, made, run)


def test_a_copy_may_take_longer_to_come_back_than_a_rank_may_stand_still(
    dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    made = config(
        dataset,
        "steps=2",
        "checkpoint.every=1",
        f"stall_seconds={STALL_SECONDS}",
        f"checkpoint.mirror={tmp_path / 'far'}",
    )
    assert run_ranks(1, train_run, made, run, 1) == ["stopped"]
    path = step_folder(run, 1) / "rank-00000.safetensors"
    assert Mirror(str(tmp_path / "far"), run).steps() == [1]
    path.write_bytes(bytes(path.stat().st_size))
    begun = time.monotonic()
    # The second rank has no file to copy, and waits.
    assert run_ranks(2, mending_slowly, made, run) == ["complete"] * 2
    assert time.monotonic() - begun > 2 * STALL_SECONDS
    assert [row["resumed_from"] for row in read_metrics(run) if "resumed_from" in row] == [1]
