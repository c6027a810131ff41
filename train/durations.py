"""Seconds in the unit that a person would choose."""

from __future__ import annotations

UNITS = {"days": 86_400, "hours": 3_600, "minutes": 60}


def large(seconds: float, *units: str) -> str | None:
    """In the largest of these units (by default of all) that holds twice; None where none does."""
    for unit in units or UNITS:
        if seconds >= 2 * UNITS[unit]:
            return f"{seconds / UNITS[unit]:,.1f} {unit}"
    return None
