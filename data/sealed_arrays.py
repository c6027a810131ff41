"""Arrays of a preparation's work, of which any rows can be read and are held against a hash.

    .npy file, then <u8 xxh3 of each block of rows, <u8 length of the .npy header, <u8 blocks,
    xxh3_128 of the header and of what comes after the array

A block is about 4 KiB of rows, so that a few rows out of many cost a page or two. Whatever bit of
the file has changed, and wherever it was cut, no row is taken for what it is not: DataError names
the file. Memory: a number per block, about 1 % of the file, and the rows that are read.
"""

from __future__ import annotations

import io
import struct
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.durable import write_durably
from data.stamps import damaged

_BLOCK_BYTES = 4096
_END = struct.Struct("<QQ16s")


def save(path: Path, array: NDArray[Any]) -> None:
    """Write an array as a whole or not at all."""
    content = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.save(content, array, allow_pickle=False)
    header = content.getvalue()[: content.tell() - array.nbytes]
    step = _rows_per_block(array)
    blocks = range(0, len(array), step)
    sums = b"".join(xxhash.xxh3_64_digest(array[n : n + step].tobytes())[::-1] for n in blocks)
    told = struct.pack("<QQ", len(header), len(blocks))
    content.write(sums + told + xxhash.xxh3_128_digest(header + sums + told))
    write_durably(path, content.getvalue())


def load(path: Path) -> NDArray[Any]:
    """All of an array."""
    array = SealedArray(path)
    return array.rows(0, len(array))


class SealedArray:
    """An array in a file. DataError, then or when rows are asked for, when it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._sums, has_rows = self._checked_sums()
            # Of an empty array there is nothing to map.
            mapped = np.load(path, mmap_mode="r" if has_rows else None, allow_pickle=False)
            # A plain view of the map: to slice a memmap takes longer than to hash it.
            self._array: NDArray[Any] = np.asarray(mapped)
        except (OSError, ValueError) as error:
            raise damaged(path) from error
        if len(self._sums) != -(-len(self._array) // _rows_per_block(self._array)):
            raise damaged(path)

    def __len__(self) -> int:
        return len(self._array)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop), checked, as a copy."""
        step = _rows_per_block(self._array)
        first = start - start % step
        found = np.array(self._array[first : min(len(self), -(-stop // step) * step)])
        for block in range(0, len(found), step):
            self._check((first + block) // step, found[block : block + step])
        rows: NDArray[Any] = found[start - first : max(stop, start) - first]
        return rows

    def take(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """The rows at these places, checked."""
        step = _rows_per_block(self._array)
        for block in np.unique(places // step).tolist():
            self._check(block, self._array[block * step : (block + 1) * step])
        rows: NDArray[Any] = self._array[places]
        return rows

    def between(self, first: int, last: int) -> NDArray[Any]:
        """The rows whose first (or only) number is in [first, last], in a file sorted by it."""
        start, stop = self.range_of(first, last)
        return self.rows(start, stop)

    def range_of(self, first: int, last: int) -> tuple[int, int]:
        """Where the rows of `between` are."""
        keys = self._array if self._array.ndim == 1 else self._array[:, 0]
        start = bisect_left(keys, first, key=int)
        stop = bisect_right(keys, last, lo=start, key=int)
        # A bit that has changed may have led the search astray; its neighbours tell.
        around = self.rows(max(0, start - 1), min(len(self), stop + 1)).reshape(-1)
        width = max(1, self._array.size // max(1, len(self)))
        if (start and int(around[0]) >= first) or (
            stop < len(self) and int(around[-width]) <= last
        ):
            raise damaged(self._path)
        return start, stop

    def _check(self, number: int, block: NDArray[Any]) -> None:
        if xxhash.xxh3_64_intdigest(block.data) != self._sums[number]:
            raise damaged(self._path)

    def _checked_sums(self) -> tuple[list[int], bool]:
        """The hashes of blocks, and whether there are any."""
        with self._path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - _END.size))
            end = file.read()
            if len(end) != _END.size:
                raise ValueError("too short")
            header_bytes, num_blocks, seal = _END.unpack(end)
            tail = 8 * num_blocks + _END.size
            if header_bytes + tail > size:
                raise ValueError("no such lengths")
            file.seek(0)
            header = file.read(header_bytes)
            file.seek(size - tail)
            sums = file.read(8 * num_blocks)
        if xxhash.xxh3_128_digest(header + sums + end[:16]) != seal:
            raise ValueError("another hash")
        return np.frombuffer(sums, "<u8").tolist(), num_blocks > 0


def _rows_per_block(array: NDArray[Any]) -> int:
    row_bytes = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return max(1, _BLOCK_BYTES // max(1, row_bytes))
