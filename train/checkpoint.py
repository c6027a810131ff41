"""Checkpoint v1: what is on disk, and when it counts.

    RUN/checkpoints/step-000000500/rank-00000.safetensors ...  manifest.json

Each rank writes flat fp32 ranges of every parameter and optimizer state that it owns; ranges of all
ranks tile every parameter exactly once, so a checkpoint loads at any ZeRO stage and world size.
manifest.json is written last and is the only commit point: a folder without it is garbage, whatever
else it holds. It is sealed (data/durable.py), has the inventory of the model, and an xxh3 of every
chunk of every file, checked while it is read. No torch here, so that the protocol can be killed a
thousand times a minute in tests.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import sync, write_sealed, writing
from train.inventory import Inventory, Parameter, sizes_of
from train.manifest import FORMAT, VERSION, read_manifest
from train.patience import insisting
from train.retention import Committed, Retention, retained
from train.slice_reader import FileReader, SliceReader
from train.slices import CheckpointError as CheckpointError
from train.slices import Damage
from train.tables import Tables, columns, flat_table

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened: its manifest is read and verified, its tensors are not."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self.manifest["step"])

    @property
    def time(self) -> float:
        """When it was committed, in seconds since 1970 by the clock of rank 0's machine."""
        # The first manifests had no time; a copy of such a run tells when it was copied.
        return float(self.manifest.get("time") or (self.folder / MANIFEST).stat().st_mtime)

    @property
    def state(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors: data position, config hash, tokenizer."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    @cached_property
    def inventory(self) -> Inventory:
        """Every parameter of the model, by name; those that are trained are stored."""
        return {name: Parameter(**one) for name, one in self.manifest["parameters"].items()}

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter that is stored, by name."""
        return {name: tuple(one.shape) for name, one in self.inventory.items() if one.trainable}

    @property
    def keys(self) -> tuple[str, ...]:
        """`param` and the optimizer states that are stored for at least one parameter."""
        return tuple(
            dict.fromkeys(key for entry in self.manifest["files"] for key in entry["tensors"])
        )

    @property
    def scalars(self) -> dict[str, float]:
        """Optimizer state that is one number for the whole model, such as AdamW's `step`."""
        return dict(self.manifest["scalars"])

    def read(self, name: str, key: str = "param") -> np.ndarray:
        """A whole parameter (or its optimizer state) as a float32 array of its shape."""
        shape = self.parameters[name]
        size = int(np.prod(shape, dtype=np.int64))
        return self.reader.read(name, key, 0, size).reshape(shape)

    @cached_property
    def reader(self) -> SliceReader:
        """Reads ranges of what is stored."""
        return SliceReader(self.folder, self.manifest)

    def check_sizes(self) -> None:
        """CheckpointError when a file is missing or has not the size that was written."""
        for entry in self.manifest["files"]:
            FileReader(self.folder / entry["name"], entry)

    def verify(self) -> None:
        """Read every byte; CheckpointError names the first file and chunk that is not what was
        written.
        """
        for damage in self.damages():
            raise damage

    def damages(self) -> Iterator[Damage]:
        """Read every byte; each file or chunk that is not what was written."""
        for entry in self.manifest["files"]:
            try:
                reader = FileReader(self.folder / entry["name"], entry)
            except Damage as damage:
                yield damage
                continue
            yield from reader.damages()


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of this step lies."""
    return run / "checkpoints" / f"step-{step:09d}"


def step_of(folder: str) -> int | None:
    """The step of a checkpoint's folder, by its name; None when it is none."""
    match = re.fullmatch(r"step-(\d{9})", folder)
    return int(match[1]) if match else None


def begin(run: Path, step: int) -> Path:
    """An empty folder for this step; what an earlier attempt left there is removed, its manifest
    first. One rank only.
    """
    folder = step_folder(run, step)
    with writing(folder):
        _remove(folder)
        folder.mkdir(parents=True)
    return folder


def commit(
    folder: Path,
    *,
    step: int,
    parameters: Inventory,
    scalars: Mapping[str, float],
    state: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make the checkpoint exist. One rank only, after every rank's file is on disk.

    `check` has the last word, when the manifest lacks its name alone: what it raises leaves the
    checkpoint uncommitted.
    """
    inventory = {name: one.model_dump() for name, one in parameters.items()}
    sizes = sizes_of(inventory)
    numbers = {name: number for number, name in enumerate(sorted(sizes))}
    files = [
        {**entry, "tables": [flat_table(table, numbers) for table in entry["tables"]]}
        for entry in files
    ]
    Tables(
        sizes, [{**entry, "tables": [*map(columns, entry["tables"])]} for entry in files]
    ).check_tiling()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "time": time.time(),
        "parameters": inventory,
        "scalars": dict(scalars),
        "state": dict(state),
        "files": files,
    }
    with writing(folder):
        # The names of the files and of their folder, before a manifest vouches for them.
        for path in (folder, folder.parent, folder.parent.parent):
            sync(path)
    write_sealed(folder / MANIFEST, manifest, check=check)


def discard(run: Path, step: int) -> None:
    """Give back the room of a checkpoint that could not be committed. One rank only."""
    folder = step_folder(run, step)
    with suppress(CheckpointError):
        if not _is_committed(folder):
            shutil.rmtree(folder, ignore_errors=True)


def discard_step(run: Path, step: int) -> None:
    """Remove a checkpoint that the run is not to go on from. One rank only."""
    with writing(run / "checkpoints"):
        _remove(step_folder(run, step))


def committed(run: Path) -> list[int]:
    """Steps with a manifest, newest first; nothing is verified yet."""
    found = [folder for folder in reversed(folders_of(run)) if _is_committed(folder)]
    return [int(folder.name.removeprefix("step-")) for folder in found]


def uncommitted(run: Path) -> list[Path]:
    """Folders of saves that were cut before their commit, or of checkpoints whose removal was; the
    oldest first.
    """
    return [folder for folder in folders_of(run) if not _is_committed(folder)]


def folders_of(run: Path) -> list[Path]:
    """Every folder of a checkpoint, committed or not, the oldest first; none of the copies that
    somebody has put beside them. CheckpointError when nobody can tell.
    """
    place = run / "checkpoints"
    try:
        names = insisting(lambda: os.listdir(place))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _not_seen(place, error) from error
    return [place / name for name in sorted(names) if step_of(name) is not None]


def completed_steps(run: Path) -> int:
    """Steps of the newest checkpoint whose files are there; the load tells of others."""
    for step in committed(run):
        try:
            open_checkpoint(run, step).check_sizes()
        except CheckpointError:
            continue
        return step
    return 0


def open_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest one; CheckpointError when there is none or its
    manifest is damaged.
    """
    steps = committed(run)
    if step is None:
        if not steps:
            raise CheckpointError(
                f"{run} holds no committed checkpoint; train it with `headrace pretrain ... --run "
                f"{run}`"
            )
        step = steps[0]
    if step not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(
            f"{run} holds no committed checkpoint of step {step}; committed steps: {have}"
        )
    folder = step_folder(run, step)
    saved = Checkpoint(folder, read_manifest(folder / MANIFEST))
    if saved.step != step:
        raise CheckpointError(
            f"{folder / MANIFEST} is the manifest of step {saved.step}, not of step {step}: "
            "another checkpoint was copied over this one"
        )
    return saved


def retire(run: Path, rule: Retention, *, newest: int, in_use: Collection[int] = ()) -> list[Path]:
    """Take back all committed checkpoints but those in use and those that stay by the rule, among
    which the one of step `newest` counts as the last. Returns what `remove` may take its time
    with: their folders and uncommitted leftovers, the oldest first.

    Later ones are of a history that was left (they were damaged when the run went on from an
    earlier one) and go too.
    """
    kept = retained(committed_until(run, newest, timed=rule.every_hours > 0), rule)
    return retire_but(run, kept | set(in_use))


def retire_but(run: Path, kept: Collection[int]) -> list[Path]:
    """Take back every checkpoint but those of these steps; returns their folders and uncommitted
    leftovers, the oldest first.
    """
    folders = {step_folder(run, step) for step in kept}
    with writing(run / "checkpoints"):
        found = [folder for folder in folders_of(run) if folder not in folders]
        for folder in found:
            (folder / MANIFEST).unlink(missing_ok=True)
    return found


def remove(folders: Iterable[Path], *, goes_on: Callable[[], None] = lambda: None) -> None:
    """Remove folders that count for nothing; `goes_on` is called before each."""
    for folder in folders:
        goes_on()
        try:
            with writing(folder):
                shutil.rmtree(folder)
        except OSError as error:
            # Who makes room by hand may come first, and NFS keeps the name of a file that somebody
            # reads. What is left is found again.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
                raise


def committed_until(run: Path, newest: int, *, timed: bool = True) -> Iterator[Committed]:
    """The checkpoints up to a step, with their times when `timed`; that reads every manifest."""
    for step in committed(run):
        time = None
        if timed:
            with suppress(CheckpointError, OSError):
                time = open_checkpoint(run, step).time
        if step <= newest:
            yield Committed(step, time)


def _is_committed(folder: Path) -> bool:
    """Whether there is a manifest. A file server that does not answer has not said no: what counts
    as garbage is removed.
    """
    try:
        insisting((folder / MANIFEST).stat)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _not_seen(folder, error) from error
    return True


def _not_seen(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be looked into: {error.strerror}; mend that, then run the same command "
        "again: no checkpoint was removed"
    )


def _remove(folder: Path) -> None:
    if folder.exists():
        # Without its manifest the folder is garbage at once, even if the removal is interrupted.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
