"""RUN/events.jsonl: what happened to a run besides its steps: starts, skips, rollbacks,
alarms.

Rows are only appended, and are on the disk before the call returns; the file is there from the
first event on. One writer (rank 0). No torch here.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

from data.durable import RowFile, read_rows

FILE = "events.jsonl"
STARTED = "started"
"""The first step of an attempt is done: with the seconds of each part of its start."""
SKIP = "skip"
"""The guard left a step out: with its loss and gradient norm, which its row does not have."""
GIVE_UP = "give up"
"""The guard ended the run at a step, which has no row: with the same numbers."""


def record(run: Path, event: str, **fields: Any) -> None:
    """Append one event; a number that is none becomes null. StorageError when it cannot be kept."""
    row = {"time": time.time(), "event": event, **fields}
    with contextlib.closing(RowFile(run / FILE)) as rows:
        rows.append({key: None if _is_no_number(value) else value for key, value in row.items()})
        rows.sync()


def read_events(run: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind, oldest first; a line that a crash has torn is left out."""
    return [row for row in read_rows(run / FILE) if row.get("event") == event]


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
