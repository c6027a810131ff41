"""Going back to before a spike: which checkpoint, and that the spike's history is left for good.

The checkpoint is loaded before anything is given up: a run that cannot go back keeps what it has.
The event is on the disk before the spike's checkpoints go: whoever is killed after that resumes
with the same skip list, and drops them. A run that went back has, byte for byte, the weights of a
run that was given `guard.skip_steps` from its start.
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
from train.state import load_first
from train.world import World

log = logging.getLogger(__name__)

EVENT = "rollback"


class NoWayBack(ValueError):
    """A spike with no usable checkpoint before it."""

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
    mend: Callable[[int], bool],
) -> Checkpoint:
    """Collective. Load the newest checkpoint before the guard's spike, and tell the guard.

    `samples` are those of the spike, [first, last); `check` raises when the run is another's by
    now; `mend` is asked for a checkpoint that is damaged, and says whether it put it right.
    NoWayBack, and the run keeps every checkpoint, when there is none that is usable.
    """
    with world.together("asking whose the run is"):
        if world.is_main:
            check()
    saved = _load_before(engine, world, run, guard.spike, mend)
    steps = guard.spike
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


def _load_before(
    engine: Engine, world: World, run: Path, spike: range, mend: Callable[[int], bool]
) -> Checkpoint:
    """Collective. Load the newest checkpoint before a spike that verifies; NoWayBack, and the
    engine is as it was, when there is none.
    """
    before = world.broadcast([step for step in committed(run) if step < spike[0]])
    choice = load_first(engine, world, run, before, mend=mend)
    if choice.taken is not None:
        return choice.taken
    told = [f"step {passed.step}: {passed.reason}" for passed in choice.passed_over]
    what = f"loss or gradient norm spikes from step {spike[0]} to {spike[-1]}, and {run} has no "
    if told:
        raise NoWayBack(
            f"{what}usable checkpoint from before it to go back to:\n  "
            + "\n  ".join(told)
            + "\nthe run keeps all that it has. Put back a copy of one of them and run the same "
            "command again, or go on through the spike with guard.rollback=0"
        )
    raise NoWayBack(
        f"{what}checkpoint from before it to go back to; start again with a smaller "
        "checkpoint.every or a larger checkpoint.keep, or with "
        f"guard.skip_steps={list(spike)} and another --run"
    )
