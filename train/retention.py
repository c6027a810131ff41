"""Which checkpoints stay when a newer one is committed: a pure function of steps and times.

The newest `keep` stay, besides those at milestones: every so many steps, and the first one of every
so many hours. While the guard meets one bad step after the other, the last one before them stays,
too, however many are taken meanwhile. Only ever applied after a commit. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Retention:
    """How many checkpoints to keep, and which for good."""

    keep: int
    """Newest ones."""
    every_steps: int = 0
    """Those whose step is a multiple stay; 0 for none."""
    every_hours: float = 0.0
    """The first one committed in each period of this length stays; 0 for none."""
    before: int = 0
    """The newest one before this step stays; 0 for none."""


@dataclass(frozen=True)
class Committed:
    """What is asked of a checkpoint."""

    step: int
    time: float | None
    """Of its commit, in seconds since 1970; None when its manifest cannot be read."""


def retained(found: Iterable[Committed], rule: Retention) -> set[int]:
    """Steps that stay.

    Periods are counted from 1970 and not from the first checkpoint, so that what stays does not
    depend on what went before, and pruning after every commit keeps what pruning once would.
    """
    rows = sorted(found, key=lambda row: row.step)
    stay = {row.step for row in rows[len(rows) - min(rule.keep, len(rows)) :]}
    if rule.every_steps:
        stay |= {row.step for row in rows if row.step % rule.every_steps == 0}
    stay |= {row.step for row in [row for row in rows if row.step < rule.before][-1:]}
    if rule.every_hours:
        first: dict[int, int] = {}
        for row in rows:
            if row.time is not None:
                period = int(row.time // (rule.every_hours * SECONDS_PER_HOUR))
                first.setdefault(period, row.step)
        stay |= set(first.values())
    return stay
