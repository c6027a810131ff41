"""Removing checkpoints by hand: what training would keep stays, and so does the newest intact one.

Refused while an attempt lives, which prunes by itself. No torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train.attempts import attempts
from train.checkpoint import (
    committed,
    committed_until,
    folders_of,
    remove,
    retire_but,
    step_folder,
)
from train.choice import choose
from train.guard import trouble_began
from train.listing import check_is_run
from train.ownership import check_idle
from train.retention import Retention, retained
from train.slices import CheckpointError


@dataclass(frozen=True)
class Pruned:
    """What stays and what goes."""

    kept: tuple[int, ...]
    """Steps, newest first."""
    intact: int | None
    """The newest one that was read and found whole; it stays whatever the number."""
    removed: tuple[str, ...]
    """Folders, leftovers of interrupted saves among them, the oldest first."""
    bytes: int
    """What the removed files take."""
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def prune_by_hand(run: Path, keep: int, *, dry_run: bool = False) -> Pruned:
    """Keep the newest `keep` checkpoints, those that the run's config keeps for good, and the
    newest intact one, which is read to know that it is. RunInUse while an attempt lives,
    CheckpointError when none is intact.
    """
    check_is_run(run)
    check_idle(run)
    choice = choose(run)
    if choice.taken is None and choice.passed_over:
        raise CheckpointError(
            f"no checkpoint of {run} is intact, so none is removed: one that can be mended may be "
            f"among them. `headrace checkpoint verify {run}` says what is wrong with each"
        )
    guard = {} if choice.taken is None else choice.taken.state.get("guard", {})
    rule = replace(_rule(run), keep=keep, before=trouble_began(guard))
    steps = committed(run)
    kept = retained(committed_until(run, max(steps, default=0)), rule)
    if choice.taken is not None:
        kept.add(choice.taken.step)
    staying = {step_folder(run, step) for step in kept}
    going = [folder for folder in folders_of(run) if folder not in staying]
    size = sum(file.stat().st_size for folder in going for file in folder.rglob("*"))
    if not dry_run and going:
        # Reading has taken a while.
        check_idle(run)
        remove(retire_but(run, kept))
    return Pruned(
        kept=tuple(sorted(kept, reverse=True)),
        intact=None if choice.taken is None else choice.taken.step,
        removed=tuple(map(str, going)),
        bytes=size,
        dry_run=dry_run,
    )


def _rule(run: Path) -> Retention:
    """What the last attempt keeps for good."""
    tables = [row["config"].get("checkpoint", {}) for row in attempts(run) if "config" in row]
    last = tables[-1] if tables else {}
    return Retention(0, last.get("keep_every_steps", 0), last.get("keep_every_hours", 0.0))
