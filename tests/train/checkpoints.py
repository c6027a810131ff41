"""Checkpoints of no model, written by the real code without torch: two parameters, one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train import checkpoint
from train.inventory import Inventory, Parameter
from train.slices import write_slices

SHAPES = {"a": (6, 5), "b": (7,)}
KEYS = ("param", "exp_avg")


def inventory(shapes: Mapping[str, Sequence[int]] = SHAPES) -> Inventory:
    """Of a model with parameters of these shapes, all of them in one group."""
    return {
        name: Parameter(shape=list(shape), dtype="fp32", trainable=True, group=0)
        for name, shape in shapes.items()
    }


def values(step: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """What `write` stores, as "param/a" and so on."""
    generator = np.random.default_rng([seed, step])
    return {
        f"{key}/{name}": generator.standard_normal(int(np.prod(shape)), dtype=np.float32)
        for key in KEYS
        for name, shape in SHAPES.items()
    }


def pieces(
    stored: dict[str, np.ndarray], rank: int, num_ranks: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[tuple[str, int, int]]]]:
    """Arrays and ranges of a rank: every parameter is cut evenly over the ranks."""
    ranges = []
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        first, last = size * rank // num_ranks, size * (rank + 1) // num_ranks
        ranges.append((name, first, last - first))
    arrays = {
        key: [
            np.concatenate(
                [stored[f"{key}/{n}"][first : first + count] for n, first, count in ranges]
            )
        ]
        for key in KEYS
    }
    return arrays, {key: ranges for key in arrays}


def write(
    run: Path, step: int, *, num_ranks: int = 2, seed: int = 0, state: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Commit a checkpoint; returns what was stored."""
    stored = values(step, seed=seed)
    folder = checkpoint.begin(run, step)
    files = [
        write_slices(folder, rank, *pieces(stored, rank, num_ranks)) for rank in range(num_ranks)
    ]
    checkpoint.commit(
        folder,
        step=step,
        parameters=inventory(),
        scalars={"step": float(step)},
        state={"step": step} if state is None else state,
        files=files,
    )
    return stored
