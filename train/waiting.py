"""Slow work of some ranks, for which all wait: what is slow is none that stands still.

A rank that works is at its place since its work last went on; one that waits for others comes there
anew as long as they answer. So the watch (train/watch.py) ends a wait that is in vain, however
short its patience, and no collective is kept open for longer than a poll.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from train.progress import at
from train.world import World

POLL_SECONDS = 0.1


def wait_for_all(
    world: World,
    is_busy: Callable[[], bool],
    *,
    place: str,
    step: int = 0,
    progress: Callable[[], float],
    leave: Callable[[], bool] = lambda: False,
) -> bool:
    """Collective. Until no rank is busy; main thread only. False when a rank asked to `leave`
    before.

    `progress` changes whenever the work of this rank goes on. `leave` may differ between ranks: one
    that asks is enough, and all return at once.
    """
    seen: float | None = None
    begun = time.monotonic()
    while True:
        busy = is_busy()
        if not busy:
            at("peers", step)
        elif progress() != seen:
            seen = progress()
            at(place, step)
        num_busy, num_leaving = world.sum(torch.tensor([int(busy), int(leave())])).tolist()
        if num_leaving or not num_busy:
            return not num_leaving
        # Work that takes a moment is waited for no longer than that.
        time.sleep(min(POLL_SECONDS, (time.monotonic() - begun) / 50))
