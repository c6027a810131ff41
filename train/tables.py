"""Range tables: which elements of which parameter lie where, for all files of a checkpoint at once.

A table is what one tensor of a file holds, in order: (parameter, first element, number of elements)
row by row. In a manifest a parameter is its place among the sorted names, and a table is one flat
list of whole numbers: 1,024 ranks of ZeRO-3 write a million rows for 175 billion parameters, which
are columns of numpy here and never objects. No torch here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.slices import ITEM_BYTES, CheckpointError, Range

Columns = NDArray[np.int64]
LIMIT = 2**62
"""Of every number: sums of two still fit."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a parameter, at a byte of a file."""

    start: int
    length: int
    file: int
    offset: int


def flat_table(table: Sequence[Range], numbers: Mapping[str, int]) -> list[int]:
    """A table as a manifest holds it."""
    return [value for name, *rest in table for value in (numbers[name], *rest)]


def columns(table: Any) -> Columns:
    """[rows, 3] of a table as a manifest holds it; ValueError when it is none."""
    if not isinstance(table, list):
        raise ValueError("a table is a list")
    try:
        found = np.frombuffer(array("q", table), np.int64)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"a table holds whole numbers: {error}") from None
    if len(found) % 3 or found.min(initial=0) < 0 or found.max(initial=0) >= LIMIT:
        raise ValueError("a table holds three numbers a row, none below 0 or beyond reason")
    return found.reshape(-1, 3)


class Tables:
    """The tables of all files, sorted by parameter and first element; costs 0.2 s for a million
    rows, and finds a piece by bisection.
    """

    def __init__(self, sizes: Mapping[str, int], files: Sequence[Mapping[str, Any]]) -> None:
        """`files` are a manifest's entries with their tables as `columns`."""
        self._names = sorted(sizes)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._sizes = np.array([sizes[name] for name in self._names], np.int64)
        self._layouts: dict[tuple[int, ...], _Layout] = {}
        self._keys: dict[str, tuple[_Layout, Columns]] = {}
        for key in dict.fromkeys(key for entry in files for key in entry["tensors"]):
            tensors = [entry["tensors"].get(key) for entry in files]
            # All states mostly lie in the same order, and share one layout.
            tables = tuple(-1 if one is None else one["table"] for one in tensors)
            if tables not in self._layouts:
                self._layouts[tables] = _layout(files, tables, len(self._names))
            offsets = [0 if one is None else one["offset"] for one in tensors]
            self._keys[key] = self._layouts[tables], np.array(offsets, np.int64)

    def has(self, name: str, key: str) -> bool:
        """Whether this state is stored for this parameter."""
        return key in self._keys and bool(self._keys[key][0].rows(self._numbers.get(name)))

    def pieces(self, name: str, key: str, start: int, length: int) -> Iterator[Piece]:
        """Where elements [start, start + length) are; less than that where a part is not stored."""
        if key not in self._keys:
            return
        layout, offsets = self._keys[key]
        rows = layout.rows(self._numbers.get(name))
        starts = layout.start[rows.start : rows.stop]
        first = rows.start + max(int(np.searchsorted(starts, start, "right")) - 1, 0)
        last = rows.start + int(np.searchsorted(starts, start + length, "left"))
        for row in range(first, last):
            begin, size = int(layout.start[row]), int(layout.length[row])
            low, high = max(begin, start), min(begin + size, start + length)
            if low < high:
                file = int(layout.file[row])
                offset = int(offsets[file]) + (int(layout.before[row]) + low - begin) * ITEM_BYTES
                yield Piece(low, high - low, file, offset)

    def check_tiling(self) -> None:
        """CheckpointError unless the ranges of every stored state cover each of its parameters
        exactly once, and `param` all of them.
        """
        nothing = _layout((), (), len(self._names))
        for key in dict.fromkeys(("param", *self._keys)):
            layout = self._keys[key][0] if key in self._keys else nothing
            ends = layout.start + layout.length
            is_first = np.ones(len(ends), bool)
            is_first[1:] = layout.parameter[1:] != layout.parameter[:-1]
            expected = np.where(is_first, 0, np.concatenate([[0], ends[:-1]]))
            wrong = set(layout.parameter[layout.start != expected].tolist())
            reached = np.zeros(len(self._names), np.int64)
            np.maximum.at(reached, layout.parameter, ends)
            found = np.diff(layout.bounds) > 0
            wrong |= set(np.flatnonzero((found | (key == "param")) & (reached != self._sizes)))
            if wrong:
                raise CheckpointError(self._untiled(key, layout, int(min(wrong))))

    def _untiled(self, key: str, layout: _Layout, number: int) -> str:
        position = 0
        start = None
        for row in layout.rows(number):
            start = int(layout.start[row])
            if start != position:
                break
            position += int(layout.length[row])
            start = None
        after = "nothing after that" if start is None else f"next piece at {start}"
        return (
            f"the ranks' ranges of {key} of {self._names[number]!r} do not tile its "
            f"{self._sizes[number]} elements: covered to {position}, {after}; nothing was committed"
        )


@dataclass(frozen=True)
class _Layout:
    """Rows of the tables that hold one state, sorted."""

    parameter: Columns
    start: Columns
    length: Columns
    file: Columns
    before: Columns
    """Elements before it in its tensor."""
    bounds: Columns
    """Rows of parameter i are [bounds[i], bounds[i + 1])."""

    def rows(self, number: int | None) -> range:
        if number is None:
            return range(0)
        return range(int(self.bounds[number]), int(self.bounds[number + 1]))


def _layout(files: Sequence[Mapping[str, Any]], tables: tuple[int, ...], num_names: int) -> _Layout:
    found = [
        (number, files[number]["tables"][table])
        for number, table in enumerate(tables)
        if table >= 0
    ]
    rows = np.concatenate([np.zeros((0, 3), np.int64), *(table for _, table in found)])
    file = np.repeat([number for number, _ in found], [len(table) for _, table in found])
    before = [np.cumsum(table[:, 2]) - table[:, 2] for _, table in found]
    # An empty piece comes before the one that begins where it does.
    order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))
    parameter, start, length = rows[order].T
    return _Layout(
        parameter=parameter,
        start=start,
        length=length,
        file=file.astype(np.int64)[order],
        before=np.concatenate([np.zeros(0, np.int64), *before])[order],
        bounds=np.searchsorted(parameter, np.arange(num_names + 1)),
    )
