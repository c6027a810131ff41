"""Checkpoint v1: what is on disk, and when it counts.

    RUN/checkpoints/step-000000500/rank-00000.safetensors ...  manifest.json

Each rank writes flat fp32 ranges of every parameter and optimizer state that it owns; ranges of all
ranks tile every parameter exactly once, so a checkpoint loads at any ZeRO stage and world size.
manifest.json is written last and is the only commit point: a folder without it is garbage, whatever
else it holds. It is sealed (data/durable.py) and has an xxh3 of every 16 MiB chunk of every file,
checked while it is read. No torch here, so that the protocol can be killed a thousand times a
minute in tests.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import sync, write_sealed, writing
from train.manifest import FORMAT, VERSION, read_manifest
from train.slices import CheckpointError as CheckpointError
from train.slices import FileReader, SliceReader, check_tiling

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
    def state(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors: data position, config hash, tokenizer."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        return {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}

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
        return (
            SliceReader(self.folder, self.manifest["files"]).read(name, key, 0, size).reshape(shape)
        )

    def check_sizes(self) -> None:
        """CheckpointError when a file is missing or has not the size that was written."""
        for entry in self.manifest["files"]:
            FileReader(self.folder / entry["name"], entry)

    def verify(self) -> None:
        """Read every byte; CheckpointError names the first file and chunk that is not what was
        written.
        """
        for entry in self.manifest["files"]:
            reader = FileReader(self.folder / entry["name"], entry)
            for chunk in range(len(entry["chunks"])):
                reader.chunk(chunk)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of this step lies."""
    return run / "checkpoints" / f"step-{step:09d}"


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
    parameters: Mapping[str, Sequence[int]],
    scalars: Mapping[str, float],
    state: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make the checkpoint exist. One rank only, after every rank's file is on disk.

    `check` has the last word: what it raises leaves the checkpoint uncommitted.
    """
    check_tiling(parameters, files)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "parameters": {name: list(shape) for name, shape in parameters.items()},
        "scalars": dict(scalars),
        "state": dict(state),
        "files": list(files),
    }
    with writing(folder):
        # The names of the files and of their folder, before a manifest vouches for them.
        for path in (folder, folder.parent, folder.parent.parent):
            sync(path)
    check()
    write_sealed(folder / MANIFEST, manifest)


def discard(run: Path, step: int) -> None:
    """Give back the room of a checkpoint that could not be committed. One rank only."""
    folder = step_folder(run, step)
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)


def discard_step(run: Path, step: int) -> None:
    """Remove a checkpoint that the run is not to go on from. One rank only."""
    with writing(run / "checkpoints"):
        _remove(step_folder(run, step))


def committed(run: Path) -> list[int]:
    """Steps with a manifest, newest first; nothing is verified yet."""
    steps = []
    for path in (run / "checkpoints").glob("step-*/manifest.json"):
        if match := re.fullmatch(r"step-(\d{9})", path.parent.name):
            steps.append(int(match[1]))
    return sorted(steps, reverse=True)


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
    return Checkpoint(folder, read_manifest(folder / MANIFEST))


def newest_intact(run: Path, *, but: int) -> int | None:
    """The newest step but this one whose checkpoint verifies; reads all of it."""
    for step in committed(run):
        with suppress(CheckpointError, OSError):
            if step != but:
                open_checkpoint(run, step).verify()
                return step
    return None


def retraining(run: Path, damaged: int, *, intact: int | None) -> str:
    """What to do about a damaged checkpoint, when `newest_intact` has found that or no other."""
    folder = step_folder(run, damaged)
    if intact is None:
        return (
            f"no other checkpoint of {run} is intact: put back a copy of {folder}, or train again "
            "with another --run"
        )
    if intact > damaged:
        return f"the checkpoint of step {intact} is intact"
    return (
        f"the checkpoint of step {intact} is intact: remove {folder}, and the same training "
        f"command goes on from step {intact}"
    )


def prune(run: Path, keep: int, *, newest: int) -> None:
    """Remove all but `keep` committed checkpoints, the one of step `newest` and those before it.

    Later ones are of a history that was left (they were damaged when the run went on from an
    earlier one) and go too, as do uncommitted leftovers.
    """
    kept = {step_folder(run, step) for step in [s for s in committed(run) if s <= newest][:keep]}
    with writing(run / "checkpoints"):
        for folder in (run / "checkpoints").glob("step-*"):
            if folder not in kept:
                _remove(folder)


def _remove(folder: Path) -> None:
    if folder.exists():
        # Without its manifest the folder is garbage at once, even if the removal is interrupted.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
