"""attempts.jsonl: a row when an attempt of a run starts, and a row when it ends, with its outcome.

Rows are only appended and reach the disk before the call returns. Training writes them; the
launcher reads the outcome, and closes the row of ranks that could not. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from data.durable import RowFile
from train.config import JobConfig

Outcome = Literal["complete", "stopped", "failed"]
FILE = "attempts.jsonl"


def attempts(run: Path) -> list[dict[str, Any]]:
    """Rows of attempts.jsonl."""
    path = run / FILE
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        # A crash of the machine can tear the last line; the rows before it still count.
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def begin_attempt(
    run: Path,
    number: int,
    *,
    world_size: int,
    resumed_from: int | None,
    config: JobConfig,
    slurm_job: str | None = None,
) -> None:
    """Record that an attempt (train/ownership.py gives its number) starts. One rank only.

    `resumed_from` is the newest step whose files are there; should those turn out damaged, the
    first row of metrics.jsonl says from where the run went on.
    """
    _append(
        run,
        {
            "attempt": number,
            "event": "start",
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": slurm_job,
            "world_size": world_size,
            "resumed_from": resumed_from,
            "config": config.model_dump(mode="json"),
        },
    )


def end_attempt(
    run: Path, number: int, *, outcome: Outcome, step: int | None, reason: str = ""
) -> None:
    """Record how an attempt ended; the launcher turns the outcome into its exit code. One process
    only.
    """
    _append(
        run,
        {
            "attempt": number,
            "event": "end",
            "time": time.time(),
            "outcome": outcome,
            "step": step,
            "reason": reason,
        },
    )


def _append(run: Path, row: dict[str, Any]) -> None:
    with contextlib.closing(RowFile(run / FILE)) as rows:
        rows.append(row)
        rows.sync()
