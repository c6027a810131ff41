"""How runs are doing, from their directories alone and from Slurm, where there is one.

Nothing is written, no rank is asked, and of metrics.jsonl only the end is read, so that the answer
takes the same 0.3 s on a login node whatever the size of the run. No torch or numpy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

from launcher.queue import QueuedJob, of_folder
from train.attempts import attempts
from train.events import FILE as EVENTS
from train.events import STARTED
from train.ownership import FOLDER, life_of
from train.rows import Row, last_rows
from train.stop import STOP_FILE

State = Literal[
    "not started", "running", "gone", "complete", "stopped", "failed", "unreadable", "no run"
]
RECENT = 20
"""Steps whose median tells the speed."""
MAX_EVENTS = 3


class StatusError(ValueError):
    """A folder that is no run."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Status:
    """What can be said of a run; None where nobody has told. Ages and durations in seconds."""

    run: str
    state: State
    """Of the last attempt; one that is gone has told no end, and its process is no longer there.
    Files that hold something else are unreadable; among several, a folder may be no run.
    """
    attempt: int | None = None
    ranks: int | None = None
    owner: str = ""
    """Process, host and job of the last attempt."""
    beat_age: float | None = None
    reason: str = ""
    """Why the last attempt ended."""
    verdict: str = ""
    """Which rank stood still, where the attempt could not tell more."""
    step: int | None = None
    steps: int | None = None
    """Of the whole run."""
    loss: float | None = None
    val_loss: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    """Median of the last steps."""
    mfu: float | None = None
    eta_seconds: float | None = None
    row_age: float | None = None
    """Since the last row of metrics.jsonl."""
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    num_checkpoints: int = 0
    is_held: bool = False
    """Whether RUN/STOP keeps it from going on."""
    down_seconds: float | None = None
    """Between the last sign of the attempt before and the start of the last one."""
    start_seconds: Mapping[str, float] = field(default_factory=dict)
    """What the parts of the last attempt's start took, where it came to its first step."""
    events: Sequence[Mapping[str, Any]] = ()
    """The last ones, oldest first, with their `age`."""
    job: QueuedJob | None = None


def job_of(run: Path) -> str | None:
    """The Slurm job of the last attempt."""
    try:
        starts = [row for row in attempts(run) if row.get("event") == "start"]
    except OSError:
        return None
    number = starts[-1].get("slurm_job") if starts else None
    return number if isinstance(number, str) and number.isdecimal() else None


def statuses(runs: Sequence[Path], jobs: Sequence[QueuedJob] = ()) -> list[Status]:
    """The state of each run. StatusError when the only one is none."""
    found = []
    for run in runs:
        try:
            found.append(status_of(run, jobs))
        except StatusError as error:
            if len(runs) == 1:
                raise
            found.append(Status(str(run), "no run", reason=str(error)))
    return found


def status_of(run: Path, jobs: Iterable[QueuedJob] = ()) -> Status:
    """The state of a run. StatusError when the folder is none."""
    try:
        return _read(run, jobs)
    except StatusError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        # Half written, edited or of another program: the other runs are to be told all the same.
        said = f"its files do not hold what a run writes ({type(error).__name__}: {error})"
        return Status(str(run), "unreadable", reason=said)


def _read(run: Path, jobs: Iterable[QueuedJob]) -> Status:
    if (run / "headrace.json").exists():  # and its own config.json
        raise StatusError(f"{run} is an exported model, and no run; name the run it came from")
    names = ("config.json", "attempts.jsonl", "checkpoints", "logs")
    if not any((run / name).exists() for name in names):
        raise StatusError(
            f"{run} is no run directory: it has neither config.json nor logs; name the folder that "
            "--run named in training"
        )
    rows, events = attempts(run), last_rows(run / EVENTS)
    starts = [row for row in rows if row.get("event") == "start"]
    known: dict[str, Any] = {
        **_checkpoints(run),
        "is_held": (run / STOP_FILE).exists(),
        "events": _recent(events),
        "job": _job(run, starts[-1].get("slurm_job") if starts else None, jobs),
    }
    if not starts:
        return Status(str(run), "not started", **known)
    last = starts[-1]
    ends = [row for row in rows if row.get("event") == "end"]
    end = next((row for row in reversed(ends) if row["attempt"] == last["attempt"]), None)
    life = life_of(run, last["attempt"])
    state: State = end["outcome"] if end else "running" if life.is_alive else "gone"
    steps = last["config"].get("steps") or None
    told = [row["seconds"] for row in events if _is_start(row, last["attempt"])]
    return Status(
        str(run),
        state,
        attempt=last["attempt"],
        ranks=last["world_size"],
        owner=life.owner,
        beat_age=None if end else life.beat_seconds,
        reason=end["reason"] if end else "",
        verdict="" if end else _verdict(run, last["attempt"]),
        steps=steps,
        down_seconds=_down(rows, last),
        start_seconds=told[-1] if told else {},
        **_progress(run, steps, is_running=state == "running"),
        **known,
    )


def _progress(run: Path, steps: int | None, *, is_running: bool) -> dict[str, Any]:
    """Where the run is and how fast, by its last rows."""
    path = run / "metrics.jsonl"
    rows = last_rows(path)
    taken = [row for row in rows if "data_hash" in row]
    if not taken:
        return {}
    trained = [row for row in taken if "loss" in row]
    found: dict[str, Any] = {
        "step": taken[-1]["step"],
        "tokens": taken[-1].get("tokens"),
        "row_age": max(time.time() - path.stat().st_mtime, 0.0),
        "val_loss": next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None),
    }
    if trained:
        recent = [row for row in trained if row["attempt"] == trained[-1]["attempt"]][-RECENT:]
        found["loss"] = trained[-1]["loss"]
        found["tokens_per_second"] = median(row["tokens_per_second"] for row in recent)
        # Of the same steps: read beside the speed, it must not tell of another one.
        shares = [row["mfu"] for row in recent if row.get("mfu")]
        found["mfu"] = median(shares) if shares else None
        if is_running:
            seconds = median(row["step_seconds"] for row in recent)
            left = None if steps is None else (steps - found["step"]) * seconds
            found["eta_seconds"] = trained[-1].get("eta_seconds") if left is None else left
    return found


def _checkpoints(run: Path) -> dict[str, Any]:
    """Like train/checkpoint.py's `committed`, which takes numpy; when, by the storage's clock."""
    committed = (run / "checkpoints").glob("step-*/manifest.json")
    # Without copies that somebody has put beside them.
    found = sorted(p for p in committed if p.parent.name.removeprefix("step-").isdecimal())
    if not found:
        return {}
    return {
        "checkpoint_step": int(found[-1].parent.name.removeprefix("step-")),
        "checkpoint_age": max(time.time() - found[-1].stat().st_mtime, 0.0),
        "num_checkpoints": len(found),
    }


def _recent(events: Sequence[Row]) -> list[Row]:
    rows = [row for row in events if row.get("event") != STARTED and "time" in row]
    return [{**row, "age": max(time.time() - row["time"], 0.0)} for row in rows[-MAX_EVENTS:]]


def _is_start(row: Row, attempt: int) -> bool:
    return row.get("event") == STARTED and row.get("attempt") == attempt


def _down(rows: Sequence[Row], start: Row) -> float | None:
    """How long nobody trained before this attempt. One that told no end was last seen nobody knows
    when.
    """
    told = (row for row in reversed(rows) if "attempt" in row)
    before = next((row for row in told if row["attempt"] < start["attempt"]), None)
    if before is None or before["event"] != "end":
        return None
    return max(float(start["time"]) - float(before["time"]), 0.0)


def _verdict(run: Path, attempt: int) -> str:
    try:
        report = json.loads((run / FOLDER / f"{attempt:06d}.stall.json").read_bytes())
        return str(report["verdict"])
    except (OSError, ValueError, KeyError):
        return ""


def _job(run: Path, number: str | None, jobs: Iterable[QueuedJob]) -> QueuedJob | None:
    """The run's job in the queue: by its log, which `headrace submit` puts into RUN/logs, even
    before its first attempt; else by its number. Of several the newest.
    """
    known = list(jobs)
    own = of_folder((run / "logs").resolve(), known)
    found = [job for job in known if job in own or job.id == number]
    # squeue lists by priority, and one that is known by its number comes last.
    return max(found, key=lambda job: int(job.id), default=None)
