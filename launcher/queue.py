"""What Slurm says of jobs, asked once for all of them, and one submission at a time.

Whoever only looks at runs hears nothing where there is nobody to ask. Whoever is about to submit
must know what is in the queue already, and is refused then.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.durable import writing
from launcher.template import SlurmError, SlurmUsageError, filename_pattern

TIMEOUT_SECONDS = 5.0
PATIENT_SECONDS = 60.0
"""How long a submission waits for a controller that is busy."""
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
    found: list[QueuedJob] = []
    with suppress(SlurmError):
        found += _ask("--me")
        if unseen := sorted(set(known) - {job.id for job in found}):
            # One question for all: of several numbers squeue leaves out those that it has
            # forgotten; a single one it refuses.
            found += _ask("--states=all", f"--jobs={','.join(unseen)}")
    return found


def waiting_jobs() -> list[QueuedJob]:
    """Jobs of this user that wait or run. SlurmError when Slurm does not tell: without an answer a
    second submission would start everything a second time.
    """
    if shutil.which("sbatch") is None:
        return []  # nothing can be submitted here, and sbatch's absence is told better
    found = _ask("--me", seconds=PATIENT_SECONDS)
    return [job for job in found if job.state != "COMPLETING"]


def refuse_queued(folders: Mapping[str, Path], queued: Sequence[QueuedJob]) -> None:
    """SlurmUsageError for jobs whose logs lie in one of these folders (name -> folder): they write
    what is to be submitted.
    """
    told, numbers = [], []
    for name, folder in folders.items():
        for job in of_folder(folder, queued):
            told.append(f"  {name}: job {job.id} ({job.state}), whose log is {job.output}")
            numbers.append(job.id)
    if told:
        raise SlurmUsageError(
            "jobs in the queue make the same already, from other settings or by a submission that "
            "did not come to its end:\n"
            + "\n".join(told)
            + f"\nlet them end, or cancel them (scancel {' '.join(numbers)}), then submit again"
        )


def of_folder(folder: Path, queued: Iterable[QueuedJob]) -> list[QueuedJob]:
    """Those whose log lies in a folder: `headrace submit` puts it into RUN/logs or OUTPUT.stage."""
    # Slurm shows the name as it was given while a job waits, and in some versions afterwards.
    starts = (f"{folder}/", f"{filename_pattern(folder)}/")
    return [job for job in queued if job.output.startswith(starts)]


@contextmanager
def sole_submission(folder: Path) -> Iterator[None]:
    """SlurmUsageError while another process submits what has its logs in this folder. Where a file
    system keeps no locks nothing is refused; a run still has one owner (train/ownership.py).
    """
    path = folder / "submit.lock"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SlurmUsageError(
            f"another `headrace submit` is at work on {folder}; wait until it has ended, then "
            "submit again"
        ) from None
    except OSError:
        pass  # no locks there
    try:
        yield
    finally:
        os.close(descriptor)


def _ask(*which: str, seconds: float = TIMEOUT_SECONDS) -> list[QueuedJob]:
    """squeue's answer. SlurmError when it gives none."""
    columns = ",".join(f"{field}:|" for field in FIELDS)
    command = ["squeue", "--noheader", f"--Format={columns}", *which]
    try:
        # Bytes: a path in somebody's job need not be UTF-8.
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SlurmError(
            f"squeue does not say which jobs there are ({_why(error)}), and one that makes the "
            "same may be among them; nothing was submitted: try again when `squeue --me` answers"
        ) from None
    rows = [line.split("|")[: len(FIELDS)] for line in os.fsdecode(done.stdout).splitlines()]
    return [
        # squeue tells the file as it was asked for.
        QueuedJob(
            *(number, state, reason, left, _count(restarts), nodes),
            output.replace("%j", number),
        )
        for number, state, reason, left, restarts, nodes, output in (
            map(str.strip, row) for row in rows if len(row) == len(FIELDS)
        )
    ]


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer in {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        return os.fsdecode(error.stderr).strip() or f"it left with {error.returncode}"
    return str(error)


def _count(text: str) -> int:
    return int(text) if text.isdecimal() else 0
