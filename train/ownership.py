"""One writer per run: every attempt is a file that is created exclusively, and the highest owns it.

    RUN/attempts/000003.json    who it is: host, process, boot, Slurm job
    RUN/attempts/000003.beat    a number that grows every BEAT_SECONDS for as long as it lives

A second job is refused while the owner lives. On the owner's own machine its process is looked for;
from another one its beat is watched for three periods by the watcher's own clock, so no two clocks
are compared. An attempt that was taken for dead and was only slow finds a higher file right before
it begins, commits or prunes a checkpoint, and saves nothing more; left to chance is the moment
between such a look and the one call after it. No lock of the file system is used: NFS and Lustre
lack or lose them. No torch here.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.durable import StorageError, writing
from train.attempts import attempts
from train.durations import large
from train.patience import insisting

FOLDER = "attempts"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 6 * BEAT_SECONDS
"""After which whoever only looks takes an attempt for dead. Clocks of two machines are compared for
that, which decides nothing: a job that wants the run watches the beat itself.
"""
_SAME_MACHINE = ("host", "boot", "processes")


class RunInUse(ValueError):
    """Another attempt owns the run."""

    exit_code: ClassVar[int] = 2


class Ownership:
    """This process's claim to a run, alive until `release`."""

    def __init__(self, run: Path, number: int, beat_seconds: float) -> None:
        self.number = number
        """Of the attempt, counted from 1."""
        self._run = run
        self._beat_seconds = beat_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether a later attempt has taken the run over."""
        return max(_numbers(self._run), default=self.number) > self.number

    def check(self) -> None:
        """RunInUse when the run is lost."""
        if self.is_lost:
            newest = max(_numbers(self._run))
            raise RunInUse(
                f"attempt {self.number} no longer owns {self._run}: attempt {newest} "
                f"({_described(_read(self._run, newest))}) has taken it over while this one did "
                "not answer; nothing more is saved here"
            )

    def release(self) -> None:
        """End the heartbeat."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        beat = 0
        while True:
            beat += 1
            # Storage that refuses a beat refuses the next checkpoint, too, and tells why.
            with suppress(OSError, StorageError):
                _place(self._run, self.number, "beat").write_text(str(beat))
            if self._ended.wait(self._beat_seconds):
                return


def own(
    run: Path, *, slurm_job: str | None = None, beat_seconds: float = BEAT_SECONDS
) -> Ownership:
    """Claim a run. RunInUse names its owner when that one lives; it takes three beats to tell where
    the owner's process cannot be looked for.
    """
    folder = run / FOLDER
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    while True:
        newest = max(_numbers(run), default=0)
        recorded = max((row["attempt"] for row in attempts(run)), default=0)
        if newest:
            _check_gone(run, newest, beat_seconds)
        number = max(newest, recorded) + 1
        # Fails when somebody has taken the run while the owner before was watched.
        if _create(run, number, slurm_job):
            return Ownership(run, number, beat_seconds)


def check_idle(run: Path, *, beat_seconds: float = BEAT_SECONDS) -> None:
    """RunInUse while an attempt lives; claims nothing, so one may begin at any moment after."""
    newest = max(_numbers(run), default=0)
    if newest:
        _check_gone(run, newest, beat_seconds)


@dataclass(frozen=True)
class Life:
    """What can be seen of an attempt without waiting for its next beat."""

    owner: str
    is_alive: bool
    beat_seconds: float | None
    """Since its last beat; None where it has left none."""


def life_of(run: Path, number: int) -> Life:
    """Whether an attempt that has not told its end still lives, at a glance."""
    owner, mine = _read(run, number), _self()
    try:
        seconds = max(time.time() - _place(run, number, "beat").stat().st_mtime, 0.0)
    except OSError:
        seconds = None
    if mine["started"] and all(owner.get(key) == mine[key] for key in _SAME_MACHINE):
        is_alive = _started(owner["pid"]) == owner["started"]
    else:
        is_alive = seconds is not None and seconds < SILENT_SECONDS
    return Life(_described(owner), is_alive, seconds)


def _create(run: Path, number: int, slurm_job: str | None) -> bool:
    """Whether the file of an attempt is ours. One that a crash has torn tells nothing of its owner,
    whose beat is watched then.
    """
    path = _place(run, number, "json")
    content = {**_self(), "slurm_job": slurm_job, "time": time.time()}
    try:
        with writing(path), path.open("xb") as file:
            file.write((json.dumps(content) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _check_gone(run: Path, number: int, beat_seconds: float) -> None:
    """RunInUse unless an attempt has ended, its process is gone or its heart stands still."""
    if any(row["attempt"] == number and row["event"] == "end" for row in attempts(run)):
        return
    owner = _read(run, number)
    if not owner:
        # Just made: its content comes a moment later than its name.
        time.sleep(0.2)
        owner = _read(run, number)
    mine = _self()
    if mine["started"] and all(owner.get(key) == mine[key] for key in _SAME_MACHINE):
        if _started(owner["pid"]) == owner["started"]:
            raise _in_use(run, number, owner)
        return
    before = _beat_of(run, number)
    deadline = time.monotonic() + 3 * beat_seconds
    while time.monotonic() < deadline:
        time.sleep(min(beat_seconds / 4, 1.0))
        if _beat_of(run, number) != before:
            raise _in_use(run, number, owner)
        if any(row["attempt"] == number and row["event"] == "end" for row in attempts(run)):
            return


def _in_use(run: Path, number: int, owner: Mapping[str, Any]) -> RunInUse:
    return RunInUse(
        f"{run} is being trained by attempt {number} ({_described(owner)}); wait until it has "
        "ended or stop it, and then run the same command again, or choose another --run"
    )


def _described(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "whose file is torn, so nobody can tell who it is"
    job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    begun = ago(max(time.time() - float(owner.get("time", 0)), 0))
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, begun {begun}"


def ago(seconds: float) -> str:
    """How long something is past, in the unit that a person would choose."""
    minutes = round(seconds / 60)
    told = large(seconds, "days", "hours") or f"{minutes} minute{'s' * (minutes != 1)}"
    return f"{told} ago"


def _self() -> dict[str, Any]:
    """What tells this process from every other one, on this machine and elsewhere."""
    return {
        "host": socket.gethostname(),
        "boot": _content("/proc/sys/kernel/random/boot_id"),
        # Of a container: process ids mean something else in another one.
        "processes": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot; empty when there is none such."""
    # After the name, which may hold anything, the 22nd field is the 20th.
    fields = _content(f"/proc/{pid}/stat").rpartition(")")[2].split()
    is_running = len(fields) > 19 and fields[0] not in "ZX"
    return fields[19] if is_running else ""


def _content(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _numbers(run: Path) -> list[int]:
    try:
        names = insisting(lambda: os.listdir(run / FOLDER))
    except FileNotFoundError:
        return []
    found = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return [int(name) for name in found if name.isdecimal()]


def _read(run: Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(_place(run, number, "json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _beat_of(run: Path, number: int) -> str:
    return _content(str(_place(run, number, "beat")))


def _place(run: Path, number: int, kind: str) -> Path:
    return run / FOLDER / f"{number:06d}.{kind}"
