"""An output directory belongs to the command that began it: headrace.lock.json says which.

The same command continues there, another one is refused with the difference, and a directory that
headrace did not begin is never written into. Two processes cannot hold one directory at a time.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.config import DataUsageError
from data.durable import is_leftover, read_sealed, write_sealed, writing

LOCK = "headrace.lock.json"
WORK = "headrace.work"
"""A folder in an output for what is needed until it is finished; it may come before the lock."""
FORMAT = 1
LETTING_GO_SECONDS = 1.0
WITHOUT_OPTION = frozenset({"tokenizer_bytes", "shard_bytes", "part_bytes", "seed", "kind"})
"""Settings that only a program can choose."""


def read_claim(folder: Path, kind: str) -> dict[str, Any] | None:
    """What the directory's lock says; None when it is missing or empty and so free to take.

    Raises DataUsageError for a directory that is in use for anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise DataUsageError(f"{folder} exists and is no directory; name another output")
    if not folder.exists():
        return None
    if not (folder / LOCK).is_file():
        # A kill between making the directory and renaming the lock leaves only its draft.
        names = (path.name for path in folder.iterdir())
        strangers = sorted(n for n in names if n != WORK and not is_leftover(n, of=LOCK))
        if strangers:
            raise DataUsageError(
                f"{folder} is not empty and was not begun by this command (it holds "
                f"{', '.join(strangers[:3])}); name an empty or new directory"
            )
        return None
    claim = read_sealed(folder / LOCK)
    if (claim.get("kind"), claim.get("format")) != (kind, FORMAT):
        raise DataUsageError(
            f"{folder} holds a {claim.get('kind')} of format {claim.get('format')}, not a {kind} "
            f"of format {FORMAT}; name another directory"
        )
    return claim


def write_claim(folder: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Begin a directory that is free to take."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / LOCK, {**content, "kind": kind, "format": FORMAT})


@contextmanager
def holding(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a directory, made if missing, against other processes; a kill lets go. One that was
    made goes again when an error leaves it empty.

    Processes that share it keep out only those that want it alone. Some network file systems know
    no such locks; there nobody is kept out.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _held(folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    finally:
        os.close(handle)


def _held(folder: Path, kind: int) -> int:
    """A handle of a directory that keeps others out."""
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            with suppress(OSError):
                if not _lock_soon(handle, kind):
                    raise DataUsageError(
                        f"another process is writing {folder}; wait until it has finished"
                    )
            # Whoever made it may have removed it just before it was locked.
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def is_abandoned(folder: Path) -> bool:
    """Whether a directory was held by a process that is gone; False where nobody can tell."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(handle)
    except OSError:
        return False
    finally:
        os.close(handle)


def _lock_soon(handle: int, kind: int) -> bool:
    """A program that somebody was about to start when it was killed holds the lock for a moment
    longer.
    """
    deadline = time.monotonic() + LETTING_GO_SECONDS
    while not _lock(handle, kind):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings whose values differ, as "--option: was A, is B"."""
    return [
        f"{_option(key)}: was {shown(then.get(key))}, is {shown(now.get(key))}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def another_command(what: str, found: Sequence[str], advice: str) -> DataUsageError:
    """For a directory that belongs to another command: a line for each difference."""
    lines = "\n".join(f"  {line}" for line in found)
    return DataUsageError(f"{what} by another command:\n{lines}\n{advice}")


def shown(value: Any) -> str:
    """A setting as it is given on a command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == "" or value == () or value == []:
        return "not given"
    if isinstance(value, list | tuple):
        return " ".join(shlex.quote(str(item)) for item in value)
    return str(value)


def _option(key: str) -> str:
    """What sets a setting; those that have no option go by their own name."""
    if key in WITHOUT_OPTION:
        return key
    return "--" + {"user_symbols": "symbol"}.get(key, key).replace("_", "-")
