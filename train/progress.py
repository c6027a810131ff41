"""Where this rank is: the phase and step that its main thread has entered last, and when.

The places are those where a fault can be let happen (train/faults.py). No torch here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from train import faults


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


def here() -> Place:
    """The place of this rank's main thread."""
    return _here


def at(phase: str, step: int = 0) -> None:
    """Enter a phase; main thread only. Whatever fault was asked for here happens."""
    global _here
    _here = Place(phase, step, time.monotonic())
    faults.point(phase, step)
