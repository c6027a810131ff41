"""pipe:COMMAND, a program that writes a file to its standard output. Imports subprocess alone.

Only what a person wrote on a command line or in a recipe comes here, never what a manifest, a list
or a run directory names. The command is split like a shell's but no shell runs it. Its exit status
is checked; what it wrote before it failed is not used.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Generator, Iterator

from data.config import COMMAND, AccessError, DataUsageError

PLACE = "{path}"
"""What stands for the file, relative to the dataset."""
_SHELL = ("|", "||", "&&", ";", "&", "<", ">", ">>", "2>&1")
_READ_BYTES = 2**20
_STDERR_CHARACTERS = 500
# A command may hand it to a shell, here or (ssh) elsewhere: names that a manifest made up must not
# become commands there.
_PLAIN = re.compile(r"[A-Za-z0-9_=+][A-Za-z0-9._=+/-]*")


class CommandFiles:
    """The files of a dataset, each written whole by a command."""

    has_ranges = False

    def __init__(self, location: str) -> None:
        self.location = location
        self._words = _split(location.removeprefix(COMMAND), location)
        if not any(PLACE in word for word in self._words):
            raise DataUsageError(
                f"{location} does not say where the name of a file goes; write {PLACE} there, such "
                f"as 'pipe:ssh host cat /data/DATASET/{PLACE}'"
            )
        self._told = ""

    def name(self, file: str) -> str:
        """The command for a file."""
        return f"{COMMAND}{shlex.join(self._command(file))}"

    def pieces(self, file: str) -> Iterator[bytes]:
        """What the command writes for a file. AccessError when it fails, after its last piece."""
        self._told = yield from run(self._command(file))

    def account(self, file: str) -> str:
        """The command for a file, and how its last run ended."""
        return f"{self.name(file)} (status 0; it said: {self._told or 'nothing'})"

    def whole(self, file: str) -> bytes:
        """A small file."""
        return b"".join(self.pieces(file))

    def _command(self, file: str) -> list[str]:
        if not _PLAIN.fullmatch(file):
            raise DataUsageError(
                f"the dataset of {self.location} has a file called {file!r}, which no command is "
                "given: a shell behind it could take it for more than a name; copy the dataset to "
                "a directory"
            )
        return [word.replace(PLACE, file) for word in self._words]


def split_input(named: str) -> tuple[str, list[str]]:
    """Suffix and words of an input pipe:.jsonl.gz:COMMAND; DataUsageError when it is none."""
    rest = named.removeprefix(COMMAND)
    suffix, colon, command = rest.partition(":")
    if not (colon and re.fullmatch(r"(\.[A-Za-z0-9]+)+", suffix)):
        raise DataUsageError(
            f"--input {named!r} does not say what the command writes; put the suffix that such a "
            f"file would have before the command: pipe:.jsonl:{rest or 'COMMAND'}"
        )
    return suffix, _split(command, named)


def run(command: list[str]) -> Generator[bytes, None, str]:
    """The standard output of a command; returns the end of its standard error. AccessError naming
    both status and that when it fails.
    """
    shown = shlex.join(command)
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        except OSError as error:
            raise AccessError(f"{shown} cannot be started: {error.strerror}") from error
        assert process.stdout is not None, "it is piped"
        try:
            while piece := process.stdout.read(_READ_BYTES):
                yield piece
            status = process.wait()
        finally:
            # Whoever stops reading needs no more of it.
            process.stdout.close()
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(max(errors.seek(0, os.SEEK_END) - 4 * _STDERR_CHARACTERS, 0))
        told = errors.read().decode(errors="replace").strip()[-_STDERR_CHARACTERS:]
        if status != 0:
            raise AccessError(
                f"{shown} ended with status {status}, so what it wrote is not used; it said: "
                f"{told or 'nothing'}"
            )
        return told


def _split(command: str, named: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise DataUsageError(f"{named} cannot be split into words: {error}") from None
    if not words:
        raise DataUsageError(f"{named} names no command")
    if marks := [word for word in words if word in _SHELL]:
        raise DataUsageError(
            f"{named} is run without a shell, and {marks[0]} would be a word for {words[0]}; write "
            f"sh -c {shlex.quote(command)} for what a shell does"
        )
    return words
