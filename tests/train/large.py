"""Manifests of checkpoints that no machine here could hold: real ones, but for their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.config import ModelConfig, parameter_shapes
from tests.train.checkpoints import inventory
from train import checkpoint
from train.slices import (
    ITEM_BYTES,
    Range,
    chunk_bytes_of,
    file_name,
    num_chunks,
)

KEYS = ("exp_avg", "exp_avg_sq", "param")
HUGE = ModelConfig(
    num_layers=96, hidden_size=12_288, num_heads=96, ffn_size=32_768, vocab_size=50_304
)
"""174 billion parameters."""


def ranges_of(shapes: dict[str, tuple[int, ...]], stage: int, rank: int, size: int) -> list[Range]:
    """What a rank of ZeRO stage 1 or 3 owns: a piece of all, or a piece of each."""
    if stage == 3:
        return list(_of_each(shapes, rank, size))
    return list(_of_all(shapes, rank, size))


def commit(run: Path, shapes: dict[str, tuple[int, ...]], *, stage: int, num_ranks: int) -> Path:
    """Commit a checkpoint whose files are not there; returns its manifest."""
    entries = [entry(ranges_of(shapes, stage, r, num_ranks), r) for r in range(num_ranks)]
    chunk_bytes = chunk_bytes_of(sum(one["bytes"] for one in entries))
    for one in entries:
        one["chunk_bytes"] = chunk_bytes
        one["chunks"] = "0123456789abcdef" * num_chunks(one["bytes"], chunk_bytes)
    folder = checkpoint.begin(run, 1)
    checkpoint.commit(
        folder,
        step=1,
        parameters=inventory(shapes),
        scalars={"step": 1.0},
        state={"step": 1},
        files=entries,
    )
    return folder / "manifest.json"


def huge_shapes() -> dict[str, tuple[int, ...]]:
    """Of `HUGE`."""
    return parameter_shapes(HUGE)


def entry(ranges: list[Range], rank: int) -> dict[str, Any]:
    """Of a file, without its hashes."""
    size = sum(length for *_, length in ranges) * ITEM_BYTES
    return {
        "name": file_name(rank),
        "bytes": 256 + len(KEYS) * size,
        "tensors": {
            key: {"offset": 256 + number * size, "table": 0} for number, key in enumerate(KEYS)
        },
        "tables": [ranges],
    }


def _of_each(shapes: dict[str, tuple[int, ...]], rank: int, size: int) -> Iterator[Range]:
    for name, shape in shapes.items():
        total = math.prod(shape)
        part = -(-total // size)
        if length := max(0, min(total - rank * part, part)):
            yield name, rank * part, length


def _of_all(shapes: dict[str, tuple[int, ...]], rank: int, size: int) -> Iterator[Range]:
    part = -(-sum(map(math.prod, shapes.values())) // size)
    before = 0
    for name, shape in shapes.items():
        total = math.prod(shape)
        low, high = max(rank * part - before, 0), min((rank + 1) * part - before, total)
        if low < high:
            yield name, low, high - low
        before += total
