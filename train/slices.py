"""Slice files: flat fp32 ranges of parameters and optimizer state, one file per rank.

A file is safetensors with one contiguous tensor per state kind; which range of which parameter lies
where is told by a table in the manifest, so that a reader seeks and never scans. Every 16 MiB chunk
has an xxh3, checked when the chunk is read; hashing costs 0.04 s per GB. No torch here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import save_file

from data.durable import sync, writing

CHUNK_BYTES = 16 << 20
ITEM_BYTES = 4  # fp32

Range = tuple[str, int, int]
"""(parameter name, first element, number of elements) of one contiguous piece."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another model."""

    exit_code: ClassVar[int] = 1


def write_slices(
    folder: Path, rank: int, arrays: Mapping[str, np.ndarray], ranges: Mapping[str, Sequence[Range]]
) -> dict[str, Any]:
    """Write one rank's file and return its manifest entry.

    `arrays[key]` is 1-D float32: the concatenation of `ranges[key]` in order.
    """
    path = folder / f"rank-{rank:05d}.safetensors"
    with writing_tensors(path):
        save_file(
            {key: np.ascontiguousarray(array, dtype="<f4") for key, array in arrays.items()}, path
        )
        # safetensors makes files that only their owner may read.
        path.chmod(0o666 & ~_umask())
        sync(path)
    tables: list[list[Range]] = []
    tensors = {}
    for key, offset in _data_offsets(path).items():
        table = list(ranges[key])
        if table not in tables:
            tables.append(table)
        tensors[key] = {"offset": offset, "table": tables.index(table)}
    chunks = [xxhash.xxh3_64_hexdigest(data) for data in _chunks(path)]
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "chunks": chunks,
        "tensors": tensors,
        "tables": tables,
    }


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
    """

    def __init__(self, folder: Path, files: Sequence[Mapping[str, Any]]) -> None:
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
        return sum(reader.bytes_read for reader in self._readers.values())

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
            raise CheckpointError(f"{path} is missing") from None
        if found != entry["bytes"]:
            raise CheckpointError(f"{path} has {found} bytes, {entry['bytes']} were written")

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
            with self._path.open("rb") as file:
                data = os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES)
            self.bytes_read += len(data)
            if xxhash.xxh3_64_hexdigest(data) != self._entry["chunks"][index]:
                raise CheckpointError(
                    f"{self._path}: chunk {index} (bytes {index * CHUNK_BYTES} to "
                    f"{index * CHUNK_BYTES + len(data)}) is not what was written"
                )
            self._held = (index, data)
        return self._held[1]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _data_offsets(path: Path) -> dict[str, int]:
    # safetensors: 8 bytes little-endian header size, the JSON header, then the data.
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        key: 8 + size + value["data_offsets"][0]
        for key, value in header.items()
        if key != "__metadata__"
    }


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data
