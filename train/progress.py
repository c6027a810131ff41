"""Where this rank is: the phase and step that its main thread has entered last, and when.

What the start of an attempt took, part by part, is kept until its first step is done. No torch
here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

from train import faults

PLACES = (*faults.PHASES, "disk", "peers", "mirror")
"""In the order in which a rank comes to them; to `snapshot` a second time, when an update waits for
the copy of the step before. At the last ones, where it waits for its own file to be written, for
those of others, and for copies to be made, no fault can be asked for (train/faults.py).
"""


@dataclass(frozen=True)
class Place:
    """A phase of a step, and how long ago it was entered."""

    phase: str
    step: int
    entered: float
    """By time.monotonic()."""

    @property
    def seconds(self) -> float:
        """Since it was entered."""
        return time.monotonic() - self.entered


_here = Place("import", 0, time.monotonic())
_starting = [("import", time.monotonic())]


def here() -> Place:
    """The place of this rank's main thread."""
    return _here


def at(phase: str, step: int = 0) -> None:
    """Enter a phase; main thread only. Whatever fault was asked for here happens."""
    global _here
    assert phase in PLACES, phase
    _here = Place(phase, step, time.monotonic())
    if phase in faults.AT_START:
        starting(phase)
    faults.point(phase, step)


def starting(part: str) -> None:
    """From now on the start of the attempt is at this part of it."""
    _starting.append((part, time.monotonic()))


def start_seconds() -> dict[str, float]:
    """What the parts of the start took up to now; asked once, when it is over."""
    found: dict[str, float] = {}
    now = ("", time.monotonic())
    for (part, begun), (_, ended) in pairwise([*_starting, now]):
        found[part] = found.get(part, 0.0) + ended - begun
    _starting[:] = [("import", now[1])]
    return {part: round(seconds, 3) for part, seconds in found.items()}
