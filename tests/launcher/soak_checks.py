"""What every row of a soak must show."""

from __future__ import annotations

import signal
from typing import Any

from tests.launcher.random_faults import DEATHS, EVERY, OUTSIDE, PLANNED, STANDING
from tests.launcher.soak import STALL_SECONDS
from train import faults
from train.faults import IN_A_STEP

GOODPUT_MARGIN = 0.03
LEFT_SECONDS = 5
"""In which all ranks have ended of a death."""
IN_FLIGHT = 10
"""Steps that training may be ahead of a save: of 227 one took 6 of them, all others 2."""


def is_death(fault: str) -> bool:
    """Whether a rank dies or fails of it. Ranks whose launcher is killed are asked to stop by
    torchrun, which the kernel has told: they save first.
    """
    kind = fault.rsplit(":", 1)[1]
    return kind in (*DEATHS, "nan", "SIGKILL") and not fault.startswith("launcher")


def check_row(row: dict[str, Any]) -> None:
    """What each fault makes of its attempt, and how soon."""
    check_loss(row)
    kind = row["fault"].rsplit(":", 1)[1]
    code, seconds = row["exit_code"], row["gone"] - row["struck"]
    if is_death(row["fault"]):
        assert seconds <= LEFT_SECONDS, row
    if kind in STANDING:
        # Of a writer that hangs the loop hears at the next save.
        at_most = STALL_SECONDS + 5 + (EVERY * row["step"] if "write" in row["fault"] else 0)
        assert code == 4 and seconds <= at_most, row
    elif row["fault"] == "launcher:SIGTERM":
        # Python itself may still be starting.
        assert code == 3 or (code == -signal.SIGTERM and row["ranks"] is None), row
    elif row["fault"] in OUTSIDE:
        # To the launcher, where the others are not there yet.
        assert code == (-signal.SIGKILL if row["whom"] == "launcher" else 1), row
    elif kind in PLANNED:
        # Before the loop listens, a rank dies of it.
        assert code == 3 or (code == 1 and row["first"] is None), row
    else:
        assert code == 1, row


def check_loss(row: dict[str, Any]) -> None:
    """Of a planned stop nothing, else an interval and what a save was behind at most."""
    phase, *_, kind = row["fault"].split(":")
    lost = row["reached"] - row["done"]
    # The next save waits for a writer that hangs.
    behind = EVERY if (phase, kind) == ("write", "hang") else max(IN_FLIGHT, 2 * row["in_flight"])
    assert lost <= EVERY + behind, row
    if row["exit_code"] == 3:
        assert lost == 0, row
        if phase in IN_A_STEP:
            assert row["reached"] - faults.parse(row["fault"]).step <= 1, row
