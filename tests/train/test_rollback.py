"""Going back to before a spike, on one rank, when what lies there is damaged."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.train.toy import make_engine, run_steps, save
from train.checkpoint import Checkpoint, committed, step_folder
from train.config import JobConfig
from train.engine import Engine
from train.events import read_events
from train.guard import Guard
from train.rollback import NoWayBack, roll_back
from train.settings import GuardConfig
from train.world import World

SIZE = 4


def saved_at(world: World, run: Path, *steps: int) -> Engine:
    """An engine with checkpoints of these steps of its own."""
    config = JobConfig.model_validate({"precision": "fp32"})
    engine, accumulation = make_engine(config, world, size=SIZE, micro_batch=SIZE, plain=True)
    done = 0
    for step in steps:
        run_steps(
            engine,
            world,
            range(done + 1, step + 1),
            size=SIZE,
            micro_batch=SIZE,
            accumulation=accumulation,
        )
        save(engine, world, run, step)
        done = step
    return engine


def spiked(first: int, last: int) -> Guard:
    guard = Guard(GuardConfig(rollback=1, max_skips=last - first))
    decisions = [
        guard.settle(step, loss=math.nan, grad_norm=1.0, is_bad=True, is_high=True)
        for step in range(first, last + 1)
    ]
    assert decisions[-1] == "roll back"
    return guard


def damage(run: Path, step: int) -> None:
    path = step_folder(run, step) / "rank-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def back(engine: Engine, world: World, run: Path, mend: Callable[[int], bool]) -> Checkpoint:
    return roll_back(
        engine,
        world,
        run,
        spiked(8, 10),
        attempt=1,
        samples=(28, 40),
        check=lambda: None,
        mend=mend,
    )


def test_nothing_is_given_up_for_a_checkpoint_that_does_not_load(
    world_of_one: World, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    engine = saved_at(world_of_one, run, 6, 9)
    shutil.copytree(step_folder(run, 6), copy)
    damage(run, 6)
    before = [values.clone() for values in engine.module.parameters()]
    with pytest.raises(NoWayBack, match="has no usable checkpoint from before it") as told:
        back(engine, world_of_one, run, lambda step: False)
    assert "\n  step 6: " in str(told.value) and "rank-00000.safetensors" in str(told.value)
    assert "Put back a copy of one of them and run the same command again" in str(told.value)
    assert committed(run) == [9, 6] and read_events(run, "rollback") == []
    assert all(map(torch.equal, engine.module.parameters(), before))

    def mend(step: int) -> bool:
        shutil.copytree(copy, step_folder(run, step), dirs_exist_ok=True)
        return True

    assert back(engine, world_of_one, run, mend).step == 6
    assert committed(run) == [6]
    assert [event["steps"] for event in read_events(run, "rollback")] == [[8, 9, 10]]


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    world_of_one: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    engine = saved_at(world_of_one, run, 3, 6, 9)
    damage(run, 6)
    assert back(engine, world_of_one, run, lambda step: False).step == 3
    assert committed(run) == [6, 3]
