"""What a benchmark's figures have to reach; one that does not is named, and the exit code is 1."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A figure, and the limit that it has to keep."""

    name: str
    value: float
    at_least: float = float("-inf")
    below: float = float("inf")

    @property
    def is_missed(self) -> bool:
        """Also by a figure that is no number."""
        return not self.at_least <= self.value < self.below


def judge(bars: Sequence[Bar]) -> int:
    """The exit code; every bar that is missed is told on stderr."""
    missed = [bar for bar in bars if bar.is_missed]
    for bar in missed:
        limit = f"at least {bar.at_least:g}" if bar.value < bar.at_least else f"below {bar.below:g}"
        print(f"missed: {bar.name} is {bar.value:.4g}, it has to be {limit}", file=sys.stderr)
    return 1 if missed else 0
