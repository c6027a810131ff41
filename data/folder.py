"""A dataset in a directory, on this machine or on a file system that it has mounted.

Arrays are parts of their shards. Where the directory is staged, they are copied into the cache when
they are first touched, each as a file of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Literal

from data.cache import Cache, Content
from data.config import AccessError, DataError, DataUsageError, MissingError
from data.durable import file_sha256

MANIFEST = "manifest.json"
Kind = Literal["tokens", "lens", "ids"]
"""The arrays of a chunk: token ids, document lengths, and the ids of documents where they are kept.
"""
_PIECE_BYTES = 2**25


@dataclass(frozen=True)
class Array:
    """An array of a shard, as the manifest and the shard's index describe it."""

    shard: str
    """SPLIT/SOURCE/FILE, relative to the dataset."""
    shard_bytes: int
    shard_sha256: str
    number: int
    """Of the chunk."""
    key: str
    """Of the chunk, for messages."""
    kind: Kind
    start: int
    """Of the first byte in the shard."""
    num_bytes: int
    xxh3: str

    def content(self) -> Content:
        """The array as an entry of the cache."""
        key = f"{self.shard_sha256}-{self.number:05d}.{self.kind}"
        return Content(key, self.num_bytes, "xxh3", self.xxh3)


class Folder:
    """A directory on this machine or on a file system that it has mounted."""

    by_chunk = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def path(self, file: str) -> str:
        return str(self.folder / file)

    def manifest(self) -> bytes:
        content = self.sealed(MANIFEST)
        if content is None:
            raise DataUsageError(_no_dataset(self.folder))
        return content

    def sealed(self, file: str) -> bytes | None:
        path = self.folder / file
        with _reading(path):
            return path.read_bytes() if path.is_file() else None

    def open(self, file: str, sha256: str, *, original: bool = False) -> BufferedReader:
        path = self.folder / file
        if not path.is_file():
            raise MissingError(f"{path} is missing; restore it from a copy of the dataset")
        with _reading(path):
            return path.open("rb")

    def tokenizer(self, file: str, sha256: str) -> Path:
        return self.folder

    def open_array(self, array: Array, *, trusted: bool = False) -> int:
        return open_shard(self.folder / array.shard, array.shard_bytes)

    def open_original(self, array: Array) -> int:
        return open_shard(self.folder / array.shard, array.shard_bytes)

    def check_size(self, shard: str, num_bytes: int) -> None:
        os.close(open_shard(self.folder / shard, num_bytes))

    def sha256(self, shard: str, num_bytes: int) -> str:
        path = self.folder / shard
        with _reading(path):
            return file_sha256(path)


class Staged(Folder):
    """A directory whose arrays are copied into the cache when they are first touched."""

    by_chunk = True

    def __init__(self, folder: Path, cache: Cache) -> None:
        super().__init__(folder)
        self._cache = cache

    def open_array(self, array: Array, *, trusted: bool = False) -> int:
        def fetch() -> Iterator[bytes]:
            file = self.open_original(array)
            try:
                for start, stop in pieces(array.start, array.start + array.num_bytes):
                    yield read_at(file, stop - start, start, self.path(array.shard))
            finally:
                os.close(file)

        def wrong() -> DataError:
            return DataError(damaged(self.path(array.shard), array.key, array.kind))

        return self._cache.open(array.content(), fetch, wrong, trusted=trusted)


def open_shard(path: Path, num_bytes: int) -> int:
    """A file descriptor of a shard. DataError when it is missing or not `num_bytes` long."""
    try:
        with _reading(path):
            descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise MissingError(
            f"{path} cannot be read: {error.strerror}; restore it from a copy of the dataset"
        ) from error
    found = os.fstat(descriptor).st_size
    if found != num_bytes:
        os.close(descriptor)
        raise DataError(other_size(str(path), found, num_bytes))
    return descriptor


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Around reading: a file system that refuses is an AccessError, a file that is not there what
    it was.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AccessError(
            f"{path} cannot be read: {error.strerror}; mend the file system or its rights, then "
            "run the same command again"
        ) from error


def read_at(file: int, size: int, offset: int, path: str | Path) -> bytes:
    """Up to `size` bytes of an open file. AccessError when its disk or server fails."""
    try:
        return os.pread(file, size, offset)
    except OSError as error:
        raise AccessError(
            f"{path} cannot be read at byte {offset}: {error.strerror}; mend the disk or its "
            "server, then run the same command again"
        ) from error


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A range of bytes in ranges that fit into memory."""
    for at in range(start, stop, _PIECE_BYTES):
        yield at, min(at + _PIECE_BYTES, stop)


def other_size(path: str, found: int, expected: int) -> str:
    """What is said of a shard of another size."""
    return (
        f"{path} is damaged: {found} bytes, the manifest says {expected}; restore it from a "
        "copy of the dataset, and run `headrace data verify --full` to see what else is"
    )


def damaged(path: str | Path, chunk: str, kind: Kind) -> str:
    """What is said of an array of a chunk, named by its key, whose hash differs."""
    names = {"tokens": "tokens", "lens": "document lengths", "ids": "document ids"}
    return (
        f"{path}, chunk {chunk}: its {names[kind]} are damaged (xxh3 differs from the index); "
        "restore the shard from a copy, and run `headrace data verify --full` on the dataset to "
        "see what else is"
    )


def _no_dataset(dataset: Path) -> str:
    if dataset.is_file():
        return (
            f"{dataset} is not a dataset but a file; prepare it: `headrace prepare --input "
            f"{dataset} --output DATASET`, and name that directory"
        )
    if not dataset.is_dir():
        return (
            f"{dataset} is not a dataset: no such directory (looked in {Path.cwd()}); "
            f"write it with `headrace prepare --input PATH --output {dataset}`"
        )
    if (dataset / "headrace.lock.json").is_file():
        return (
            f"{dataset} is not a dataset yet: its preparation has not finished (no {MANIFEST}); "
            "run the same `headrace prepare` again, it continues where it stopped"
        )
    return (
        f"{dataset} is not a dataset: it holds no {MANIFEST}; name the directory given to "
        "`headrace prepare --output`"
    )
