"""CPU seconds to read the manifest of 174 billion parameters on 1,024 ranks, and to find places in
it: what every rank does before it reads its first byte.

    .venv/bin/python -m tests.benchmarks.manifest_speed
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.bars import Bar, judge
from tests.train.large import commit, huge_shapes
from train.checkpoint import open_checkpoint

NUM_RANKS, ROUNDS = 1024, 3


def main() -> None:
    """Print the figures; exit code 1 names a bar that is missed."""
    bars = []
    for stage in (1, 3):
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
            begun = time.process_time()
            path = commit(Path(name), huge_shapes(), stage=stage, num_ranks=NUM_RANKS)
            made = time.process_time() - begun
            seconds = min(_read(Path(name)) for _ in range(ROUNDS))
            size = path.stat().st_size / 1e6
        print(f"ZeRO-{stage}: {size:.0f} MB, committed in {made:.2f} s, read in {seconds:.2f} s")
        bars.append(Bar(f"CPU seconds to read a manifest of ZeRO-{stage}", seconds, below=2.0))
    sys.exit(judge(bars))


def _read(run: Path) -> float:
    begun = time.process_time()
    saved = open_checkpoint(run)
    saved.reader.tables.check_tiling()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
