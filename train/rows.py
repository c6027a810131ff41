"""Reading RUN/metrics.jsonl, without torch: commands that only look at a run start at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_metrics(run: Path) -> list[Row]:
    """Rows of RUN/metrics.jsonl that count: of several rows of one step and kind the last; a torn
    last line is ignored.
    """
    rows: dict[tuple[int, bool], Row] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[(row["step"], "val_loss" in row)] = row
    return [rows[key] for key in sorted(rows)]
