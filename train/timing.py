"""What a rank does by itself in a step, reading and computing forward, and which rank is slowest.

All ranks leave a step together: who is late shows only in what each does before the others are
needed. Backward passes and updates hold the collectives, so they are not counted. On a GPU the
times are the device's own, read after the step. Every TIMED_STEPS steps the ranks exchange 16 bytes
each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from train.world import World

TIMED_STEPS = 10
LATE_SHARE = 0.1
"""Of a step: who is later than the median by less is not called slow."""
CAUSES = ("data", "compute")


class Timing:
    """Seconds of this rank's own work in the current step."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

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


def compared(own: list[float], world: World, *, step_seconds: float) -> dict[str, Any]:
    """Collective. The longest wait for data of all ranks, and the slowest rank with its cause where
    one is late.
    """
    rows = torch.zeros(world.size, len(CAUSES), dtype=torch.float64)
    rows[world.rank] = torch.tensor(own, dtype=torch.float64)
    return slowest(world.sum(rows), step_seconds=step_seconds)


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
