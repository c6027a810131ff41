"""Committed checkpoints go to the mirror beside the training.

One thread of rank 0 copies them. One copy is in flight at most; of what is committed meanwhile the
newest is next. Training waits for a copy only at its very end. A failure is told and ends nothing:
the next commit is tried again. No torch here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from train.mirror import Mirror
from train.retention import Retention

log = logging.getLogger(__name__)

GIVE_UP_SECONDS = 10.0
"""How long a copy that is given up may take to end: a place that hangs must not keep a save."""


@dataclass(frozen=True)
class Copied:
    """What has become of a copy."""

    step: int
    seconds: float
    problem: str
    """Why it is not there; empty when it is."""


class MirrorThread:
    """Copies what is offered, in the background."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._next: tuple[int, Retention] | None = None
        self._changed = threading.Condition()
        self._is_closed = False
        self.in_flight: int | None = None
        """The step that is copied now; it stays in the run while there is room."""
        self._begun = time.monotonic()
        self.results: deque[Copied] = deque()
        """Oldest first; whoever reads them takes them away."""
        # A daemon: a rank that fails does not wait for a copy.
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def offer(self, step: int, rule: Retention) -> int:
        """Copy this step, as soon as the copy in flight has ended, and let those go that the rule
        does not keep then. Returns the step in flight.
        """
        with self._changed:
            self._next = step, rule
            self.in_flight = step if self.in_flight is None else self.in_flight
            self._changed.notify()
            return self.in_flight

    def give_up(self, steps: Collection[int]) -> None:
        """Have the copy in flight fail if it is of one of these steps, which the run is about to
        remove. Waits until the mirror has taken the last piece, but no longer than GIVE_UP_SECONDS.
        """
        with self._changed:
            step = self.in_flight
            if step in steps:
                self._mirror.is_given_up = True
                self._changed.wait_for(lambda: self.in_flight != step, GIVE_UP_SECONDS)

    def end(self) -> None:
        """Nothing more will be offered; `is_busy` until what was is copied, or has failed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    @property
    def is_busy(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    @property
    def location(self) -> str:
        """What messages call the mirror."""
        return self._mirror.location

    @property
    def went_on(self) -> float:
        """When the mirror took something last, or a copy began; by time.monotonic()."""
        return max(self._mirror.went_on, self._begun)

    @property
    def silent(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.went_on

    def _work(self) -> None:
        while True:
            with self._changed:
                self.in_flight = self._next and self._next[0]
                self._mirror.is_given_up = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._next is not None or self._is_closed)
                if self._next is None:
                    return
                (step, rule), self._next = self._next, None
                self.in_flight = step
            self._begun, problem = time.monotonic(), ""
            try:
                self._mirror.copy_out(step)
                self._mirror.prune(rule, newest=step)
            # What a library of a place raises is not known; nothing here may end the training.
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                log.error(
                    "the checkpoint of step %d is not in the mirror %s, the next one will be tried "
                    "again: %s",
                    step,
                    self._mirror.location,
                    problem,
                )
            self.results.append(Copied(step, time.monotonic() - self._begun, problem))
