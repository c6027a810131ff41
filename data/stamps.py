"""Files that stay as they are while they are read: a stamp before and after, and a hash where only
the time of change differs.

To move or link a file changes its ctime alone, and so does an edit that is put back with its old
time of writing; the content tells which. Nothing that was read of a file is kept unless the file
was the same one from before the reading to after it. Cost: two looks at the file's inode each time,
and one hash per process of a file whose ctime differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import xxhash

from data.errors import DataError

_READ_BYTES = 2**23
_TRIES = 3

Moment = tuple[int, int, int]
"""Size, mtime and ctime of a file; while they stay, so has its content."""
Result = TypeVar("Result")


class InputChanged(DataError):
    """A file of the input is not the one that was planned."""


class Touched(InputChanged):
    """Only the ctime of a file has changed while it was read; to read it again may do."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file of the input was when it was found, and its content when it was hashed."""

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    xxh3: str = ""
    """Empty until it was hashed."""

    def check_written(self, path: Path) -> Moment:
        """The file as it is now. InputChanged when somebody has written it since; to move or link
        it is no writing.
        """
        now = moment(path)
        if now[:2] != (self.num_bytes, self.mtime_ns):
            raise _changed(path)
        return now

    def confirm(self, path: Path) -> Moment:
        """The file as it is now. InputChanged when its content is not what it was."""
        now = self.check_written(path)
        if now[2] != self.ctime_ns and self.xxh3 and _digest_at(path, now) != self.xxh3:
            raise _changed(path)
        return now


@dataclass(frozen=True, slots=True)
class Kept:
    """What a preparation has kept for itself, known by its content alone."""

    num_bytes: int
    xxh3: str

    def check_written(self, path: Path) -> Moment:
        """The file as it is now, by its size. DataError when that is another one."""
        with suppress(InputChanged):
            now = moment(path)
            if now[0] == self.num_bytes:
                return now
        raise damaged(path)

    def confirm(self, path: Path) -> Moment:
        """The file as it is now. DataError when it is not what was kept."""
        now = self.check_written(path)
        if _digest_at(path, now) != self.xxh3:
            raise damaged(path)
        return now


def damaged(path: Path) -> DataError:
    """For a file of the work that is not what was written there."""
    return DataError(
        f"{path} is damaged or was edited: it is not what this preparation wrote there; remove "
        f"{path.parent} and run the same command again"
    )


def moment(path: Path) -> Moment:
    """The file as it is now. InputChanged when it cannot be looked at."""
    try:
        stat = path.stat()
    except OSError as error:
        raise _changed(path, f": {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@contextmanager
def unchanged(path: Path, then: Stamp | Kept | None) -> Iterator[Moment | None]:
    """Around code that reads a file: InputChanged when it is not, or does not stay, what it was.
    A file without a stamp is not looked at.
    """
    if then is None:
        yield None
        return
    before = then.confirm(path)
    try:
        yield before
    except (DataError, OSError):
        # What is wrong with text that nobody wrote to stay says nothing.
        _compare(path, before)
        raise
    _compare(path, before)


def steadily(read: Callable[[], Result]) -> Result:
    """The result of reading, again where a file was touched meanwhile."""
    for _ in range(_TRIES - 1):
        try:
            return read()
        except Touched:
            continue
    return read()


def digest(path: Path) -> str:
    """xxh3 of a file in hex, read in pieces."""
    found = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            found.update(block)
    return found.hexdigest()


@lru_cache(maxsize=2**12)
def _digest_at(path: Path, now: Moment) -> str:
    found = digest(path)
    _compare(path, now)
    return found


def _compare(path: Path, before: Moment) -> None:
    now = moment(path)
    if now[:2] != before[:2]:
        raise _changed(path)
    if now != before:
        raise Touched(_changed(path).args[0])


def _changed(path: Path, why: str = "") -> InputChanged:
    return InputChanged(f"the input changed while it was being prepared ({path}{why})")
