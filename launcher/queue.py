"""What Slurm says of jobs, asked once for all of them; nothing where there is nobody to ask."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

TIMEOUT_SECONDS = 5.0
FIELDS = ("JobID", "State", "Reason", "TimeLeft", "RestartCnt", "NodeList", "STDOUT")


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits, runs, or has ended a moment ago."""

    id: str
    state: str
    reason: str
    """Why it waits; "None" where it does not."""
    time_left: str
    restarts: int
    nodes: str
    output: str
    """The file that its batch script writes to."""


def jobs(known: Iterable[str] = ()) -> list[QueuedJob]:
    """Jobs of this user, and of others those that are known by their number."""
    if shutil.which("squeue") is None:
        return []
    found = _ask("--me")
    unseen = sorted(set(known) - {job.id for job in found})
    # squeue refuses a number that it has forgotten, and tells nothing of the others then.
    return found + [job for number in unseen for job in _ask("--states=all", f"--jobs={number}")]


def _ask(*which: str) -> list[QueuedJob]:
    """squeue's answer; empty when it gives none."""
    columns = ",".join(f"{field}:|" for field in FIELDS)
    command = ["squeue", "--noheader", f"--Format={columns}", *which]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split("|")[: len(FIELDS)] for line in done.stdout.splitlines()]
    return [
        # squeue tells the file as it was asked for.
        QueuedJob(
            *(number, state, reason, left, int(restarts or 0), nodes),
            output.replace("%j", number),
        )
        for number, state, reason, left, restarts, nodes, output in (
            map(str.strip, row) for row in rows if len(row) == len(FIELDS)
        )
    ]
