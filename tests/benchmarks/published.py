"""The plan's time of a step against runs that others have published, and against our own H200.

    python -m tests.benchmarks.published [--write]      arithmetic, no GPU; a second

Some rates of launcher/step_time.py were fitted to the runs marked "fitted"; all others are only
predicted. Two kinds of runs are kept apart:

    step     data parallel alone (FSDP, ZeRO): the whole step is predicted, communication included
    compute  tensor and pipeline parallelism, which we have not, or a layout that was not published:
             only the computation of one GPU is predicted, so that what was published should be less

GPT models have a feed-forward layer of two matrices of 4 D; ours is given the same products, three
matrices of 8/3 D. Published TFLOP/s that count recomputed activations are predicted so, too.
Figures of papers were read in transcriptions of their tables, not in the PDFs.
--write puts the rows into docs/evidence/published_runs.json and the README's table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.published_runs import RUNS

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "published_runs.json"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and largest error of each group."""
    groups = {
        "fitted": [row for row in rows if row["fitted"]],
        "step, only predicted": [r for r in rows if r["kind"] == "step" and not r["fitted"]],
        "compute, only predicted": [r for r in rows if r["kind"] == "compute"],
    }
    return {
        name: {
            "runs": len(found),
            "median_error": round(median(row["error"] for row in found), 3),
            "median_absolute_error": round(median(abs(row["error"]) for row in found), 3),
            "smallest_error": min(row["error"] for row in found),
            "largest_error": max(row["error"] for row in found),
        }
        for name, found in groups.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="also write evidence and README")
    options = parser.parse_args()
    rows = [run.row() for run in RUNS]
    for row in sorted(rows, key=lambda row: (row["kind"], not row["fitted"])):
        mark = f"fitted: {row['fitted']}" if row["fitted"] else row["note"]
        print(
            f"{row['kind']:8}{row['name']:58}{row['gpus']:16}{row['published']:>10,.1f}"
            f"{row['predicted']:>10,.1f}{row['published_mfu']:>7.1%}"
            f"{row['predicted_mfu']:>7.1%}{row['error']:>+8.1%}  {row['unit']}; {row['source']}"
            f"{f'; {mark}' if mark else ''}"
        )
    for name, found in summary(rows).items():
        print(name, found)
    if options.write:
        from tests.benchmarks import evidence

        recorder = evidence.Recorder()
        recorder.commands.append("python -m tests.benchmarks.published --write")
        recorder.write("published_runs", {"summary": summary(rows), "runs": rows})
        evidence.rewrite(evidence.TABLE, evidence.table())


if __name__ == "__main__":
    main()
