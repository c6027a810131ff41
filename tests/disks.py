"""Real file systems that are small, full or read-only: tmpfs, mounted for the length of a test."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

FILLER = ".filler"


@contextmanager
def small_disk(folder: Path, kilobytes: int, *, inodes: int = 0) -> Iterator[Path]:
    """A file system of this size at `folder`, with so many inodes (0: plenty); the test is skipped
    where mounting is not allowed.
    """
    if os.geteuid() != 0:
        _without_disk("a small disk is a tmpfs, and only root may mount one")
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={kilobytes}k,nr_inodes={inodes}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, leave_kilobytes: int = 0) -> None:
    """Take all of the disk but this much."""
    room = os.statvfs(disk)
    with (disk / FILLER).open("ab") as file:
        file.write(bytes(room.f_bavail * room.f_bsize - leave_kilobytes * 1024))


def make_room(disk: Path) -> None:
    """Give back what `fill` took."""
    (disk / FILLER).unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing can be written there inside."""
    _mount("-o", "remount,ro", str(disk))
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def _mount(*argv: str) -> None:
    done = subprocess.run(["mount", *argv], capture_output=True, text=True)
    if done.returncode != 0:
        _without_disk(f"this machine allows no mount: {done.stderr.strip()}")


def _without_disk(reason: str) -> NoReturn:
    """A person's machine may be as it is; where CI cannot mount, the tests would never run."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must")
    pytest.skip(reason)
