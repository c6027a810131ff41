"""Which fault strikes a soak next, and what all of them should have cost.

`draw` is a function of a seed, an index and how long things typically take here; `measured` and
`predicted` make goodputs of the rows that tests/launcher/soak.py has written.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from train.faults import ERRORS, IN_A_SAVE, IN_A_STEP
from train.interval import Costs, goodput

RANKS = 2
EVERY = 50
"""Steps between checkpoints: about what Daly's formula asks for at this rate of failures."""
MEAN_SECONDS = float(os.environ.get("MEAN_SECONDS") or 15)
"""Between the start of an attempt and its fault; a machine that takes long to start needs more for
any step to be taken.
"""
DEATHS = ("kill", "exit", "raise", *ERRORS)
PLANNED = ("term", "usr1")
STANDING = ("stop", "hang")
OUTSIDE = ("launcher:SIGKILL", "launcher:SIGTERM", "torchrun:SIGKILL", "rank:SIGKILL")


@dataclass(frozen=True)
class Typical:
    """Seconds from the start of the command."""

    ranks: float
    """Until the ranks are processes."""
    attempt: float
    """Until they have met and the attempt is recorded."""
    first: float
    """Until the first step."""
    step: float
    """From a step to the next one."""


@dataclass(frozen=True)
class Strike:
    """A fault that is to happen."""

    fault: str
    """phase:step:rank:kind as in HEADRACE_FAULT, or whom a signal reaches from outside."""
    seconds: float
    """When, from the start of the command."""

    @property
    def is_outside(self) -> bool:
        """Whether we send the signal."""
        return self.fault in OUTSIDE

    @property
    def kind(self) -> str:
        """Its last word."""
        return self.fault.rsplit(":", 1)[1]


def draw(seed: int, index: int, typical: Typical, *, done: int) -> Strike:
    """The fault of an attempt that goes on from step `done`: a function of its arguments alone.

    The seconds until it are distributed exponentially, and evenly so over any run of indices: they
    are quantiles at multiples of the golden ratio. Half the faults before the first step, and a
    quarter of the others, come from outside.
    """
    chosen = random.Random(f"{seed}/{index}")
    quantile = (random.Random(seed).random() + index * (math.sqrt(5) - 1) / 2) % 1
    seconds = -MEAN_SECONDS * math.log1p(-quantile)
    rank = chosen.randrange(RANKS)
    in_step = seconds >= typical.first
    if chosen.random() < (0.25 if in_step else 0.5) or seconds < typical.ranks / 2:
        return Strike(chosen.choice(OUTSIDE), seconds)
    if not in_step:
        # They follow each other as the ranks start; the nearest one is meant.
        places = {
            "import": typical.ranks,
            "rendezvous": typical.ranks + 0.6 * (typical.attempt - typical.ranks),
            "build": typical.attempt,
            "load": (typical.attempt + typical.first) / 2,
        }
        phase = min(places, key=lambda name: abs(places[name] - seconds))
        return Strike(f"{phase}:0:{rank}:{chosen.choice((*DEATHS, *PLANNED))}", seconds)
    step = done + 1 + int((seconds - typical.first) / typical.step)
    phase = chosen.choice((*IN_A_STEP, *IN_A_SAVE))
    if phase in IN_A_SAVE:
        step = max(round(step / EVERY), done // EVERY + 1) * EVERY
    kinds = [*DEATHS, *PLANNED, *STANDING, *(["nan"] if phase == "forward" else [])]
    return Strike(f"{phase}:{step}:{rank}:{chosen.choice(kinds)}", seconds)


def typical(rows: Sequence[Mapping[str, Any]]) -> Typical:
    """What the last attempts took; a guess before the first one."""

    def mean(key: str, guess: float) -> float:
        found = [row[key] for row in rows if row[key] is not None]
        return fmean(found[-5:]) if found else guess

    guess = Typical(ranks=2.0, attempt=5.0, first=8.0, step=0.02)
    return Typical(**{key: mean(key, value) for key, value in vars(guess).items()})


def measured(rows: Sequence[Mapping[str, Any]]) -> float:
    """Goodput: time of the steps that count, over all time."""
    return math.fsum(row["kept"] for row in rows) / math.fsum(row["ended"] for row in rows)


def predicted(rows: Sequence[Mapping[str, Any]]) -> tuple[float, dict[str, float]]:
    """Goodput by Daly's formula (train/interval.py), and what it is computed from, in seconds.

    The formula lets a job fail at any time. Between a fault and the next start there is no job, so
    that time is added to every mean interval. A save costs what the run itself says that it stood
    still: time which is neither of a step nor of a save is in the measured goodput alone.
    """
    trained = [row for row in rows if row["steps"]]
    steps = sum(row["steps"] for row in trained)
    step = math.fsum(row["training"] for row in trained) / steps
    stalled = math.fsum(row["stalled"] for row in trained)
    found = {
        "between_failures": fmean(row["struck"] for row in rows),
        "down": fmean(row["ended"] - row["struck"] for row in rows),
        "restart": fmean(row["first"] for row in trained),
        "interval": EVERY * step,
        "save": stalled / max(sum(row["saves"] for row in trained), 1),
        "lost": fmean(row["training"] - row["kept"] for row in trained),
    }
    costs = Costs(
        stall=found["save"],
        lag=0.0,
        restart=found["restart"],
        between_failures=found["between_failures"],
    )
    up = found["between_failures"] / (found["between_failures"] + found["down"])
    return goodput(found["interval"], costs) * up, found
