"""What the guard would have done in a run, from what it has recorded alone: to choose `guard.*`
before they count. No torch.

Every step is judged by the numbers that were computed for it: those of its row, or, where it was
skipped, those of events.jsonl or of a row from before a rollback. They are those of the run as it
went: after the first thing that the guard would have done otherwise they would have changed, so
that what is told later is what would have been seen, not what would have happened. Nothing is told
of what follows the end that the guard would have put to the run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import read_rows
from train.checkpoint import committed
from train.config import ConfigError
from train.events import GIVE_UP, SKIP, read_events
from train.guard import Guard
from train.settings import GuardConfig


@dataclass(frozen=True)
class Finding:
    """A step that would not have been taken."""

    step: int
    decision: str
    reason: str
    samples: tuple[int, int]


@dataclass(frozen=True)
class Hindsight:
    """The guard's view of a run."""

    num_steps: int
    """Steps that the run has come to."""
    num_skipped: int
    """Of those, the ones that the run itself left out, or ended with."""
    findings: tuple[Finding, ...]
    num_missing: int
    """Good steps that the run was too short by for anything to be out of the ordinary."""


def hindsight(run: Path, config: GuardConfig) -> Hindsight:
    """Lead a guard through a run; ConfigError when it has no metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{run} has no metrics.jsonl; train it with `headrace pretrain ... --run {run}`"
        )
    rows = read_rows(path)
    last = {row["step"]: row for row in rows if "data_hash" in row}
    # Of a step that ended the run there is no row.
    untaken = {row["step"]: row for kind in (SKIP, GIVE_UP) for row in read_events(run, kind)}
    computed = {row["step"]: row for row in rows if "loss" in row} | untaken
    saved = {row[key] for row in rows for key in ("checkpoint_step", "resumed_from") if key in row}
    saved |= set(committed(run))
    guard, findings = Guard(config), []
    steps = sorted(last | untaken)
    for step in steps:
        row = last.get(step) or untaken[step]
        numbers = row if "loss" in row else computed.get(step)
        finding = _judged(guard, step, row["samples"], numbers, saved)
        if finding is not None:
            findings.append(finding)
            if finding.decision == "give up":
                break
    num_skipped = sum("loss" not in last.get(step, {}) for step in steps)
    return Hindsight(len(steps), num_skipped, tuple(findings), guard.num_missing)


def _judged(
    guard: Guard,
    step: int,
    samples: Sequence[int],
    numbers: Mapping[str, Any] | None,
    saved: Collection[int],
) -> Finding | None:
    """What would have become of a step; None when it would have been taken, or nobody has computed
    it. `saved` are the steps of the checkpoints that there were.
    """
    place = (samples[0], samples[1])
    if listed := guard.lists(step):
        return Finding(step, "skip", listed, place)
    if numbers is None:
        return None
    # JSON has no NaN, so that null stands for it.
    loss, norm = (
        math.nan if value is None else value for value in (numbers["loss"], numbers["grad_norm"])
    )
    verdict = guard.judge(loss, norm)
    decision = guard.settle(
        step, loss=loss, grad_norm=norm, is_bad=verdict.is_bad, is_high=verdict.is_high
    )
    if decision == "step":
        return None
    reason = verdict.reason
    if decision == "roll back":
        first, last = guard.spike[0], guard.spike[-1]
        reason = f"steps {first} to {last}: {reason}"
        if not any(one < first for one in saved):
            reason += f"; no checkpoint from before step {first} to go back to"
            return Finding(step, "give up", reason, place)
        guard.go_back(guard.state() | {"bad": [], "high": []})
    return Finding(step, decision, reason, place)
