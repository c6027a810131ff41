"""The rank that keeps the others waiting is named, with what it does meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train.passes
import train.step
from tests.ranks import run_ranks
from tests.train.test_pretrain import config, train_run
from train.config import RunConfig
from train.metrics import read_metrics
from train.timing import communication, slowest
from train.world import World


def test_who_is_later_than_the_median_is_slow_and_why() -> None:
    even = torch.tensor([[0.01, 0.5]] * 4, dtype=torch.float64)
    assert slowest(even, step_seconds=1.0) == {"data_seconds": 0.01}
    slow = even.clone()
    slow[2, 1] = 0.7
    found = slowest(slow, step_seconds=1.0)
    assert (found["slowest_rank"], found["slowest_cause"]) == (2, "compute")
    assert found["slowest_seconds"] == pytest.approx(0.2)
    slow[3, 0] = 0.4
    found = slowest(slow, step_seconds=1.0)
    assert (found["slowest_rank"], found["slowest_cause"]) == (3, "data")
    assert found["data_seconds"] == 0.4
    assert "slowest_rank" not in slowest(slow, step_seconds=10.0)


def test_a_step_that_is_long_with_nobody_late_waited_for_the_network() -> None:
    usual = [(1.0, 0.6), (1.1, 0.7), (0.9, 0.6), (1.0, 0.6), (1.05, 0.65)]
    assert communication((1.6, 0.6), usual) == {
        "slowest_cause": "communication",
        "slowest_seconds": pytest.approx(0.6),
    }
    # As long, but because every rank computed as much longer.
    assert communication((1.6, 1.2), usual) == {}
    assert communication((1.2, 0.6), usual) == {}
    # Nobody knows yet what is usual.
    assert communication((1.6, 0.6), usual[:4]) == {}


def test_slow_communication_stands_in_the_metrics(dataset: Path, tmp_path: Path) -> None:
    made = config(dataset, "steps=12", "eval.samples=1", "checkpoint.every=0")
    run_ranks(2, slowed_links, made, tmp_path / "run")
    found = {
        r["step"]: r.get("slowest_cause") for r in read_metrics(tmp_path / "run") if "loss" in r
    }
    assert found[11] == "communication"


def slowed_links(world: World, made: RunConfig, run: Path) -> str:
    """Train; at step 11 the sums over all ranks take a second longer for everybody."""
    train.step.TIMED_STEPS = 1
    original = train.step.at

    def at(phase: str, step: int = 0) -> None:
        if (phase, step) == ("reduce", 11):
            time.sleep(1.0)
        original(phase, step)

    train.step.at = at
    return train_run(world, made, run)


def slowed(world: World, made: RunConfig, run: Path, cause: str) -> str:
    """Train; the last rank takes half a second longer for its data or its forward pass."""
    original = train.passes.at

    def at(phase: str, step: int = 0) -> None:
        if phase == cause and world.rank == world.size - 1:
            time.sleep(0.5)
        original(phase, step)

    train.passes.at = at
    return train_run(world, made, run)


@pytest.mark.parametrize(("phase", "cause"), [("data", "data"), ("forward", "compute")])
def test_a_slow_rank_stands_in_the_metrics(
    dataset: Path, tmp_path: Path, phase: str, cause: str
) -> None:
    # The step that is told of is computed twice, which is told apart.
    made = config(dataset, "steps=10", "eval.samples=1", "guard.repeat_every=10")
    run_ranks(2, slowed, made, tmp_path / "run", phase)
    rows: list[dict[str, Any]] = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    timed = [row for row in rows if "data_seconds" in row]
    assert [row["step"] for row in timed] == [10]
    assert (timed[0]["slowest_rank"], timed[0]["slowest_cause"]) == (1, cause)
    assert timed[0]["slowest_seconds"] == pytest.approx(0.5, abs=0.45)
    assert timed[0]["step_seconds"] >= 0.5 and timed[0]["repeat_seconds"] > 0
