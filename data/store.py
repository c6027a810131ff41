"""A place that files are copied to and from: a folder, or a URL that fsspec can write to.

Names are relative and have at most one folder in front. A file in a folder is there as a whole or
not at all; behind a URL a cut upload may leave half a file, so whoever reads checks hashes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from data.durable import write_stream, writing
from data.remote import writable_system

BLOCK_BYTES = 16 << 20


class Store(Protocol):
    """The files of a place. OSError, or what the library of the place raises, when it refuses."""

    def path(self, name: str) -> str:
        """What messages call a file."""

    def names(self) -> list[str]:
        """Of all files, sorted; none where the place is not there yet."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, first: int = 0) -> Iterator[bytes]:
        """A file from byte `first` on, piece by piece."""

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        """Make or replace a file."""

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it."""


class FolderStore:
    """A folder of this machine's file systems."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def names(self) -> list[str]:
        # Not by Path.rglob, to which a folder that may not be read is an empty one.
        found = [
            Path(folder, name)
            for folder, _, names in os.walk(self._folder, onerror=_unless_gone)
            for name in names
        ]
        return sorted(str(path.relative_to(self._folder)) for path in found)

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def read(self, name: str, first: int = 0) -> Iterator[bytes]:
        with (self._folder / name).open("rb", buffering=0) as file:
            file.seek(first)
            while piece := file.read(BLOCK_BYTES):
                yield piece

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        path = self._folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_stream(path, pieces)

    def remove(self, name: str) -> None:
        path = self._folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class UrlStore:
    """A folder behind a URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._files: Any = writable_system(url)

    def path(self, name: str) -> str:
        return self._at(name)

    def names(self) -> list[str]:
        # Somebody else may have written there a moment ago.
        self._files.invalidate_cache()
        root = self._files._strip_protocol(self._url).rstrip("/") + "/"
        try:
            found = self._files.find(root.rstrip("/"))
        except FileNotFoundError:
            return []
        return sorted(name.removeprefix(root) for name in found if name.startswith(root))

    def size(self, name: str) -> int:
        return int(self._files.info(self._at(name))["size"])

    def read(self, name: str, first: int = 0) -> Iterator[bytes]:
        with self._files.open(self._at(name), "rb") as file:
            file.seek(first)
            while piece := file.read(BLOCK_BYTES):
                yield piece

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        with suppress(NotImplementedError):
            self._files.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        with self._files.open(self._at(name), "wb") as file:
            for piece in pieces:
                file.write(piece)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm(self._at(name), recursive=True)

    def _at(self, name: str) -> str:
        return f"{self._url}/{name}"


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def store_of(location: str) -> Store:
    """The place that a person names. DataUsageError when nobody can write there."""
    return UrlStore(location) if "://" in location else FolderStore(Path(location))
