"""Stages as tables of jobs, each of which leaves one file that says it is done.

A preparation runs every stage with its own pool; a task i/N does the jobs i, i+N, i+2N ... of one
stage, in any number of processes on any number of machines that share the output. What a job does
and writes depends on neither. A job that is done is not done again, and two processes never do the
same one. Cost: one look at the file of each job of the stages before.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from data.config import DataUsageError
from data.documents import InputFile, Part
from data.durable import writing
from data.pool import Pool, Progress
from data.stamps import steadily

MAX_JOBS = 4096
"""Of a stage that goes over the input: larger input makes larger jobs, so that the number of files
stays what a shared file system takes."""
_SHOWN = 5
_TASK = re.compile(r"(\d+)/(\d+)")
_LOCK = "jobs.lock"
_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """One piece of a stage; its results go into `folder`."""

    folder: Path
    number: int
    num_bytes: int
    """How much of the stage it is, for the progress that people see."""

    @property
    def result(self) -> Path:
        """The file that is written last."""
        return self.folder / f"{self.number:06d}.json"

    def is_done(self) -> bool:
        """Whether the result is there, whoever wrote it."""
        return self.result.exists()

    def run(self) -> None:
        """Do the work and write the result."""
        raise NotImplementedError

    def sources(self) -> set[InputFile]:
        """The files of the input that it reads."""
        return set()


def files_of(parts: Iterable[Part]) -> set[InputFile]:
    """The files that parts are of."""
    return {extent.file for part in parts for extent in part}


def do(job: Job) -> None:
    """Do a job that is not done, unless another process is at it: DataUsageError."""
    with alone(job):
        if not job.is_done():
            steadily(job.run)


@contextmanager
def alone(job: Job) -> Iterator[None]:
    """Keep other processes from a job. Some network file systems know no such locks."""
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(job.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # A worker outlives its killed parent for a moment.
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _lock(handle, job.number):
            if time.monotonic() > deadline:
                raise DataUsageError(
                    f"another process is writing {job.result}; wait until it has finished, then "
                    "run the same command again"
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, number: int) -> bool:
    """Lock the byte with a job's number; a process that dies lets go of it."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


Report = Callable[[int], None]
"""Called with the bytes of each piece that is done."""


def in_pool(work: Any, jobs: Sequence[Job], pool: Pool, report: Report) -> None:
    """Do jobs in any order."""
    for job, _ in zip(jobs, pool.map(do, jobs), strict=True):
        report(job.num_bytes)


def here(work: Any, jobs: Sequence[Job], pool: Pool, report: Report) -> None:
    """Do jobs in this process."""
    for job in jobs:
        do(job)
        report(job.num_bytes)


Work = TypeVar("Work")


@dataclass(frozen=True)
class Stage(Generic[Work]):
    """A step of the preparation, over all of its input."""

    name: str
    jobs: Callable[[Work], Sequence[Job]]
    """In a fixed order; may read what the stages before have left."""
    run: Callable[[Work, Sequence[Any], Pool, Report], None] = in_pool
    """Does the jobs that it is given."""


@dataclass(frozen=True)
class Task:
    """One share of a stage: `number` of `count`, from 0."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Task:
        """From "3/64". Raises DataUsageError for anything else."""
        match = _TASK.fullmatch(text)
        if match is None or int(match[1]) >= int(match[2]):
            raise DataUsageError(
                f"--task {text}: tasks are numbered from 0, as SLURM_ARRAY_TASK_ID: "
                "0/64, 1/64 ... 63/64"
            )
        return cls(int(match[1]), int(match[2]))


WHOLE = Task(0, 1)


def run_stage(
    stage: Stage[Work], work: Work, pool: Pool, progress: Progress, task: Task = WHOLE
) -> None:
    """Do the jobs of a task that are not done."""
    jobs = stage.jobs(work)[task.number :: task.count]
    todo = [job for job in jobs if not job.is_done()]
    total = sum(job.num_bytes for job in jobs)
    done = total - sum(job.num_bytes for job in todo)

    def report(num_bytes: int) -> None:
        nonlocal done
        done = min(total, done + num_bytes)
        progress(stage.name, done, total)

    if todo:
        report(0)
    stage.run(work, todo, pool, report)


def check_complete(
    stages: Sequence[Stage[Work]], work: Work, task: Task, command: Callable[[str, str], str]
) -> None:
    """Refuse when a stage has jobs that are not done; `command` writes the call for a task."""
    for stage in stages:
        jobs = stage.jobs(work)
        missing = [number for number, job in enumerate(jobs) if not job.is_done()]
        if not missing:
            continue
        count = min(task.count, len(jobs)) if len(jobs) == 1 else task.count
        tasks = sorted({number % count for number in missing})
        listed = ", ".join(f"{number}/{count}" for number in tasks[:_SHOWN])
        more = f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else ""
        first = command(stage.name, f"{tasks[0]}/{count}")
        raise DataUsageError(
            f"stage {stage.name} is not complete: {len(missing)} of its {len(jobs)} jobs are not "
            f"done, those of tasks {listed}{more}; run: {first}"
        )


def key_of(*parts: Any) -> str:
    """A short name for everything that results depend on."""
    content = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
