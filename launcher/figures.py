"""One number of a plan, with its unit and the formula that it came from."""

from __future__ import annotations

from dataclasses import dataclass

from train.durations import large


@dataclass(frozen=True)
class Figure:
    """One number of a plan."""

    key: str
    value: float
    text: str
    """The value with its unit, for people."""
    formula: str
    """How it follows from the config, with the numbers filled in."""


def counted(key: str, value: int, formula: str) -> Figure:
    """A figure that is a number of things."""
    return Figure(key, value, f"{value:,}", formula)


def sized(key: str, value: float, formula: str) -> Figure:
    """A figure in bytes."""
    return Figure(key, value, in_units(value, "B"), formula)


def timed(key: str, seconds: float, formula: str, *, scale: float = 1.0) -> Figure:
    """A figure in seconds, or in units of `scale` seconds."""
    return Figure(key, seconds / scale, duration(seconds), formula)


def in_units(value: float, unit: str) -> str:
    """A number with the largest of k, M, G, T, P in front of the unit that keeps it above 1."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        # GPUs are sold in GB: their memory stays in it.
        if value >= 10**power and not (unit == "B" and power > 9):
            return f"{value / 10**power:,.2f} {letter}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    if told := large(seconds):
        return told
    if 0 < seconds < 0.1:
        return f"{seconds * 1000:,.3g} ms"
    return f"{seconds:,.3g} seconds"
