"""What checkpoints a run has, what is wrong with them, and which of them a resume takes. No torch.

Listing opens manifests and asks for the sizes of files; verifying reads every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.config import DataUsageError
from train.attempts import attempts
from train.checkpoint import (
    MANIFEST,
    Checkpoint,
    committed,
    completed_steps,
    open_checkpoint,
    step_folder,
)
from train.choice import Choice, choose
from train.mirror import Mirror, MirrorError
from train.slices import CheckpointError, Damage


@dataclass(frozen=True)
class Listed:
    """A folder of checkpoints/. What an unreadable manifest would tell is None."""

    step: int
    time: float | None = None
    """Of the commit, in seconds since 1970."""
    bytes: int | None = None
    """Of its files, the manifest among them, as they were written."""
    files: int | None = None
    world_size: int | None = None
    """Ranks that wrote it."""
    zero_stage: int | None = None
    """None where no attempt of the run says so, as in a copy of the checkpoints alone."""
    attempt: int | None = None
    tokens: int | None = None
    """Targets that had been trained on."""
    problem: str | None = None
    mirror: str | None = None
    """Where it is, when it is a copy in the mirror; None for the run's own."""


@dataclass(frozen=True)
class Listing:
    """What a run and its mirror hold."""

    checkpoints: tuple[Listed, ...]
    mirror_problem: str | None = None
    """Why nothing is told of the copies there."""


@dataclass(frozen=True)
class Damaged:
    """What is wrong with a checkpoint: a file, or one chunk of it."""

    step: int
    file: str
    chunk: int | None
    """Counted from 0; None where the whole file is meant."""
    message: str


@dataclass(frozen=True)
class Verification:
    """What reading every byte has found."""

    run: str
    steps: tuple[int, ...]
    """Newest first."""
    bytes_read: int
    damages: tuple[Damaged, ...]
    """Of the run's own."""
    choice: Choice
    mirror: str | None = None
    """Where the one that is taken lies, when that is the mirror."""
    mirror_problem: str | None = None
    """Why the choice was made without asking the mirror."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        taken = self.choice.taken
        return {
            "run": self.run,
            "ok": not self.damages,
            "steps": list(self.steps),
            "bytes_read": self.bytes_read,
            "damages": [asdict(damage) for damage in self.damages],
            "resume_takes": None if taken is None else taken.step,
            "passed_over": [asdict(passed) for passed in self.choice.passed_over],
            "mirror": self.mirror,
            "mirror_problem": self.mirror_problem,
        }


def list_checkpoints(run: Path) -> Listing:
    """Every checkpoint of a run, newest first, and what an interrupted save has left; then those in
    the mirror that its last attempt had.
    """
    check_is_run(run)
    stages = {row["attempt"]: _zero_stage(row) for row in attempts(run) if "config" in row}
    rows = [_listed(run, step, stages) for step in committed(run)]
    for folder in (run / "checkpoints").glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal() and not (folder / MANIFEST).exists():
            rows.append(Listed(int(number), problem="not committed: a save was interrupted"))
    rows.sort(key=lambda row: -row.step)
    copies = _Copies(run)
    return Listing((*rows, *copies.listed(stages)), copies.problem)


def verify(run: Path, step: int | None = None) -> Verification:
    """Read every byte of one checkpoint or of all. CheckpointError when there is none.

    With `step`, the checkpoints that a resume would try are read, too; none is read twice. Of the
    mirror what a resume would take from there is read: a copy of one that is damaged, or newer.
    """
    check_is_run(run)
    steps, copies = committed(run), _Copies(run)
    if not (steps or copies.steps) or (step is not None and step not in steps):
        # It says which there are.
        open_checkpoint(run, step)
    found: dict[int, list[Damaged]] = {}
    num_bytes: dict[int, int] = {}

    def read(run: Path, number: int) -> Checkpoint:
        if number not in found:
            try:
                saved = open_checkpoint(run, number)
            except CheckpointError as error:
                found[number] = [Damaged(number, MANIFEST, None, str(error))]
            else:
                num_bytes[number] = sum(entry["bytes"] for entry in saved.manifest["files"])
                found[number] = [_damaged(number, damage) for damage in saved.damages()]
        if found[number]:
            raise CheckpointError(found[number][0].message)
        return open_checkpoint(run, number)

    for number in steps if step is None else [step]:
        with suppress(CheckpointError):
            read(run, number)

    def take(run: Path, number: int) -> Checkpoint:
        reason = f"{step_folder(run, number)} is lost"
        if number in steps:
            try:
                return read(run, number)
            except CheckpointError as error:
                reason = str(error)
        return copies.taken(number, reason)

    done = completed_steps(run)
    newer = {number for number in copies.steps if number > done}
    choice = choose(run, sorted({*steps, *newer}, reverse=True), take=take)
    looked_at = tuple(sorted(found, reverse=True))
    return Verification(
        run=str(run),
        steps=looked_at,
        bytes_read=sum(num_bytes.values()),
        damages=tuple(damage for number in looked_at for damage in found[number]),
        choice=choice,
        mirror=copies.location if copies.is_taken else None,
        mirror_problem=copies.problem,
    )


def check_is_run(run: Path) -> None:
    """CheckpointError for a folder that has nothing of a run, or is a mirror's copy of one."""
    if any(run.glob(f"step-*/{MANIFEST}")):
        raise CheckpointError(
            f"{run} is a mirror's copy of a run: name the run itself, whose mirror is looked at, "
            "too; if it is lost, its training command copies it back from here"
        )
    if not (run / "config.json").is_file() and not (run / "checkpoints").is_dir():
        raise CheckpointError(
            f"{run} is no run directory: it has neither config.json nor checkpoints; name the "
            "folder that --run named in training"
        )


def _listed(run: Path, step: int, stages: Mapping[int, int | None]) -> Listed:
    try:
        saved = open_checkpoint(run, step)
    except CheckpointError as error:
        return Listed(step, problem=str(error))
    size = sum(entry["bytes"] for entry in saved.manifest["files"])
    size += (step_folder(run, step) / MANIFEST).stat().st_size
    return _told(saved, stages, size, saved.check_sizes)


class _Copies:
    """What the mirror holds that the run's last attempt had, as long as it answers."""

    def __init__(self, run: Path) -> None:
        self.location = ""
        self.steps: list[int] = []
        self.is_taken = False
        self.problem: str | None = None
        tables = [row["config"].get("checkpoint", {}) for row in attempts(run) if "config" in row]
        location = tables[-1].get("mirror", "") if tables else ""
        if not location:
            return
        try:
            self._mirror = Mirror(location, run)
            self.location = self._mirror.location
            self._mirror.check_same_run()
            self.steps = self._mirror.steps()
        except (DataUsageError, MirrorError) as error:
            self.problem = str(error)

    def listed(self, stages: Mapping[int, int | None]) -> list[Listed]:
        """All of them, or none when the mirror has a problem."""
        try:
            rows = [self._listed(step, stages) for step in self.steps]
        except MirrorError as error:
            self.problem = str(error)
            return []
        return [replace(row, mirror=self.location) for row in rows]

    def taken(self, step: int, reason: str) -> Checkpoint:
        """A copy that is whole. CheckpointError, with the reason why it is asked for, when there is
        none.
        """
        if step not in self.steps:
            raise CheckpointError(reason)
        try:
            saved = self._mirror.verified(step)
        except CheckpointError as error:
            raise CheckpointError(f"{reason}; the mirror is no help: {error}") from None
        except MirrorError as error:
            self.steps, self.problem = [], str(error)
            raise CheckpointError(reason) from None
        self.is_taken = True
        return saved

    def _listed(self, step: int, stages: Mapping[int, int | None]) -> Listed:
        try:
            saved = self._mirror.open(step)
            size = self._mirror.bytes_of(saved)
        except CheckpointError as error:
            return Listed(step, problem=str(error))
        return _told(saved, stages, size, partial(self._mirror.check_sizes, saved))


def _told(
    saved: Checkpoint,
    stages: Mapping[int, int | None],
    size: int,
    check_sizes: Callable[[], None],
) -> Listed:
    entries = saved.manifest["files"]
    attempt = saved.state.get("attempt")
    try:
        check_sizes()
        problem = None
    except CheckpointError as error:
        problem = str(error)
    return Listed(
        step=saved.step,
        time=saved.time,
        bytes=size,
        files=len(entries) + 1,
        world_size=len(entries),
        zero_stage=None if attempt is None else stages.get(attempt),
        attempt=attempt,
        tokens=saved.state.get("tokens"),
        problem=problem,
    )


def _zero_stage(row: Mapping[str, Any]) -> int | None:
    stage: int | None = row["config"].get("zero", {}).get("stage")
    return stage


def _damaged(step: int, damage: Damage) -> Damaged:
    return Damaged(step, damage.path.name, damage.chunk, str(damage))
