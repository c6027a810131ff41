"""Writes that survive: after a crash a file is the old one or the new one, and never half of it.

A file is written beside its place, under a name that no other writer has, synced, renamed, and its
folder synced: two fsyncs per file. What a killed writer leaves is called NAME.xxxxxxxx.tmp: nobody
reads it, and whoever owns the folder removes it. A sealed file is canonical JSON that ends in its
own sha256, so that a flipped bit anywhere in it is found before one value is believed. A disk that
is full, read-only or failing is a StorageError, which tells path, reason and remedy; what was
finished before stays as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from data.errors import DataError

RESTORE = "; restore it from a copy, or run the same `headrace prepare` into a new directory"

_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n\Z')
_LEFTOVER = re.compile(r"\.[0-9a-f]{8}\.tmp\Z")
_SEAL_BYTES = len(',"sha256":""}\n') + 64

_FULL = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the quota there",
    errno.EROFS: "have that file system mounted for writing, or name a folder on another one",
}
_ADVICE = _FULL | {
    errno.EIO: "the disk or its server fails (`dmesg` may say more): mend it",
    errno.ESTALE: "have that file system mounted again",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`)",
    errno.EACCES: "get the right to write there",
    errno.EPERM: "get the right to write there",
}


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StorageError(ValueError):
    """Storage that takes no more: full, read-only, failing or not ours to write."""

    exit_code: ClassVar[int] = 1


def told(error: OSError) -> StorageError | None:
    """The message for an error that came from anywhere; None when it need not be about writing."""
    return _storage_error(error, "a file") if error.errno in _FULL else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that only writes `path`: storage that refuses is a StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise _storage_error(error, str(path)) from error


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file as a whole. StorageError leaves the old content and nothing beside it."""
    write_stream(path, (content,))


def write_stream(
    path: Path, pieces: Iterable[bytes], *, check: Callable[[], None] = lambda: None
) -> None:
    """`write_durably` of what comes in pieces; an error of theirs, too, leaves the old content and
    nothing beside it, and so does one of `check`, called when all is on disk but the name.
    """
    # Two that write one path at once have a file each, and the last rename wins as a whole.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            with temporary.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            check()
            publish(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def is_leftover(name: str, *, of: str = "") -> bool:
    """Whether a name is one under which a file is written, that of the file `of` if it is given."""
    found = _LEFTOVER.search(name)
    return found is not None and of in ("", name[: found.start()])


def remove_leftovers(*folders: Path) -> None:
    """Remove what killed writers have left in folders, not below them; nobody else may be writing
    there. One that stays, as on storage that refuses, is room alone: nobody reads it.
    """
    for folder in folders:
        with suppress(OSError):
            for path in folder.iterdir():
                if is_leftover(path.name):
                    path.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Rename a synced file to its final name and sync the folder."""
    with writing(path):
        os.replace(temporary, path)
        sync(path.parent)


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync a folder of files and rename it; OSError when `path` holds something by now."""
    with writing(path):
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Push a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(
    path: Path, content: Mapping[str, Any], *, check: Callable[[], None] = lambda: None
) -> str:
    """Write canonical JSON that ends in its own sha256; returns the sha256 of the whole file.
    `check` as in `write_stream`.
    """
    body = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    seal = hashlib.sha256(body).hexdigest()
    sealed = body[:-1] + f',"sha256":"{seal}"}}\n'.encode()
    write_stream(path, (sealed,), check=check)
    return hashlib.sha256(sealed).hexdigest()


def read_sealed(
    path: Path, *, remedy: str = RESTORE, error: type[ValueError] = DataError
) -> dict[str, Any]:
    """What `write_sealed` wrote. An `error` that ends in `remedy` when a bit has changed."""
    body = read_seal(path, remedy=remedy, error=error)
    content: dict[str, Any] = parsed(body, str(path), remedy=remedy, error=error)
    return content


def read_seal(path: Path, *, remedy: str = RESTORE, error: type[ValueError] = DataError) -> bytes:
    """The JSON text that `read_sealed` parses, checked and without its seal."""
    try:
        raw = path.read_bytes()
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}{remedy}") from failure
    return unsealed(raw, str(path), remedy=remedy, error=error)


def unsealed(
    raw: bytes, name: str, *, remedy: str = RESTORE, error: type[ValueError] = DataError
) -> bytes:
    """The JSON text of a sealed file's bytes, checked and without its seal."""
    seal = _SEAL.match(raw[-_SEAL_BYTES:])
    body = hashlib.sha256(memoryview(raw)[:-_SEAL_BYTES])
    body.update(b"}")
    if seal is None or body.hexdigest() != seal[1].decode():
        raise error(
            f"{name} is damaged or was edited: its content does not match the sha256 at its end"
            f"{remedy}"
        )
    return raw[:-_SEAL_BYTES] + b"}"


def parsed(
    body: bytes, name: str, *, remedy: str = RESTORE, error: type[ValueError] = DataError
) -> Any:
    """What the JSON text of a sealed file says. A seal does not tell who wrote it: text that no
    parser takes, such as deep nesting or a number of thousands of digits, is an `error`.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as failure:
        raise error(f"{name} holds what no headrace writes: {failure}{remedy}") from None


def is_sealed(raw: bytes) -> bool:
    """Whether a file's bytes end like a sealed one; its content is not checked."""
    return _SEAL.match(raw[-_SEAL_BYTES:]) is not None


class RowFile:
    """JSON lines that are only appended to. A row is there as a whole or, when storage refuses it,
    not at all; a line that a crash has torn is ended before the next row, which it would swallow.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            # Unbuffered: what was refused must not be written later, at a close.
            self._file = path.open("a+b", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        with writing(self._path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                self._write(self._line_start(end) + json.dumps(row).encode() + b"\n")
            except OSError:
                with suppress(OSError):
                    self._file.truncate(end)
                raise

    def sync(self) -> None:
        """Push all rows to the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; rows that were not synced may still be refused by a server."""
        with writing(self._path):
            self._file.close()

    def _line_start(self, end: int) -> bytes:
        if end == 0:
            return b""
        self._file.seek(end - 1)
        return b"" if self._file.read(1) == b"\n" else b"\n"

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none where it is not there; a line that a crash of the
    machine has torn, or that is no row, is left out, and the others still count.
    """
    return rows_of(path.read_bytes().splitlines() if path.is_file() else ())


def rows_of(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The rows among lines of JSON."""
    rows = []
    for line in lines:
        # What deep nesting raises, which only something foreign has.
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _storage_error(error: OSError, path: str) -> StorageError:
    # By the name that people know.
    where = _LEFTOVER.sub("", error.filename if isinstance(error.filename, str) else path)
    reason, advice = os.strerror(error.errno or 0), _ADVICE[error.errno or 0]
    if error.errno == errno.ENOSPC and _has_no_inode(Path(where)):
        reason = "No inode is left there, so no further file can be made, although bytes are free"
        advice = "remove files from that disk"
    return StorageError(
        f"{where} cannot be written: {reason}; {advice}, then run the same command again: what was "
        "finished is kept"
    )


def _has_no_inode(path: Path) -> bool:
    """Whether it is for want of inodes, and not of bytes, that a disk is full."""
    with suppress(OSError, StopIteration):
        room = os.statvfs(next(folder for folder in path.absolute().parents if folder.exists()))
        return room.f_files > 0 and room.f_favail == 0 and room.f_bavail > 0
    return False
