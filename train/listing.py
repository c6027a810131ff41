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

from train.attempts import attempts
from train.checkpoint import MANIFEST, Checkpoint, committed, open_checkpoint, step_folder
from train.choice import Choice, choose
from train.mirror import Mirror
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
    choice: Choice

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
        }


def list_checkpoints(run: Path) -> list[Listed]:
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
    return sorted(rows, key=lambda row: -row.step) + _in_mirror(run, stages)


def verify(run: Path, step: int | None = None) -> Verification:
    """Read every byte of one checkpoint or of all. CheckpointError when there is none.

    With `step`, the checkpoints that a resume would try are read, too; none is read twice.
    """
    check_is_run(run)
    steps = committed(run)
    if not steps or (step is not None and step not in steps):
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
    choice = choose(run, steps, take=read)
    looked_at = tuple(sorted(found, reverse=True))
    return Verification(
        run=str(run),
        steps=looked_at,
        bytes_read=sum(num_bytes.values()),
        damages=tuple(damage for number in looked_at for damage in found[number]),
        choice=choice,
    )


def check_is_run(run: Path) -> None:
    """CheckpointError for a folder that has nothing of a run."""
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


def _in_mirror(run: Path, stages: Mapping[int, int | None]) -> list[Listed]:
    tables = [row["config"].get("checkpoint", {}) for row in attempts(run) if "config" in row]
    location = tables[-1].get("mirror", "") if tables else ""
    if not location:
        return []
    mirror = Mirror(location, run)
    rows = []
    for step in mirror.steps():
        try:
            saved = mirror.open(step)
        except CheckpointError as error:
            rows.append(Listed(step, problem=str(error)))
            continue
        size = mirror.bytes_of(saved)
        rows.append(_told(saved, stages, size, partial(mirror.check_sizes, saved)))
    return [replace(row, mirror=mirror.location) for row in rows]


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
