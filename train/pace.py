"""When a checkpoint is due: every so many steps, or as often as train/interval.py finds best."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Literal

from train.attempts import attempts
from train.interval import (
    FIRST_SAVE_SECONDS,
    RESTART_SECONDS,
    Costs,
    Interval,
    between_failures,
    choose,
)
from train.saver import SaveCost
from train.world import World

MEASURED_STEPS = 3
"""Steps of an attempt after which it knows how long one takes."""
LEAD_SECONDS = 30.0
"""Kept between the expected end of a planned stop and the last moment for it."""

log = logging.getLogger(__name__)


class Pace:
    """Counts steps and seconds since the last checkpoint."""

    def __init__(
        self, every: int | Literal["auto"], world: World, run: Path, *, first_step: int
    ) -> None:
        self._every = every
        self._world = world
        # Once: they change when an attempt begins, and a read may fail.
        self._attempts = attempts(run) if every == "auto" and world.is_main else []
        self._first_step = first_step
        self.last_step = first_step - 1
        """The step of the last checkpoint."""
        self._last_time = time.monotonic()
        self._longest = 0.0
        self._saved: SaveCost | None = None
        self._interval: Interval | None = None

    @property
    def lead_seconds(self) -> float:
        """How long before the end of the job a stop must begin: a step, and a checkpoint twice as
        slow as the last.
        """
        lag = self._saved.lag_seconds if self._saved else FIRST_SAVE_SECONDS
        return 2 * (self._longest + lag) + LEAD_SECONDS

    def measured(self, step_seconds: float, saved: SaveCost | None) -> None:
        """What the last step and the last save have cost this rank."""
        self._longest = max(self._longest, step_seconds)
        self._saved = saved

    def is_due(self, step: int) -> bool:
        """Collective. Whether a checkpoint of this step is."""
        if self._every != "auto":
            return self._every > 0 and step % self._every == 0
        if self._interval is None and step - self._first_step + 1 >= MEASURED_STEPS:
            self._choose(step)
        return self._interval is not None and step - self.last_step >= self._interval.steps

    def begun(self, step: int) -> None:
        """Collective. A checkpoint of this step is on its way."""
        if self._every == "auto":
            self._choose(step)
        self.last_step, self._last_time = step, time.monotonic()

    def went_back(self, step: int) -> None:
        """The run goes on from the checkpoint of an earlier step."""
        self.last_step, self._last_time = step, time.monotonic()

    def _choose(self, step: int) -> None:
        steps, seconds = step - self.last_step, time.monotonic() - self._last_time
        if not steps:
            return
        before, self._interval = self._interval, self._world.broadcast(self._best(seconds / steps))
        if self._interval is not None and (before is None or before.steps != self._interval.steps):
            log.info("%s", self._interval)

    def _best(self, step_seconds: float) -> Interval | None:
        if not self._world.is_main:
            return None
        saved = self._saved
        costs = Costs(
            stall=saved.stall_seconds if saved else FIRST_SAVE_SECONDS,
            lag=saved.lag_seconds if saved else FIRST_SAVE_SECONDS,
            restart=RESTART_SECONDS,
            between_failures=between_failures(
                self._attempts, num_devices=self._world.size, now=time.time()
            ),
        )
        return choose(costs, step_seconds, is_first=saved is None)
