"""Planned stops: a signal only sets a flag; the loop agrees on it at a step boundary, saves, and
leaves with 3.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that somebody asked this process to stop; a second signal of the same kind acts at
    once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def listen(self) -> None:
        """Replace the handlers of SIGTERM, SIGINT and SIGUSR1; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
