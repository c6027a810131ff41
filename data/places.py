"""Where the bytes of a dataset are: a directory, a URL behind the cache, or a command.

Whoever reads a dataset asks its place for small files by name and hash, and for the arrays of
shards as open files. A URL gives exact ranges, so every array is an entry of the cache, fetched
whole when it is first touched; a command gives whole shards. The manifest alone is fetched at each
start: its seal and its fingerprint say what it is. Tokenizers are kept beside the cache's entries
and never removed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from data.cache import Cache, Content
from data.commands import CommandFiles
from data.config import (
    COMMAND,
    AccessError,
    DataConfig,
    DataError,
    DataUsageError,
    MissingError,
)
from data.durable import write_durably
from data.folder import MANIFEST as MANIFEST
from data.folder import Array, Folder, Staged, damaged, other_size, pieces
from data.folder import Kind as Kind
from data.remote import UrlFiles
from data.tokenizer_json import CONFIG_FILE, JSON_FILE, MODEL_FILE


class Place(Protocol):
    """Where a dataset is. AccessError wherever something else than the data is in the way."""

    by_chunk: bool
    """Whether every array is a file of its own, and not a part of its shard."""

    def path(self, file: str) -> str:
        """What messages call a file of the dataset."""

    def manifest(self) -> bytes:
        """The manifest as it is now. DataUsageError when this is no dataset."""

    def sealed(self, file: str) -> bytes | None:
        """A small file that carries its own seal, as it is now; None where there is none."""

    def open(self, file: str, sha256: str, *, original: bool = False) -> BufferedReader:
        """The table, an index or a plan, no copy if `original`; the caller checks its hash."""

    def tokenizer(self, file: str, sha256: str) -> Path:
        """A local file or folder with the tokenizer; its hash is the caller's to check."""

    def open_array(self, array: Array, *, trusted: bool = False) -> int:
        """A descriptor; the array begins at byte 0 or, unless `by_chunk`, at its start. `trusted`:
        this process has checked it before.
        """

    def open_original(self, array: Array) -> int:
        """As `open_array`, but surely of the dataset itself and no copy; nothing is checked."""

    def check_size(self, shard: str, num_bytes: int) -> None:
        """DataError when a shard is missing or has another size."""

    def sha256(self, shard: str, num_bytes: int) -> str:
        """Of the whole shard, read now."""


class Remote:
    """A URL behind the cache, or a command."""

    def __init__(self, files: UrlFiles | CommandFiles, cache: Cache) -> None:
        self._files = files
        self._cache = cache
        self.by_chunk = files.has_ranges

    def __str__(self) -> str:
        return self._files.location

    def path(self, file: str) -> str:
        return self._files.name(file)

    def manifest(self) -> bytes:
        return self._files.whole(MANIFEST)

    def sealed(self, file: str) -> bytes | None:
        try:
            return self._files.whole(file)
        except MissingError:
            return None

    def open(self, file: str, sha256: str, *, original: bool = False) -> BufferedReader:
        if original:
            return _temporary([self._files.whole(file)])
        content = Content(f"{sha256}.file", None, "sha256", sha256)

        def fetch() -> Iterator[bytes]:
            yield self._files.whole(file)

        return os.fdopen(self._cache.open(content, fetch, lambda: self._wrong(file)), "rb")

    def tokenizer(self, file: str, sha256: str) -> Path:
        if file not in (MODEL_FILE, JSON_FILE):
            raise DataError(f"the manifest of {self} names a tokenizer {file!r}; restore it")
        # Beside a tokenizer.json are the names of its special tokens, without which it is another.
        beside = self._files.whole(CONFIG_FILE) if file == JSON_FILE else b""
        key = hashlib.sha256(sha256.encode() + beside).hexdigest()
        folder = self._cache.folder / "tokenizers" / key
        path = folder / file
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return folder
        content = self._files.whole(file)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise self._wrong(file)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Every rank of a node comes here at once: each makes its own, and one gets the name.
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{key}-", ignore_cleanup_errors=True
        ) as own:
            if beside:
                write_durably(Path(own, CONFIG_FILE), beside)
            write_durably(Path(own, file), content)
            if path.exists():
                # Damaged: whoever still reads it has opened it.
                os.replace(Path(own, file), path)
            else:
                with suppress(OSError):
                    os.rename(own, folder)
        return folder

    def open_array(self, array: Array, *, trusted: bool = False) -> int:
        def wrong() -> DataError:
            return self._wrong(array.shard, array)

        if self.by_chunk:
            fetch = lambda: self._ranges(array.shard, array.start, array.num_bytes)  # noqa: E731
            return self._cache.open(array.content(), fetch, wrong, trusted=trusted)
        key = f"{array.shard_sha256}.tar"
        whole = Content(key, array.shard_bytes, "sha256", array.shard_sha256)
        return self._cache.open(whole, lambda: self._all(array.shard), wrong, trusted=trusted)

    def open_original(self, array: Array) -> int:
        if not self.by_chunk:
            # Checked against the manifest when it came; the command is asked again by `sha256`.
            return self.open_array(array)
        with _temporary(self._ranges(array.shard, array.start, array.num_bytes)) as file:
            return os.dup(file.fileno())

    def check_size(self, shard: str, num_bytes: int) -> None:
        if isinstance(self._files, CommandFiles):
            return
        found = self._files.size(shard)
        if found != num_bytes:
            raise DataError(other_size(self.path(shard), found, num_bytes))

    def sha256(self, shard: str, num_bytes: int) -> str:
        digest = hashlib.sha256()
        for piece in self._ranges(shard, 0, num_bytes) if self.by_chunk else self._all(shard):
            digest.update(piece)
        return digest.hexdigest()

    def _ranges(self, file: str, start: int, num_bytes: int) -> Iterator[bytes]:
        assert isinstance(self._files, UrlFiles), "a command gives no ranges"
        for begin, end in pieces(start, start + num_bytes):
            yield self._files.read(file, begin, end)

    def _all(self, file: str) -> Iterator[bytes]:
        assert isinstance(self._files, CommandFiles), "a URL gives ranges"
        return self._files.pieces(file)

    def _wrong(self, file: str, array: Array | None = None) -> DataError:
        if isinstance(self._files, CommandFiles):
            return AccessError(
                f"{self._files.account(file)} wrote other bytes than the file that the dataset "
                "lists (size or sha256 differ); mend the command, or put the right file there"
            )
        if array is not None:
            return DataError(damaged(self.path(file), array.key, array.kind))
        return DataError(
            f"{self.path(file)} is damaged, or not the file that the dataset lists (its sha256 "
            "differs); put the right one there"
        )


def _temporary(content: Iterable[bytes]) -> BufferedReader:
    """A file without a name."""
    with tempfile.TemporaryFile() as file:
        file.writelines(content)
        file.seek(0)
        return os.fdopen(os.dup(file.fileno()), "rb")


def place_of(
    location: str | Path | Place, config: DataConfig | None = None, *, commands: bool = False
) -> Place:
    """The place that a person names; cache and staging as `config` says.

    `commands`: the person has just written it, so pipe:COMMAND may be run. Anything that was read
    from a file is refused as such a command by DataUsageError.
    """
    if not isinstance(location, str | Path):
        return location
    config = config or DataConfig()
    if isinstance(location, str) and location.startswith(COMMAND):
        if not commands:
            raise DataUsageError(
                f"{location} is a command, and commands are run only when they are written on the "
                "command line or in a recipe; name the dataset there"
            )
        return Remote(CommandFiles(location), cache_of(config))
    if is_url(location):
        return Remote(UrlFiles(str(location)), cache_of(config))
    return Staged(Path(location), cache_of(config)) if config.stage else Folder(Path(location))


def is_url(location: str | Path) -> bool:
    """Whether what a person names is no path on this machine."""
    return isinstance(location, str) and ("://" in location or location.startswith(COMMAND))


def is_at(place: Place, location: str | Path) -> bool:
    """Whether a dataset is where a person says."""
    if isinstance(place, Folder):
        return not is_url(location) and place.folder.resolve() == Path(location).resolve()
    return str(place).rstrip("/") == str(location).rstrip("/")


def cache_of(config: DataConfig) -> Cache:
    """The cache that a [data] table names."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = config.cache_dir or f"{home}/headrace"
    return Cache(Path(folder).expanduser(), config.cache_bytes)
