"""Verified reads from slice files: what is used was held against its hash, and little besides is
read.

Wanted ranges are read in the order of files and of places in them, so that every file is opened
once a call and every chunk read once. The last chunk read of each file is held, because the next
call mostly begins in it. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from train.inventory import sizes_of
from train.patience import insisting
from train.slices import CheckpointError, Damage, num_chunks
from train.tables import Tables

READ_BYTES = 16 << 20
HASH_BYTES = 8

Wanted = tuple[str, str, int, int]
"""(parameter name, state kind, first element, number of elements)."""


class SliceReader:
    """Reads any range of any parameter from the files that hold it, touching only the chunks it
    needs.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], *, held_bytes: int = 4 << 30
    ) -> None:
        """Between two calls chunks of `held_bytes` at most are held, those used last: 175 billion
        parameters of 1,024 ranks need 2.7 GB.
        """
        self._folder = folder
        self._files = manifest["files"]
        self.tables = Tables(sizes_of(manifest["parameters"]), self._files)
        """Which file holds what."""
        self._held_bytes = held_bytes
        self._held: dict[int, FileReader] = {}
        self._num_held = 0
        self.bytes_read = 0
        """Bytes fetched from disk so far."""
        self.num_opened = 0
        """Files opened so far, every time counted."""
        self.goes_on: Callable[[], None] = lambda: None
        """Called before every piece that is read."""

    def has(self, name: str, key: str) -> bool:
        """Whether this state is stored for this parameter."""
        return self.tables.has(name, key)

    def read(self, name: str, key: str, start: int, length: int) -> np.ndarray:
        """Elements [start, start + length) of the flattened parameter, float32."""
        return self.read_all([(name, key, start, length)])[0]

    def read_all(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        """What `read` returns for each; read in the order of the files."""
        jobs: list[tuple[int, int, int, int, int]] = []
        for number, (name, key, start, length) in enumerate(wanted):
            filled = 0
            for piece in self.tables.pieces(name, key, start, length):
                first = piece.start - start
                jobs.append((piece.file, piece.offset, number, first, piece.length))
                filled += piece.length
            if filled != length:
                raise CheckpointError(
                    f"{self._folder} holds {filled} of the {length} elements of {key} of "
                    f"{name!r} from {start}; it was written by another model"
                )
        jobs.sort()
        # Before memory is asked for: the files are as large as the manifest says.
        fresh = {i: self._file(i) for i in {job[0] for job in jobs} if i not in self._held}
        arrays = [np.empty(length, "<f4") for *_, length in wanted]
        for index, of_one in groupby(jobs, key=lambda job: job[0]):
            with self._opened(index, fresh) as file:
                for _, offset, number, first, length in of_one:
                    self.goes_on()
                    file.read(offset, arrays[number][first : first + length].view(np.uint8).data)
        return arrays

    def _file(self, index: int) -> FileReader:
        entry = self._files[index]
        return FileReader(self._folder / entry["name"], entry)

    @contextmanager
    def _opened(self, index: int, fresh: Mapping[int, FileReader]) -> Iterator[FileReader]:
        """A file, with what is held of it; after reads that went well it is held on."""
        file = self._held.pop(index, None) or fresh.get(index) or self._file(index)
        self._num_held -= file.num_held
        self.num_opened += 1
        with file.opened():
            yield file
        self.bytes_read += file.bytes_read
        file.bytes_read = 0
        self._held[index] = file
        self._num_held += file.num_held
        while self._num_held > self._held_bytes:
            self._num_held -= self._held.pop(next(iter(self._held))).num_held


class FileReader:
    """Verified reads of one file, which has the size that was written or is Damage."""

    def __init__(self, path: Path, entry: Mapping[str, Any]) -> None:
        self._path = path
        self._num_bytes: int = entry["bytes"]
        self._chunk_bytes: int = entry["chunk_bytes"]
        self._hashes = bytes.fromhex(entry["chunks"])
        self._held: tuple[int, memoryview] = (-1, memoryview(b""))
        self._descriptor = -1
        self.bytes_read = 0
        try:
            found = insisting(path.stat).st_size
        except FileNotFoundError:
            raise Damage(path, "is missing") from None
        except OSError as error:
            raise Damage(path, f"cannot be read: {error.strerror}") from error
        if found != self._num_bytes:
            raise Damage(path, f"has {found} bytes, {self._num_bytes} were written")

    @property
    def num_held(self) -> int:
        """Bytes held for the next read."""
        return len(self._held[1])

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Around reads; Damage when the file cannot be opened. What is held stays."""
        try:
            self._descriptor = insisting(lambda: os.open(self._path, os.O_RDONLY))
        except OSError as error:
            raise Damage(self._path, f"cannot be read: {error.strerror}") from error
        try:
            yield
        finally:
            os.close(self._descriptor)

    def read(self, offset: int, target: memoryview) -> None:
        """Fill `target` with what was written from byte `offset` on; Damage names the chunk that
        is not what was written.
        """
        while target:
            index, inside = divmod(offset, self._chunk_bytes)
            data = self._chunks(index, inside + len(target))
            part = data[inside : inside + len(target)]
            target[: len(part)] = part
            offset, target = offset + len(part), target[len(part) :]

    def damages(self) -> Iterator[Damage]:
        """Read every byte; each chunk that is not what was written."""
        index, end = 0, num_chunks(self._num_bytes, self._chunk_bytes)
        with self.opened():
            while index < end:
                try:
                    index += num_chunks(len(self._chunks(index, READ_BYTES)), self._chunk_bytes)
                except Damage as damage:
                    yield damage
                    assert damage.chunk is not None
                    index = damage.chunk + 1

    def _chunks(self, index: int, num_bytes: int) -> memoryview:
        """From the beginning of a chunk on: whole chunks, verified, with `num_bytes` or READ_BYTES
        at least, or what is held of them.
        """
        if self._held[0] == index:
            return self._held[1]
        size = self._chunk_bytes
        count = max(1, num_chunks(min(num_bytes, READ_BYTES), size))
        # A chunk may be called larger than its file, and memory is taken before the read.
        wanted = min(count * size, self._num_bytes - index * size)
        try:
            data = memoryview(insisting(lambda: os.pread(self._descriptor, wanted, index * size)))
        except OSError as error:
            reason = f"chunk {index} (from byte {index * size}) cannot be read: {error.strerror}"
            raise Damage(self._path, reason, chunk=index) from error
        if not data:
            raise Damage(self._path, f"chunk {index} has gone while it was read", chunk=index)
        self.bytes_read += len(data)
        for number in range(index, index + num_chunks(len(data), size)):
            first = (number - index) * size
            chunk = data[first : first + size]
            expected = self._hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]
            if xxhash.xxh3_64_digest(chunk) != expected:
                start = number * size
                reason = f"chunk {number} (bytes {start} to {start + len(chunk)}) is not what was "
                raise Damage(self._path, reason + "written", chunk=number)
            if first + size >= len(data):
                # A copy, which does not keep the rest of the read.
                self._held = number, memoryview(bytes(chunk))
        return data
