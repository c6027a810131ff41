"""Which checkpoint a resume takes, and why not the newer ones.

The newest one that can be taken whole: those before it are tried in turn, and each that is passed
over has its reason. A resume, the command line and the advice in error messages all ask here. No
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint import Checkpoint, committed, open_checkpoint, step_folder
from train.slices import CheckpointError


@dataclass(frozen=True)
class PassedOver:
    """A committed checkpoint that cannot be taken."""

    step: int
    reason: str


@dataclass(frozen=True)
class Choice:
    """The checkpoint that is taken, and the newer ones that are not, newest first."""

    run: Path
    taken: Checkpoint | None
    passed_over: tuple[PassedOver, ...]

    def require(self) -> Checkpoint | None:
        """The one that is taken, None where there is none at all. CheckpointError when there are
        some and none is usable: starting again from nothing would throw away the run.
        """
        if self.taken is None and self.passed_over:
            raise CheckpointError(
                f"no checkpoint of {self.run} is usable:\n  "
                + "\n  ".join(f"step {passed.step}: {passed.reason}" for passed in self.passed_over)
                + "\nput a whole copy of one of them back, or train again from step 0 with another "
                "--run"
            )
        return self.taken


def verified(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, every byte of it read; CheckpointError names what is damaged."""
    saved = open_checkpoint(run, step)
    saved.verify()
    return saved


def choose(
    run: Path,
    steps: Sequence[int] | None = None,
    *,
    take: Callable[[Path, int], Checkpoint] = verified,
    failures: type[Exception] | tuple[type[Exception], ...] = (CheckpointError, OSError),
) -> Choice:
    """The first of `steps` (all that are committed, newest first) that `take` can take.

    Costs what `take` costs for that one and for each that is passed over: by default reading them.
    """
    passed: list[PassedOver] = []
    for step in committed(run) if steps is None else steps:
        try:
            return Choice(run, take(run, step), tuple(passed))
        except failures as error:
            passed.append(PassedOver(step, str(error)))
    return Choice(run, None, tuple(passed))


def newest_intact(run: Path, *, but: int) -> int | None:
    """The newest step but this one whose checkpoint verifies; reads all of it."""
    taken = choose(run, [step for step in committed(run) if step != but]).taken
    return None if taken is None else taken.step


def retraining(run: Path, damaged: int, *, intact: int | None) -> str:
    """What to do about a damaged checkpoint, when `newest_intact` has found that or no other."""
    folder = step_folder(run, damaged)
    if intact is None:
        return (
            f"no other checkpoint of {run} is intact: put back a copy of {folder}, or train again "
            "with another --run"
        )
    if intact > damaged:
        return f"the checkpoint of step {intact} is intact"
    return (
        f"the checkpoint of step {intact} is intact: remove {folder}, and the same training "
        f"command goes on from step {intact}"
    )
