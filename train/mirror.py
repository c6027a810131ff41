"""A second place for committed checkpoints, kept in the background: MIRROR/NAME-OF-RUN/step-*/...

What was committed is copied file by file, each chunk held against its hash on the way, and the
manifest last: a copy without one does not exist. The rule by which checkpoints stay in the run
holds here, too. An attempt that has lost the run changes nothing: it looks before each call that
would, and once more when the last byte of a file is read. No torch here.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import xxhash

from data.config import DataUsageError
from data.durable import is_leftover, write_durably
from data.store import FolderStore, Store, store_of
from train.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    step_folder,
    step_of,
)
from train.manifest import parsed_manifest
from train.patience import insisting
from train.retention import Committed, Retention, retained
from train.slice_reader import HASH_BYTES

RUN_FILES = ("attempts.jsonl", "phases.jsonl", "events.jsonl", "config.json")
"""What a resume reads besides a checkpoint. config.json comes last: a run that has it has all."""
TORN = object()

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class MirrorError(ValueError):
    """A mirror that does not answer: its copies may be whole, so nobody may go on as if there were
    none.
    """

    exit_code: ClassVar[int] = 1


class Mirror:
    """The copies of one run."""

    def __init__(
        self, location: str, run: Path, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        """DataUsageError when nobody can write to such a place. What `check_owner` raises keeps the
        copies as they are.
        """
        place = f"{location.rstrip('/')}/{run.absolute().name}"
        if "://" not in location and Path(place).absolute() == run.absolute():
            raise DataUsageError(
                f"checkpoint.mirror={location} is where {run} itself lies; name another folder"
            )
        self._run = run
        self._check_owner = check_owner
        self._store: Store = store_of(place)
        self.location = self._store.path("").rstrip("/")
        """What messages call it."""
        self.went_on = time.monotonic()
        """When a piece of a file was taken last, there or here, by time.monotonic()."""
        self.is_given_up = False
        """Whether the copy that is being made is to fail: the run removes what is copied."""

    def check_same_run(self) -> None:
        """DataUsageError when the copies there are those of another run of this name: each would
        take the other's for a history that was left. MirrorError when nobody can tell.
        """
        name = "config.json"
        if name not in self._names() or not (self._run / name).is_file():
            return
        there = _id_of(b"".join(self._read(name)))
        here = _id_of((self._run / name).read_bytes())
        if there is TORN:
            # An upload was cut; the next one brings it again, if the copies are ours.
            if not self._has_first_attempt():
                raise MirrorError(
                    f"{self._store.path(name)} is damaged, and does not tell whose the copies "
                    "beside it are; if they are of this run remove it, and the next copy brings it "
                    "again, or name another folder with checkpoint.mirror=..."
                )
        elif here is not TORN and there != here:
            raise DataUsageError(
                f"the mirror {self.location} holds the checkpoints of another run that is called "
                f"{self._run.absolute().name}, too (id {there} there, {here} in "
                f"{self._run / 'config.json'}); name another folder with checkpoint.mirror=..., or "
                "remove that one"
            )

    def steps(self) -> list[int]:
        """Steps with a manifest, newest first; nothing is verified yet. MirrorError when the place
        cannot be looked into.
        """
        names = [name.rpartition("/") for name in self._names()]
        found = [step_of(folder) for folder, _, file in names if file == MANIFEST]
        return sorted((step for step in found if step is not None), reverse=True)

    def open(self, step: int) -> Checkpoint:
        """The manifest of a copy; its `folder` is where it would lie in the run. CheckpointError
        when it is damaged; here and below MirrorError when the place does not answer.
        """
        name = f"{step_folder(self._run, step).name}/{MANIFEST}"
        manifest = parsed_manifest(b"".join(self._read(name)), self._store.path(name))
        if manifest["step"] != step:
            raise CheckpointError(f"{self._store.path(name)} is of step {manifest['step']}")
        return Checkpoint(step_folder(self._run, step), manifest)

    def check_sizes(self, saved: Checkpoint) -> None:
        """CheckpointError when a file of a copy is missing or has not the size that was written."""
        for entry in saved.manifest["files"]:
            name = f"{saved.folder.name}/{entry['name']}"
            size = self._size(name)
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{self._store.path(name)} has {size} bytes, {entry['bytes']} were written"
                )

    def copy_out(self, step: int) -> None:
        """Copy a checkpoint of the run, and what a resume reads besides. CheckpointError when it is
        damaged, DataUsageError when the place is another run's, and whatever error the place has.
        """
        self.check_same_run()
        saved = open_checkpoint(self._run, step)
        folder, source = saved.folder.name, FolderStore(saved.folder)
        self._remove(step)
        for name in filter(is_leftover, self._names()):
            self._remove_file(name)
        for name in RUN_FILES:
            if (self._run / name).is_file():
                self._write(name, [(self._run / name).read_bytes()])
        for entry in saved.manifest["files"]:
            name = entry["name"]
            self._write(
                f"{folder}/{name}", checked(source.read(name), entry, str(saved.folder / name))
            )
        self.check_sizes(saved)
        self._write(f"{folder}/{MANIFEST}", source.read(MANIFEST))

    def copy_back(self, saved: Checkpoint, names: Iterable[str]) -> None:
        """Copy these files of a copy into the folder that was begun for it in the run.
        CheckpointError names the file and chunk that is not what was written.
        """
        target = FolderStore(saved.folder)
        for entry in saved.manifest["files"]:
            if entry["name"] in names:
                name = f"{saved.folder.name}/{entry['name']}"
                pieces = checked(self._read(name), entry, self._store.path(name))
                target.write(entry["name"], self._going_on(pieces))

    def commit_back(self, saved: Checkpoint) -> None:
        """Copy the manifest, when every file is back."""
        raw = b"".join(self._read(f"{saved.folder.name}/{MANIFEST}"))
        write_durably(saved.folder / MANIFEST, raw)

    def run_files_back(self) -> None:
        """Copy what a resume reads besides into a run that was lost as a whole."""
        there = self._names()
        for name in (name for name in RUN_FILES if name in there):
            log.info("%s is copied back from the mirror %s", name, self.location)
            self._run.mkdir(parents=True, exist_ok=True)
            write_durably(self._run / name, b"".join(self._read(name)))

    def prune(self, rule: Retention, *, newest: int) -> None:
        """Remove the copies that the rule does not keep, and what is of a history that was left."""
        rows = []
        for step in self.steps():
            when = None
            with suppress(CheckpointError):
                when = self.open(step).time if rule.every_hours else None
            if step <= newest:
                rows.append(Committed(step, when))
        kept = retained(rows, rule)
        for folder in sorted({name.rpartition("/")[0] for name in self._names()}):
            number = step_of(folder)
            if number is not None and number not in kept:
                self._remove(number)

    def verified(self, step: int) -> Checkpoint:
        """A copy of which every byte was read; CheckpointError names what is damaged."""
        saved = self.open(step)
        for entry in saved.manifest["files"]:
            name = f"{saved.folder.name}/{entry['name']}"
            for _ in checked(self._read(name), entry, self._store.path(name)):
                pass
        return saved

    def bytes_of(self, saved: Checkpoint) -> int:
        """Of the files of a copy and its manifest."""
        manifest = self._size(f"{saved.folder.name}/{MANIFEST}")
        return manifest + sum(int(entry["bytes"]) for entry in saved.manifest["files"])

    def _has_first_attempt(self) -> bool:
        """Whether the attempts told of there begin with the first one of this run."""
        name = "attempts.jsonl"
        if name not in self._names() or not (self._run / name).is_file():
            return False
        first, end, _ = (self._run / name).read_bytes().partition(b"\n")
        return bool(end) and b"".join(self._read(name)).startswith(first + end)

    def _names(self) -> list[str]:
        return self._ask("", self._store.names)

    def _size(self, name: str) -> int:
        return self._ask(name, lambda: self._store.size(name))

    def _read(self, name: str) -> Iterator[bytes]:
        """A file, piece by piece."""
        done, pieces = 0, self._store.read(name)

        def piece() -> bytes:
            nonlocal pieces
            try:
                return next(pieces, b"")
            except OSError:
                # It has ended with its error; another one goes on where it stood.
                pieces = self._store.read(name, done)
                raise

        while found := self._ask(name, piece):
            done += len(found)
            yield found

    def _ask(self, name: str, ask: Callable[[], Answer]) -> Answer:
        """CheckpointError when that file is missing, MirrorError when the place does not answer."""
        try:
            return insisting(ask)
        except FileNotFoundError:
            raise CheckpointError(f"{self._store.path(name)} is missing") from None
        # What the library of a place raises is not known.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise MirrorError(f"the mirror {self.location} cannot be read: {reason}") from error

    def _remove(self, step: int) -> None:
        folder = step_folder(self._run, step).name
        # Without its manifest a copy is garbage at once.
        self._remove_file(f"{folder}/{MANIFEST}")
        self._remove_file(folder)

    def _remove_file(self, name: str) -> None:
        self._check_owner()
        self._store.remove(name)

    def _write(self, name: str, pieces: Iterable[bytes]) -> None:
        def owned() -> Iterator[bytes]:
            yield from self._going_on(pieces)
            # Copying takes minutes; in a folder the file gets its name after this.
            self._check_owner()

        self._check_owner()
        self._store.write(name, owned())

    def _going_on(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            if self.is_given_up:
                raise MirrorError("the run needed its room before it was copied")
            yield piece
            self.went_on = time.monotonic()


def _id_of(config: bytes) -> Any:
    """By which a run is told from others of its name; None where it is older than that."""
    try:
        content = json.loads(config)
    except (ValueError, RecursionError):
        return TORN
    return content.get("id") if isinstance(content, dict) else TORN


def checked(pieces: Iterable[bytes], entry: Mapping[str, Any], path: str) -> Iterator[bytes]:
    """The pieces of a file, each handed on when its chunks are what was written. CheckpointError
    names the first that is not, and a file that is too short or too long.
    """
    hashes, size = bytes.fromhex(entry["chunks"]), int(entry["chunk_bytes"])
    number, total, rest = 0, 0, b""
    for piece in pieces:
        total += len(piece)
        rest += piece
        whole = len(rest) // size * size
        number = _check(memoryview(rest)[:whole], number, size, hashes, path)
        yield rest[:whole]
        rest = rest[whole:]
    if total != entry["bytes"]:
        raise CheckpointError(f"{path} has {total} bytes, {entry['bytes']} were written")
    _check(memoryview(rest), number, size, hashes, path)
    yield rest


def _check(data: memoryview, number: int, size: int, hashes: bytes, path: str) -> int:
    """Check chunks from this number on; returns the next one."""
    for first in range(0, len(data), size):
        expected = hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]
        if xxhash.xxh3_64_digest(data[first : first + size]) != expected:
            raise CheckpointError(
                f"{path}: chunk {number} (from byte {number * size}) is not what was written"
            )
        number += 1
    return number
