"""Slice files: flat fp32 ranges of parameters and optimizer state, one file per rank.

A file is safetensors with one contiguous tensor per state kind; which range of which parameter lies
where is told by a table in the manifest, so that a reader seeks and never scans. Every 16 MiB chunk
has an xxh3, made while it is written and checked when it is read; hashing costs 0.04 s per GB. The
file is written here and not by the library, which would hide each write and the errno of a full
disk; a test compares every byte with the library's. No torch here.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash
from safetensors import SafetensorError

from data.durable import writing

CHUNK_BYTES = 16 << 20
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


def write_slices(
    folder: Path, rank: int, arrays: Mapping[str, np.ndarray], ranges: Mapping[str, Sequence[Range]]
) -> dict[str, Any]:
    """Write one rank's file and return its manifest entry.

    `arrays[key]` is 1-D float32: the concatenation of `ranges[key]` in order. Chunks are hashed on
    their way out: what was meant is what a reader is told to expect, whatever the disk made of it.
    """
    path = folder / file_name(rank)
    header, offsets = _header({key: array.size for key, array in arrays.items()})
    flat = [np.ascontiguousarray(arrays[key], dtype="<f4") for key in offsets]
    # Unbuffered: pieces of 16 MiB need no second copy, and what was refused is not tried again.
    with writing(path), path.open("wb", buffering=0) as file:
        chunks = list(
            _written(file, [memoryview(header), *(array.view(np.uint8).data for array in flat)])
        )
        os.fsync(file.fileno())
    tables: list[list[Range]] = []
    tensors = {}
    for key, offset in offsets.items():
        table = list(ranges[key])
        if table not in tables:
            tables.append(table)
        tensors[key] = {"offset": offset, "table": tables.index(table)}
    return {
        "name": path.name,
        "bytes": slices_bytes({key: array.size for key, array in arrays.items()}),
        "chunks": chunks,
        "tensors": tensors,
        "tables": tables,
    }


def file_name(rank: int) -> str:
    """What the file of a rank is called."""
    return f"rank-{rank:05d}.safetensors"


def slices_bytes(sizes: Mapping[str, int]) -> int:
    """Exact size of a rank's file, from the number of elements of each state kind."""
    header, _ = _header(sizes)
    return len(header) + ITEM_BYTES * sum(sizes.values())


def num_chunks(num_bytes: int) -> int:
    """Chunks of a file of this size."""
    return -(-num_bytes // CHUNK_BYTES)


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


def check_tiling(
    parameters: Mapping[str, Sequence[int]], files: Sequence[Mapping[str, Any]]
) -> None:
    """CheckpointError unless the ranges of every stored state cover each of its parameters exactly
    once.
    """
    pieces: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for entry in files:
        for key, tensor in entry["tensors"].items():
            for name, start, length in entry["tables"][tensor["table"]]:
                pieces.setdefault((key, name), []).append((start, length))
    for name in parameters:
        pieces.setdefault(("param", name), [])
    for (key, name), found in pieces.items():
        position = 0
        for start, length in sorted(found):
            if start != position:
                break
            position += length
        else:
            start = position
        size = int(np.prod(parameters[name], dtype=np.int64))
        if position != size or start != position:
            raise CheckpointError(
                f"the ranks' ranges of {key} of {name!r} do not tile its {size} elements: "
                f"covered to {position}, next piece at {start}; nothing was committed"
            )


class SliceReader:
    """Reads any range of any parameter from the files that hold it, touching only the chunks it
    needs.

    The last chunk read of each file is held, because the next range mostly begins in it; of the
    last `num_held` files only, where many files are gone through.
    """

    def __init__(
        self, folder: Path, files: Sequence[Mapping[str, Any]], *, num_held: int = sys.maxsize
    ) -> None:
        self._num_held = num_held
        self._bytes_let_go = 0
        self._folder = folder
        self._files = files
        self._pieces: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {}
        self._readers: dict[int, FileReader] = {}
        for index, entry in enumerate(files):
            for key, tensor in entry["tensors"].items():
                offset = tensor["offset"]
                for name, start, length in entry["tables"][tensor["table"]]:
                    self._pieces.setdefault((key, name), []).append((start, length, index, offset))
                    offset += length * ITEM_BYTES

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from disk so far."""
        return self._bytes_let_go + sum(reader.bytes_read for reader in self._readers.values())

    def has(self, name: str, key: str) -> bool:
        """Whether this state is stored for this parameter."""
        return (key, name) in self._pieces

    def read(self, name: str, key: str, start: int, length: int) -> np.ndarray:
        """Elements [start, start + length) of the flattened parameter, float32."""
        out = np.empty(length, dtype=np.float32)
        filled = 0
        for first, size, index, offset in self._pieces.get((key, name), ()):
            low, high = max(first, start), min(first + size, start + length)
            if low < high:
                raw = self._reader(index).read(
                    offset + (low - first) * ITEM_BYTES, (high - low) * ITEM_BYTES
                )
                out[low - start : high - start] = np.frombuffer(raw, dtype="<f4")
                filled += high - low
        if filled != length:
            raise CheckpointError(
                f"{self._folder} holds {filled} of the {length} elements of {key} of "
                f"{name!r} "
                f"from {start}; it was written by another model"
            )
        return out

    def _reader(self, index: int) -> FileReader:
        if index not in self._readers:
            while len(self._readers) >= self._num_held:
                oldest = self._readers.pop(next(iter(self._readers)))
                self._bytes_let_go += oldest.bytes_read
            entry = self._files[index]
            self._readers[index] = FileReader(self._folder / entry["name"], entry)
        return self._readers[index]


class FileReader:
    """Verified reads of one file; keeps the last chunk, because ranges are read in order."""

    def __init__(self, path: Path, entry: Mapping[str, Any]) -> None:
        self._path = path
        self._entry = entry
        self._held: tuple[int, bytes] = (-1, b"")
        self.bytes_read = 0
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise Damage(path, "is missing") from None
        except OSError as error:
            raise Damage(path, f"cannot be read: {error.strerror}") from error
        if found != entry["bytes"]:
            raise Damage(path, f"has {found} bytes, {entry['bytes']} were written")

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            index, inside = divmod(offset, CHUNK_BYTES)
            part = self.chunk(index)[inside : inside + length]
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def chunk(self, index: int) -> bytes:
        if self._held[0] != index:
            start = index * CHUNK_BYTES
            try:
                with self._path.open("rb") as file:
                    data = os.pread(file.fileno(), CHUNK_BYTES, start)
            except OSError as error:
                reason = f"chunk {index} (from byte {start}) cannot be read: {error.strerror}"
                raise Damage(self._path, reason, chunk=index) from error
            self.bytes_read += len(data)
            if xxhash.xxh3_64_hexdigest(data) != self._entry["chunks"][index]:
                reason = f"chunk {index} (bytes {start} to {start + len(data)}) is not what was "
                raise Damage(self._path, reason + "written", chunk=index)
            self._held = (index, data)
        return self._held[1]


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


def _written(file: io.RawIOBase, parts: Iterable[memoryview]) -> Iterator[str]:
    """Write all parts; yields the hash of each chunk of the file."""
    hasher, room = xxhash.xxh3_64(), CHUNK_BYTES
    for part in parts:
        rest = part
        while rest:
            # A file system may take less than it is given.
            done = rest[: file.write(rest[:room])]
            hasher.update(done)
            rest, room = rest[len(done) :], room - len(done)
            if room == 0:
                yield hasher.hexdigest()
                hasher, room = xxhash.xxh3_64(), CHUNK_BYTES
    if room < CHUNK_BYTES:
        yield hasher.hexdigest()
