"""Reading RUN/metrics.jsonl, without torch: commands that only look at a run start at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from data.durable import read_rows, rows_of
from train.attempts import attempts

Row = dict[str, Any]
TAIL_BYTES = 256 * 1024
"""Some hundred rows."""


class ReplayUsageError(ValueError):
    """A step that cannot be replayed."""

    exit_code: ClassVar[int] = 2


def read_metrics(run: Path) -> list[Row]:
    """Rows of RUN/metrics.jsonl that count: of several rows of one step and kind the last; a torn
    last line is ignored.
    """
    rows: dict[tuple[int, bool], Row] = {}
    for row in read_rows(run / "metrics.jsonl"):
        rows[(row["step"], "val_loss" in row)] = row
    return [rows[key] for key in sorted(rows)]


def last_rows(path: Path, *, num_bytes: int = TAIL_BYTES) -> list[Row]:
    """The rows in the last bytes of a file of JSON lines, as they were written; costs the same
    however long the file is.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - num_bytes, 0))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    # What came before is cut somewhere, and a crash or a writer may be in the last one.
    return rows_of(lines[1 if size > num_bytes else 0 :])


def row_of(run: Path, step: int) -> Row:
    """The row of a step that was trained or skipped."""
    path = run / "metrics.jsonl"
    rows = read_metrics(run) if path.is_file() else []
    found = next((r for r in rows if r["step"] == step and "data_hash" in r), None)
    if found is None:
        last = max((r["step"] for r in rows), default=0)
        raise ReplayUsageError(
            f"{path} has no row of step {step}, so there is nothing to compare with; its last step "
            f"is {last}"
        )
    return found


def start_of(run: Path, row: Row) -> dict[str, Any]:
    """How the attempt was started that has computed a row: its config, its world_size."""
    for start in attempts(run):
        if start["event"] == "start" and start["attempt"] == row["attempt"]:
            return start
    raise ReplayUsageError(
        f"{run / 'attempts.jsonl'} does not tell how attempt {row['attempt']} was started; restore "
        "that file from a copy"
    )


def ranks_of(run: Path, step: int) -> int:
    """On how many ranks a step was computed."""
    return int(start_of(run, row_of(run, step))["world_size"])
