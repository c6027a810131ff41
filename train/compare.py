"""In what two checkpoints differ: how they were written, state, config, and every parameter.

Parameters are compared in pieces of 16 MiB; beside those, the last chunk of each file is held for
either side (train/slice_reader.py). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.attempts import attempts
from train.checkpoint import Checkpoint
from train.decode import flat_keys

PIECE = 4 << 20
"""Elements that are compared at a time."""
MISSING = "not there"


@dataclass(frozen=True)
class Difference:
    """A value that is not the same in both."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class ParameterDifference:
    """How far the weights of one parameter lie apart."""

    name: str
    max_abs: float
    """Largest absolute difference; NaN where either side has one."""
    num_different: int
    size: int
    """Elements."""


@dataclass(frozen=True)
class Comparison:
    """Differences of two checkpoints; empty tables where they agree."""

    first: str
    second: str
    manifest: tuple[Difference, ...]
    state: tuple[Difference, ...]
    config: tuple[Difference, ...]
    parameters: tuple[ParameterDifference, ...]
    """Those that differ, the farthest apart first."""
    num_parameters: int
    """Parameters that both have, in the same shape."""

    def to_json(self) -> dict[str, Any]:
        """For programs; a difference that is no number is null, because JSON has no NaN."""
        table = asdict(self)
        for row in table["parameters"]:
            row["max_abs"] = row["max_abs"] if math.isfinite(row["max_abs"]) else None
        return table


def compare(first: Checkpoint, second: Checkpoint) -> Comparison:
    """Read the weights of both and compare everything. CheckpointError when one is damaged."""
    common = [name for name, s in first.parameters.items() if second.parameters.get(name) == s]
    found = [_parameter(first, second, name) for name in common]
    return Comparison(
        first=str(first.folder),
        second=str(second.folder),
        manifest=_differences(_manifest(first), _manifest(second)),
        state=_differences(first.state, second.state),
        config=_differences(_config(first), _config(second)),
        # NaN is farther than anything.
        parameters=tuple(
            sorted(
                (row for row in found if row.num_different),
                key=lambda row: (not math.isnan(row.max_abs), -row.max_abs),
            )
        ),
        num_parameters=len(common),
    )


def _parameter(first: Checkpoint, second: Checkpoint, name: str) -> ParameterDifference:
    size = int(np.prod(first.parameters[name], dtype=np.int64))
    largest, different = 0.0, 0
    for start in range(0, size, PIECE):
        length = min(PIECE, size - start)
        one, two = (saved.reader.read(name, "param", start, length) for saved in (first, second))
        # Bits, so that equal NaNs are equal and 0 is not -0.
        unequal = one.view(np.uint32) != two.view(np.uint32)
        if count := int(np.count_nonzero(unequal)):
            different += count
            with np.errstate(invalid="ignore", over="ignore"):
                apart = np.abs(one[unequal].astype(np.float64) - two[unequal])
            largest = float(np.maximum(largest, apart.max()))
    return ParameterDifference(name, largest, different, size)


def _manifest(saved: Checkpoint) -> dict[str, Any]:
    entries = saved.manifest["files"]
    return {
        "step": saved.step,
        "version": saved.manifest["version"],
        "ranks": len(entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "stored": sorted(saved.keys),
        "scalars": saved.scalars,
        "parameters": {name: list(shape) for name, shape in saved.parameters.items()},
    }


def _config(saved: Checkpoint) -> dict[str, Any]:
    """Of the attempt that has written it; nothing where a copy came without attempts.jsonl."""
    run = saved.folder.parent.parent
    number = saved.state.get("attempt")
    for row in attempts(run):
        if row["attempt"] == number and "config" in row:
            config: dict[str, Any] = row["config"]
            return config
    return {}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Difference, ...]:
    return tuple(_unequal(dict(flat_keys(first)), dict(flat_keys(second))))


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for key in sorted(first.keys() | second.keys()):
        one, two = first.get(key, MISSING), second.get(key, MISSING)
        if one != two:
            yield Difference(key, one, two)
