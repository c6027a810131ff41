"""Planned stops: a request only sets a flag; the loop agrees on it at a step boundary, saves, and
leaves with 3.

    SIGTERM, SIGINT, SIGUSR1   any rank; a second one of the same kind acts at once
    RUN/STOP                   a file that somebody made; the run stands still until it is gone
    RUN/SAVE                   the same without the end: one checkpoint more, and the file is gone
    the end of the Slurm job   as far ahead as a step and a checkpoint take (train/deadline.py)

Files and the job's end are looked at by rank 0 alone, once a second.
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from data.signals import STOP_SIGNALS
from train.deadline import Deadline

STOP_FILE = "STOP"
SAVE_FILE = "SAVE"
LOOK_SECONDS = 1.0


class StopRequest:
    """Remembers what somebody asked this process for."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Who asked for the end of the attempt."""
        self.save = False
        """Whether somebody asked for a checkpoint."""
        self._run: Path | None = None
        self._deadline: Deadline | None = None
        self._looked = -LOOK_SECONDS

    def listen(self) -> None:
        """Replace the handlers of SIGTERM, SIGINT and SIGUSR1; main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def watch(self, run: Path, deadline: Deadline | None) -> None:
        """Look at the run's files and the job's end, too. Rank 0 only."""
        self._run, self._deadline = run, deadline

    def look(self, lead_seconds: float = 0.0) -> None:
        """See whether something else than a signal asks. A stop takes `lead_seconds` at most."""
        now = time.monotonic()
        if self._run is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self.save = _is_there(self._run / SAVE_FILE)
        if self.reason is None and _is_there(self._run / STOP_FILE):
            self.reason = f"the file {self._run / STOP_FILE}"
        if self.reason is None and self._deadline is not None:
            left = self._deadline.seconds_left()
            if left is not None and left < lead_seconds:
                self.reason = f"{left:.0f} s before the end of the Slurm job"

    def saved(self) -> None:
        """The checkpoint that was asked for is on its way."""
        if self.save and self._run is not None:
            with suppress(OSError):
                (self._run / SAVE_FILE).unlink(missing_ok=True)
        self.save = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


def how_to_go_on(run: Path, reason: str) -> str:
    """What continues a run that was saved and stopped for a reason."""
    stop = run / STOP_FILE
    first = f"remove {stop}, and " if _is_there(stop) else ""
    how = " without --stop-at" if reason == "--stop-at" else ""
    return f"{first}the same command{how} goes on from there"


def _is_there(path: Path) -> bool:
    """Whether a file was seen. One look fails now and then where a file server is away for a
    moment, and the next one follows: no run ends of that.
    """
    with suppress(OSError):
        return path.exists()
    return False
