"""How many steps between checkpoints: chosen from what a save costs and how often the run fails.

With C seconds of standing still per save, a mean time M between failures and P seconds until a save
is on disk, an interval of t seconds of training is productive for a share of

    t exp(-R/M) / (M (exp((t + C)/M) - 1))        R seconds from a failure to the next step

of the time, which is greatest at exp(-(t + C)/M) = 1 - t/M (Daly 2006, doi 10.1016/j.future.2004.
11.016; sqrt(2 C M), Young 1974, is its first order). No interval is shorter than P: only what is on
disk counts. M is estimated with a prior of one failure in PRIOR_HOURS of one device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PRIOR_HOURS = 50_000.0
FIRST_SAVE_SECONDS = 10.0
"""What a save is taken to cost before one was measured."""
FIRST_SECONDS = 600.0
"""Of training, at most, before the first save of an attempt: until then nobody knows what it costs,
or that it works.
"""
LONGEST_SECONDS = 4 * 3600.0
"""Of training between two saves, at most: where nothing has failed yet M is the prior alone."""
RESTART_SECONDS = 120.0
"""Until a job that has failed takes its next step; it changes what is predicted, not the choice."""


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    stall: float
    """Training stands still, per save."""
    lag: float
    """From a step to its checkpoint on disk."""
    restart: float
    """From a failure to the next step."""
    between_failures: float


def best_interval(costs: Costs) -> float:
    """Seconds of training between saves at which the most of the time is productive."""
    mean, stall = costs.between_failures, costs.stall
    best = math.sqrt(2 * stall * mean)
    for _ in range(50):
        # Newton's method; the function is convex, so it does not overshoot for long.
        decay = math.exp(-(best + stall) / mean)
        best -= (decay + best / mean - 1) / ((1 - decay) / mean)
    return max(best, costs.lag)


def goodput(interval: float, costs: Costs) -> float:
    """Productive share of the time at an interval, in seconds."""
    mean = costs.between_failures
    lost = math.exp(-costs.restart / mean)
    return interval * lost / (mean * math.expm1((interval + costs.stall) / mean))


def between_failures(rows: Sequence[Mapping[str, Any]], *, num_devices: int, now: float) -> float:
    """Mean seconds between failures of a run, from the rows of attempts.jsonl."""
    starts = {row["attempt"]: row["time"] for row in rows if row["event"] == "start"}
    ends = {row["attempt"]: row for row in rows if row["event"] == "end"}
    numbers = sorted(starts)
    failures, seconds = 0, 0.0
    for number, after in zip(numbers, [*numbers[1:], None], strict=False):
        end = ends.get(number)
        # An attempt that was killed wrote no end: it lived until the next one began, at most.
        last = end["time"] if end else now if after is None else starts[after]
        seconds += max(last - starts[number], 0.0)
        failures += (end is None and after is not None) or (end or {}).get("outcome") == "failed"
    return (PRIOR_HOURS * 3600 / num_devices + seconds) / (1 + failures)


@dataclass(frozen=True)
class Interval:
    """An interval, and what follows from it."""

    steps: int
    goodput: float
    costs: Costs
    is_first: bool
    """No save has been measured yet."""

    def __str__(self) -> str:
        costs = self.costs
        if self.is_first:
            return (
                f"a first checkpoint after {self.steps} steps, to see what one costs: the interval "
                "is chosen then"
            )
        return (
            f"a checkpoint every {self.steps} steps: a save stops training for {costs.stall:.2f} s "
            f"and is on disk after {costs.lag:.1f} s, a failure is expected every "
            f"{costs.between_failures / 3600:.1f} h and costs {costs.restart:.0f} s; productive "
            f"{self.goodput:.1%} of the time"
        )


def choose(costs: Costs, step_seconds: float, *, is_first: bool = False) -> Interval:
    """In whole steps. `is_first`: the costs of a save are assumed, none was measured."""
    longest = max(FIRST_SECONDS if is_first else LONGEST_SECONDS, costs.lag)
    steps = max(1, round(min(best_interval(costs), longest) / step_seconds))
    return Interval(steps, goodput(steps * step_seconds, costs), costs, is_first)
