"""How long before its time limit a job is asked to save: as its own rows say, or five minutes.

The same rule by which the run itself stops ahead of a limit (train/pace.py): a step, and a save,
both twice as slow as the slowest of late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.rows import Row, last_rows

DEFAULT_SECONDS = 300
MARGIN_SECONDS = 30
"""For Slurm, the shell and srun to pass the signal on."""
RECENT_STEPS = 200
TAIL_BYTES = 16 * 2**20
"""Of metrics.jsonl: some ten thousand steps, among them the last saves."""


@dataclass(frozen=True)
class Lead:
    """Seconds before the limit, and why so many."""

    seconds: int
    reason: str = ""


def lead_of(run: Path, asked: int | None = None) -> Lead:
    """What somebody asked for, else what the run's steps and saves have taken, else 300 s."""
    if asked is not None:
        return Lead(asked, "asked for with --lead")
    rows = last_rows(run / "metrics.jsonl", num_bytes=TAIL_BYTES)
    saves = _seconds(rows, "checkpoint_lag_seconds")
    steps = _seconds(rows, "step_seconds")[-RECENT_STEPS:]
    if not saves or not steps:
        return Lead(DEFAULT_SECONDS, "no save of this run has been measured yet")
    step, save = max(steps), max(saves)
    # In tens: a script that changes with every submission is harder to compare.
    seconds = math.ceil((2 * (step + save) + MARGIN_SECONDS) / 10) * 10
    return Lead(seconds, f"twice the slowest step, {step:.1f} s, and save, {save:.1f} s, of {run}")


def _seconds(rows: Iterable[Row], key: str) -> list[float]:
    """What rows tell that is a duration; of another kind, or NaN, it tells nothing."""
    told = [row.get(key) for row in rows]
    return [float(x) for x in told if isinstance(x, (int, float)) and 0 <= x < math.inf]
