"""A checkpoint is of its step, though the next step begins while its state is being copied."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train.snapshot
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, losses, train_run
from train.checkpoint import committed, step_folder
from train.config import RunConfig
from train.metrics import read_metrics
from train.progress import here
from train.snapshot import Pair, Snapshots
from train.world import World

LAYOUTS = (
    ("zero.stage=0",),
    ("zero.stage=1", "precision=bf16", "guard.repeat_every=1"),
    ("zero.stage=3", "guard.repeat_every=2"),
)
"""In those that are computed twice, gradients are dropped while the copy is still to come."""
SAVES = ("checkpoint.every=1", "checkpoint.keep=10", "steps=4", "micro_batch=2", "eval.every=2")
PAUSE_SECONDS = 1.0
"""Much longer than a step, on a machine that is busy, too."""


def copying_late(world: World, made: RunConfig, run: Path) -> list[list[str]]:
    """Train; a copy is made as late as it can be: when the step after it waits for it. Returns the
    phases that training has passed while each copy was to come.
    """
    real, passed = train.snapshot._copy, list[list[str]]()

    def late(pairs: Sequence[Pair]) -> None:
        phases = [here().phase]
        passed.append(phases)
        until = time.monotonic() + 60
        # It begins at "snapshot", and comes there again to wait; the last one is waited for at the
        # end of the run.
        while phases[-1] != "disk" and not (len(phases) > 1 and phases[-1] == "snapshot"):
            assert time.monotonic() < until, f"training went on to {phases}"
            if (now := here().phase) != phases[-1]:
                phases.append(now)
            time.sleep(0.0005)
        if len(passed) == 1:
            time.sleep(PAUSE_SECONDS)
        real(pairs)

    train.snapshot._copy = late
    try:
        assert train_run(world, made, run) == "complete"
    finally:
        train.snapshot._copy = real
    return passed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_late_copy_is_of_its_step(dataset: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    at_once, late = tmp_path / "at-once/run", tmp_path / "late/run"
    made = config(dataset, *layout, *SAVES)
    waiting = config(dataset, *layout, *SAVES, "checkpoint.background=false")
    run_ranks(2, train_run, waiting, at_once)
    for passed in run_ranks(2, copying_late, made, late):
        assert len(passed) == 4
        # Training went on to the update of the next step: three micro-batches.
        assert all({"backward", "reduce"} & {*phases} for phases in passed[:-1])
        assert not any("optimizer" in phases for phases in passed)
    assert committed(late) == committed(at_once) == [4, 3, 2, 1]
    assert losses(late) == losses(at_once)
    for step in committed(late):
        for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
            found, wanted = (step_folder(run, step) / name for run in (late, at_once))
            assert found.read_bytes() == wanted.read_bytes(), (step, name)
    rows = read_metrics(late)
    stalls = [r["checkpoint_stall_seconds"] for r in rows if "checkpoint_stall_seconds" in r]
    assert len(stalls) == 2 and max(stalls) >= PAUSE_SECONDS
    # It is told once: as time of the save, and not of the step.
    (second,) = [row for row in rows if row["step"] == 2 and "loss" in row]
    assert second["step_seconds"] < PAUSE_SECONDS


def copying_in_vain(world: World, made: RunConfig, run: Path) -> None:
    """Train, where one rank cannot copy its state."""
    real = train.snapshot._copy

    def fail(pairs: Sequence[Pair]) -> None:
        if world.rank == 1:
            raise MemoryError("no memory for the copy")
        real(pairs)

    train.snapshot._copy = fail
    train_run(world, made, run)


def test_without_a_copy_nothing_is_committed(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="MemoryError: no memory for the copy"):
        run_ranks(2, copying_in_vain, config(dataset, *SAVES), tmp_path)
    assert committed(tmp_path) == []


def copying_for_ever(world: World, made: RunConfig, run: Path) -> None:
    """Train, where the copy of one rank does not end."""
    if world.rank == 1:
        train.snapshot._copy = lambda pairs: time.sleep(3600)
    train_run(world, made, run)


def test_a_copy_that_does_not_end_is_named_with_its_rank(dataset: Path, tmp_path: Path) -> None:
    made = config(dataset, *SAVES, "stall_seconds=1.5")
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(2, copying_for_ever, made, tmp_path)
    report = json.loads((tmp_path / "attempts/000001.stall.json").read_bytes())
    assert report["verdict"].startswith("rank 1 on ")
    assert "stands still at snapshot of step 1 for " in report["verdict"]
    assert committed(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_that_is_behind_is_waited_for() -> None:
    state = torch.zeros(1 << 20, device="cuda")
    snapshots = Snapshots()
    # Pins its buffer, which waits for the GPU by itself.
    snapshots.begin({"param": [state]}, copied=True)()
    torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]
    state += 1
    with ThreadPoolExecutor(1) as writer:
        arrays = writer.submit(snapshots.begin({"param": [state]}, copied=True)).result()
    assert (arrays["param"][0] == 1).all()
