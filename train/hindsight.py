"""What the guard would have done in a run, from its metrics alone: to choose `guard.*` before they
count. No torch.

The numbers are those of the run as it went: after the first thing that the guard would have done
otherwise they would have changed, so that what is told later is what would have been seen, not what
would have happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.config import ConfigError
from train.guard import Guard
from train.rows import read_metrics
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
    """Steps with a row."""
    num_skipped: int
    """Of those, the ones that the run itself left out."""
    findings: tuple[Finding, ...]


def hindsight(run: Path, config: GuardConfig) -> Hindsight:
    """Lead a guard through RUN/metrics.jsonl; ConfigError when there is none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{run} has no metrics.jsonl; train it with `headrace pretrain ... --run {run}`"
        )
    guard, findings, num_skipped = Guard(config), [], 0
    rows = [row for row in read_metrics(run) if "data_hash" in row]
    for row in rows:
        if row.get("skipped"):
            # What it would have been is in its reason; it was no step of the run's.
            num_skipped += 1
            continue
        finding = _judged(guard, row["step"], row["loss"], row["grad_norm"], row["samples"])
        if finding is not None:
            findings.append(finding)
    return Hindsight(len(rows), num_skipped, tuple(findings))


def _judged(
    guard: Guard, step: int, loss: float, grad_norm: float, samples: Sequence[int]
) -> Finding | None:
    place = (samples[0], samples[1])
    if listed := guard.lists(step):
        return Finding(step, "skip", listed, place)
    verdict = guard.judge(loss, grad_norm)
    decision = guard.settle(
        step, loss=loss, grad_norm=grad_norm, is_bad=verdict.is_bad, is_high=verdict.is_high
    )
    if decision == "step":
        return None
    reason = verdict.reason
    if decision == "roll back":
        reason = f"steps {guard.spike[0]} to {guard.spike[-1]}: {reason}"
        guard.go_back(guard.state() | {"bad": [], "high": []})
    return Finding(step, decision, reason, place)
