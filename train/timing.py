"""What a rank does by itself in a step, reading and computing forward, and which rank is slowest.

All ranks leave a step together: who is late shows only in what each does before the others are
needed. Backward passes and updates hold the collectives, so they are not counted. On a GPU the
times are the device's own, read after the step. Every TIMED_STEPS steps the ranks exchange 16 bytes
each.

A slow link makes all ranks late alike and names nobody. It shows as a step that takes longer than
the run's steps usually do, though no rank reads or computes longer, and is put down to
communication.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from train.world import World

TIMED_STEPS = 10
LATE_SHARE = 0.1
"""Of a step: who is later than the median by less is not called slow."""
CAUSES = ("data", "compute")
USUAL_STEPS = 5
"""Timed steps before anybody knows what is usual; four times as many are remembered."""
LONG_SHARE = 0.25
"""Of the usual step: communication that takes no longer than so much more is not called slow."""
BACKWARD = 3
"""A step computes about three times its forward passes."""


class Timing:
    """Seconds of this rank's own work in the current step."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._before: deque[tuple[float, float]] = deque(maxlen=4 * USUAL_STEPS)

    @contextmanager
    def measuring(self, cause: str) -> Iterator[None]:
        """Add the time of the block to what the step spends on `cause`."""
        if self._is_cuda and cause == "compute":
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((cause, begin, end))
            return
        begun = time.perf_counter()
        yield
        self._seconds[cause] += time.perf_counter() - begun

    def take(self) -> list[float]:
        """Seconds by cause since the last call; waits for the device."""
        for cause, begin, end in self._events:
            end.synchronize()
            self._seconds[cause] += begin.elapsed_time(end) / 1000
        found = [self._seconds[cause] for cause in CAUSES]
        self._events.clear()
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        return found

    def compared(self, own: list[float], world: World, *, step_seconds: float) -> dict[str, Any]:
        """Collective. Fields of a metrics row: the longest wait for data of all ranks, and the
        slowest rank with its cause where one is late, or communication where nobody is.
        """
        rows = torch.zeros(world.size, len(CAUSES), dtype=torch.float64)
        rows[world.rank] = torch.tensor(own, dtype=torch.float64)
        seconds_RC = world.sum(rows)
        found = slowest(seconds_RC, step_seconds=step_seconds)
        longest = seconds_RC.max(dim=0).values
        here = (step_seconds, float(longest[0] + BACKWARD * longest[1]))
        if "slowest_rank" not in found:
            found |= communication(here, list(self._before))
        self._before.append(here)
        return found


def slowest(seconds_RC: torch.Tensor, *, step_seconds: float) -> dict[str, Any]:
    """Fields of a metrics row, from the seconds of all ranks by cause [R,C]."""
    found: dict[str, Any] = {"data_seconds": float(seconds_RC[:, 0].max())}
    # The lower one: of two ranks the faster is what the other should be like.
    late_RC = seconds_RC - seconds_RC.median(dim=0).values
    total_R = late_RC.sum(dim=1)
    rank = int(total_R.argmax())
    if float(total_R[rank]) > LATE_SHARE * step_seconds:
        found["slowest_rank"] = rank
        found["slowest_cause"] = CAUSES[int(late_RC[rank].argmax())]
        found["slowest_seconds"] = float(total_R[rank])
    return found


def communication(
    here: tuple[float, float], before: list[tuple[float, float]]
) -> dict[str, str | float]:
    """Fields of a metrics row that has taken longer than usual, with no rank to blame.

    Each pair is (seconds of a step, what of them the slowest rank read and computed), this step's
    and those of earlier ones.
    """
    if len(before) < USUAL_STEPS:
        return {}
    step, own = (statistics.median(column) for column in zip(*before, strict=True))
    longer = here[0] - step - max(0.0, here[1] - own)
    if longer <= LONG_SHARE * step:
        return {}
    return {"slowest_cause": "communication", "slowest_seconds": longer}
