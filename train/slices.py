"""Slice files: flat fp32 ranges of parameters and optimizer state, one file per rank.

A file is safetensors with one contiguous tensor per state kind; which range of which parameter lies
where is told by a table in the manifest (train/tables.py), so that a reader (train/slice_reader.py)
seeks and never scans. Every chunk has an xxh3, made in a second thread while the disk takes the
next bytes, and checked when it is read; 0.04 s of a core per GB, and twice that in the smallest
chunks. The file is written here and not by the library, which would hide each write and the errno
of a full disk; a test compares every byte with the library's. No torch here.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash
from safetensors import SafetensorError

from data.durable import writing

CHUNK_BYTES = 32 << 10
"""The smallest chunk, and the unit of larger ones."""
NUM_CHUNKS = 1 << 20
"""Of a whole checkpoint, about, at most: 16 MiB of hashes in its manifest."""
WRITE_BYTES = 16 << 20
SYNC_BYTES = 1 << 30
"""Written between two syncs: each takes seconds, where one of a whole file might take so long that
nobody could tell a slow disk from one that no longer answers.
"""
ITEM_BYTES = 4  # fp32

Range = tuple[str, int, int]
"""(parameter name, first element, number of elements) of one contiguous piece."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another model."""

    exit_code: ClassVar[int] = 1


class Damage(CheckpointError):
    """A file, or one chunk of it, that is not what was written."""

    def __init__(self, path: Path, message: str, *, chunk: int | None = None) -> None:
        super().__init__(f"{path} {message}" if chunk is None else f"{path}: {message}")
        self.path = path
        self.chunk = chunk


def chunk_bytes_of(total_bytes: int) -> int:
    """Bytes that have one hash, in a checkpoint of this size.

    A reader takes whole chunks, one too many for each piece that it wants: chunks are as small as
    the manifest allows. Of a model of 1.3 billion parameters, written by one rank, a stage-3 rank
    of 64 wants 650 pieces of 380 KiB, and reads 8 % too much.
    """
    return max(1, -(-total_bytes // (NUM_CHUNKS * CHUNK_BYTES))) * CHUNK_BYTES


def write_slices(
    folder: Path,
    rank: int,
    arrays: Mapping[str, Sequence[np.ndarray]],
    ranges: Mapping[str, Sequence[Range]],
    *,
    total_bytes: int = 0,
    goes_on: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write one rank's file and return its manifest entry.

    `arrays[key]` are 1-D float32, and together the concatenation of `ranges[key]` in order.
    `total_bytes` are those of all ranks' files; `goes_on` is called whenever the disk has taken
    something. Chunks are hashed on their way out: what was meant is what a reader is told to
    expect, whatever the disk made of it.
    """
    chunk_bytes = chunk_bytes_of(total_bytes)
    path = folder / file_name(rank)
    sizes = {key: sum(part.size for part in parts) for key, parts in arrays.items()}
    header, offsets = _header(sizes)
    flat = [np.ascontiguousarray(part, dtype="<f4") for key in offsets for part in arrays[key]]
    # Unbuffered: pieces of 16 MiB need no second copy, and what was refused is not tried again.
    parts = (memoryview(header), *(array.view(np.uint8).data for array in flat))
    chunks = _Hashes(chunk_bytes)
    # One thread: chunks are hashed in their order.
    with ThreadPoolExecutor(1, "hashes") as hasher, writing(path), _new(path) as file:
        added = []
        for piece in _written(file, parts):
            added.append(hasher.submit(chunks.add, piece))
            goes_on()
        os.fsync(file.fileno())
    for one in added:
        one.result()
    tables: list[list[Range]] = []
    tensors = {}
    for key, offset in offsets.items():
        table = list(ranges[key])
        if table not in tables:
            tables.append(table)
        tensors[key] = {"offset": offset, "table": tables.index(table)}
    return {
        "name": path.name,
        "bytes": slices_bytes(sizes),
        "chunk_bytes": chunk_bytes,
        "chunks": chunks.hex(),
        "tensors": tensors,
        "tables": tables,
    }


def _new(path: Path) -> io.FileIO:
    """A file that is not there yet. A checkpoint begins with an empty folder: a rank that finds its
    file there comes late, and it belongs to the attempt that has taken the run over.
    """
    try:
        return path.open("xb", buffering=0)
    except FileExistsError:
        raise CheckpointError(
            f"{path} is there already: a later attempt has begun this checkpoint anew while this "
            "rank did not answer; nothing more is saved here"
        ) from None


def file_name(rank: int) -> str:
    """What the file of a rank is called."""
    return f"rank-{rank:05d}.safetensors"


def slices_bytes(sizes: Mapping[str, int]) -> int:
    """Exact size of a rank's file, from the number of elements of each state kind."""
    header, _ = _header(sizes)
    return len(header) + ITEM_BYTES * sum(sizes.values())


def num_chunks(num_bytes: int, chunk_bytes: int) -> int:
    """Chunks of a file of this size."""
    return -(-num_bytes // chunk_bytes)


@contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """`writing` around safetensors, whose errors are no OSErrors, even when the disk is full."""
    with writing(path):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error), str(path)) from error


def _header(sizes: Mapping[str, int]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file of 1-D fp32 tensors, and where in the file each begins.

    8 bytes little-endian size, then JSON, filled up with spaces to a multiple of 8; tensors lie in
    the order of their names, as the library itself would place them.
    """
    table, places, end = {}, {}, 0
    for key in sorted(sizes):
        places[key] = end
        span = [end, end + ITEM_BYTES * sizes[key]]
        table[key] = {"dtype": "F32", "shape": [sizes[key]], "data_offsets": span}
        end = span[1]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + place for key, place in places.items()}


def _written(file: io.RawIOBase, parts: Iterable[memoryview]) -> Iterator[memoryview]:
    """Write the parts; yields what was taken, piece by piece."""
    unsynced = 0
    for part in parts:
        while part:
            # A file system may take less than it is given.
            done = part[: file.write(part[:WRITE_BYTES])]
            part = part[len(done) :]
            unsynced += len(done)
            if unsynced >= SYNC_BYTES:
                os.fdatasync(file.fileno())
                unsynced = 0
            yield done


class _Hashes:
    """The hash of each chunk of what is added, whatever the pieces it comes in."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._done = bytearray()
        self._open = xxhash.xxh3_64()
        self._room = chunk_bytes

    def add(self, data: memoryview) -> None:
        begun = min(self._room % self._chunk_bytes, len(data))
        self._extend(data[:begun])
        whole = begun + (len(data) - begun) // self._chunk_bytes * self._chunk_bytes
        for first in range(begun, whole, self._chunk_bytes):
            self._done += xxhash.xxh3_64_digest(data[first : first + self._chunk_bytes])
        self._extend(data[whole:])

    def _extend(self, data: memoryview) -> None:
        self._open.update(data)
        self._room -= len(data)
        if self._room == 0:
            self._close()

    def _close(self) -> None:
        self._done += self._open.digest()
        self._open, self._room = xxhash.xxh3_64(), self._chunk_bytes

    def hex(self) -> str:
        """16 digits for each chunk, the last one as short as it is."""
        if self._room < self._chunk_bytes:
            self._close()
        return self._done.hex()
