"""attempts.jsonl: a row when an attempt of a run starts, and a row when it ends, with its outcome.

Rows are only appended and reach the disk before the call returns. Training writes them; the
launcher reads the outcome, and adds the row of ranks that could not, or only heard that another was
gone: of two ends of an attempt the last one counts. No torch here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.durable import RowFile, read_rows
from train.code import digest, sources

if TYPE_CHECKING:
    from train.config import JobConfig

Outcome = Literal["complete", "stopped", "failed"]
FILE = "attempts.jsonl"
HEARSAY = "another rank was gone"
"""How the reason begins of a rank that ended because another had."""
PACKAGES = ("headrace", "torch", "deepspeed", "numpy")


def attempts(run: Path) -> list[dict[str, Any]]:
    """Rows of attempts.jsonl."""
    return read_rows(run / FILE)


def is_complete(run: Path, steps: int) -> bool:
    """Whether an attempt has come to the end of a run of so many steps, its last validation too."""
    return any(
        row.get("outcome") == "complete" and (row["step"] or 0) >= steps for row in attempts(run)
    )


def begin_attempt(
    run: Path,
    number: int,
    *,
    world_size: int,
    resumed_from: int | None,
    config: JobConfig,
    machine: Mapping[str, str | int],
    slurm_job: str | None = None,
) -> list[str]:
    """Record that an attempt (train/ownership.py gives its number) starts. One rank only.

    `resumed_from` is the newest step whose files are there; should those turn out damaged, the
    first row of metrics.jsonl says from where the run went on. Returns what differs from the
    attempt before, key by key, which is recorded, too. `machine` is what the bits of the numbers
    depend on besides: the device, and on a CPU its threads.
    """
    made = {
        "world_size": world_size,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "machine": dict(machine),
    }
    before = next((row for row in reversed(attempts(run)) if row["event"] == "start"), None)
    changed = [] if before is None else changes(before, made)
    _append(
        run,
        {
            "attempt": number,
            "event": "start",
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": slurm_job,
            "resumed_from": resumed_from,
            "changed": changed,
            **made,
        },
    )
    return changed


def versions() -> dict[str, str]:
    """Of what the numbers of a run depend on, and the hash of our own code: on one node, or since
    the attempt before, a checkout may have been edited.
    """
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {**found, "headrace's code": digest(sources())}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`KEY: OLD -> NEW` for what differs between two attempts: world size, config, versions, and
    machine.
    """
    from train.decode import flat_keys

    then, now = (
        {
            "world_size": row["world_size"],
            **dict(flat_keys(row["config"])),
            **row.get("versions", {}),
            **row.get("machine", {}),
        }
        for row in (before, after)
    )
    # What the earlier attempt did not know of has not changed since.
    return [f"{k}: {then[k]!r} -> {now.get(k)!r}" for k in then if then[k] != now.get(k)]


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
