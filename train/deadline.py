"""When the Slurm job of this process ends: asked from Slurm, again and again, because
administrators and `scontrol update` move it.

`squeue` may be out of reach in a container; then what Slurm wrote into the environment at the start
of the job holds. Durations alone are compared, never the clocks of two machines.
"""

from __future__ import annotations

import logging
import re
import subprocess
import threading
import time

ASK_SECONDS = 120.0
TIMEOUT_SECONDS = 20.0
_TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")

log = logging.getLogger(__name__)


def parse_time_left(text: str) -> float | None:
    """Seconds in squeue's [DAYS-][HOURS:]MINUTES:SECONDS, the fewest where a job has several parts;
    None for UNLIMITED, and for no time.
    """
    found = []
    for line in text.splitlines():
        if match := _TIME_LEFT.fullmatch(line.strip()):
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            found.append(float(((days * 24 + hours) * 60 + minutes) * 60 + seconds))
    return min(found, default=None)


def ask_slurm(job: str) -> str:
    """squeue's word for the time that a job has left; empty where there is none to ask."""
    command = ["squeue", "--noheader", "--job", job, "--format", "%L"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("squeue does not answer: %s", error)
        return ""
    return done.stdout


class Deadline:
    """Knows the end of a job, and asks for it every ASK_SECONDS beside the training."""

    def __init__(self, job: str, *, seconds_left: float | None = None) -> None:
        self._job = job
        self._end = None if seconds_left is None else time.monotonic() + seconds_left
        self._thread = threading.Thread(target=self._ask, name="deadline", daemon=True)
        self._thread.start()

    def seconds_left(self) -> float | None:
        """Until the job is ended; None where nobody has said."""
        return None if self._end is None else self._end - time.monotonic()

    def _ask(self) -> None:
        while True:
            asked = time.monotonic()
            answer = ask_slurm(self._job)
            left = parse_time_left(answer)
            if left is not None:
                self._end = asked + left
            elif "UNLIMITED" in answer:
                self._end = None
            time.sleep(ASK_SECONDS)
