"""Going back to before a spike: which checkpoint, and that the spike's history is left for good.

The event is on the disk before anything else: whoever is killed after that resumes with the same
skip list, and drops the checkpoints that had the spike in them. A run that went back has, byte for
byte, the weights of a run that was given `guard.skip_steps` from its start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from train.checkpoint import Checkpoint, CheckpointError, committed, discard_step, open_checkpoint
from train.engine import Engine
from train.events import read_events, record
from train.guard import Guard
from train.state import load_newest
from train.world import World

log = logging.getLogger(__name__)

EVENT = "rollback"


class NoWayBack(ValueError):
    """A spike with no checkpoint before it."""

    exit_code: ClassVar[int] = 1


def rollbacks_of(run: Path) -> list[list[int]]:
    """The steps of every rollback of a run, oldest first."""
    return [list(row["steps"]) for row in read_events(run, EVENT)]


def leave_spikes(run: Path) -> None:
    """Remove the checkpoints that a spike went into which the run has gone back from. One rank
    only.
    """
    left = rollbacks_of(run)
    for step in committed(run) if left else ():
        # A damaged one tells nothing, and is passed over by the load.
        with suppress(CheckpointError):
            if is_left(open_checkpoint(run, step), left):
                discard_step(run, step)


def is_left(saved: Checkpoint, rollbacks: Sequence[Sequence[int]]) -> bool:
    """Whether a checkpoint has a spike in it that the run has gone back from."""
    known = saved.state.get("guard", {}).get("rollbacks", 0)
    return any(
        saved.step >= steps[0] and known < number for number, steps in enumerate(rollbacks, start=1)
    )


def roll_back(
    engine: Engine,
    world: World,
    run: Path,
    guard: Guard,
    *,
    attempt: int,
    samples: tuple[int, int],
    check: Callable[[], None],
) -> Checkpoint:
    """Collective. Load the newest checkpoint before the guard's spike, and tell the guard.

    `samples` are those of the spike, [first, last); `check` raises when the run is another's by
    now. NoWayBack, and nothing is changed, when there is no such checkpoint.
    """
    steps = guard.spike
    before = world.broadcast([step for step in committed(run) if step < steps[0]])
    if not before:
        raise NoWayBack(
            f"loss or gradient norm spikes from step {steps[0]} to {steps[-1]}, and {run} has no "
            "checkpoint from before it to go back to; start again with a smaller checkpoint.every "
            "or a larger checkpoint.keep, or with "
            f"guard.skip_steps={list(steps)} and another --run"
        )
    with world.together("recording the rollback"):
        if world.is_main:
            check()
            record(
                run,
                EVENT,
                attempt=attempt,
                steps=list(steps),
                samples=list(samples),
                number=guard.rollbacks + 1,
            )
            leave_spikes(run)
    saved = load_newest(engine, world, run)
    assert saved is not None
    guard.go_back(saved.state.get("guard", {}))
    if world.is_main:
        log.warning(
            "loss or gradient norm spiked at steps %d to %d: back to step %d, and those steps will "
            "be skipped (rollback %d); see %s",
            steps[0],
            steps[-1],
            saved.step,
            guard.rollbacks,
            run / "events.jsonl",
        )
    return saved
