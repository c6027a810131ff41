"""The manifest of 174 billion parameters on 1,024 ranks: read into columns, never into objects. How
long that takes is a benchmark's (tests/benchmarks/manifest_speed.py).
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest

from tests.train.large import commit, huge_shapes
from train.checkpoint import open_checkpoint

NUM_RANKS = 1024


@pytest.mark.parametrize(("stage", "megabytes"), [(1, 20), (3, 60)])
def test_a_thousand_ranks_cost_a_few_objects_each(
    tmp_path: Path, stage: int, megabytes: int
) -> None:
    shapes = huge_shapes()
    path = commit(tmp_path, shapes, stage=stage, num_ranks=NUM_RANKS)
    assert path.stat().st_size < megabytes * 10**6
    gc.collect()
    before = len(gc.get_objects())
    saved = open_checkpoint(tmp_path)
    reader = saved.reader
    gc.collect()
    # A range that was an object would be 870,000 of them at stage 3.
    assert len(gc.get_objects()) - before < 20 * NUM_RANKS
    assert saved.parameters == shapes
    rows = sum(len(table) for entry in saved.manifest["files"] for table in entry["tables"])
    assert rows > (500_000 if stage == 3 else NUM_RANKS)
    assert all(reader.has(name, "exp_avg") for name in shapes)
    # Every element is found, although no file is there.
    name = "blocks.95.ffn.down.weight"
    size = math.prod(shapes[name])
    found = list(reader.tables.pieces(name, "exp_avg_sq", 0, size))
    assert sum(piece.length for piece in found) == size
    assert len(found) == (NUM_RANKS if stage == 3 else 3)
