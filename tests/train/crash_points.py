"""Ranks as real processes that save one checkpoint and can be killed at every I/O call they make.

    python -m tests.train.crash_points   reads a case a line on stdin, answers a line on stdout

Imports no torch, so that ranks are forked in milliseconds. Every call that changes the disk is a
point: open for writing, write, fsync, rename, unlink, mkdir, rmdir. Python's audit hook tells of
most before they happen; write and fsync it does not see, so those are wrapped. What lies between
two neighbouring points of a rank changes nothing on the disk, so "after a call" is "before the
next one", and counts once.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.train.checkpoints import inventory, pieces, values
from train import checkpoint, slices
from train.retention import Retention
from train.slices import write_slices

AUDITED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.chmod"}
DRAFT = re.compile(r"\.[0-9a-f]{8}\.tmp\Z")
GAVE_UP = 3


@dataclass(frozen=True)
class Case:
    """One save, and where it is cut short."""

    run: str
    control: str
    """Folder for what ranks tell each other; not on trial."""
    step: int
    num_ranks: int = 2
    chunk_bytes: int = slices.CHUNK_BYTES
    keep: int = 2
    every_steps: int = 0
    kill: tuple[int, int, str] | None = None
    """(rank, point, "before" or "middle"); one more than the last point is the end."""
    whole_node: bool = False
    """Whether all ranks are killed at once; else the others come to the next barrier."""
    prune_first: bool = False
    """A protocol that is wrong on purpose."""


class Trace:
    """The points of this process, in order; kills it at the one that was asked for."""

    def __init__(self, run: str, kill: tuple[int, str] | None) -> None:
        self.points: list[str] = []
        self._run = run
        self._kill = kill
        self._open = io.open
        self._fsync = os.fsync
        sys.addaudithook(self._audit)
        os.fsync = self._traced_fsync
        io.open = self._traced_open  # type: ignore[assignment]

    def point(self, what: str, path: str) -> bool:
        """Whether this point is to be cut in the middle; does not return where it is cut before."""
        number = len(self.points)
        # The name of a file that is being written is another one every time.
        path = DRAFT.sub(".tmp", path)
        self.points.append(f"{what} {path.removeprefix(self._run).lstrip('/') or '.'}")
        if self._kill == (number, "before"):
            die()
        return self._kill == (number, "middle")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in AUDITED:
            path = os.fspath(args[0])
            # Relative to an open folder: only rmtree does that, and only under the run.
            if path.startswith(self._run) or not path.startswith("/"):
                self.point(event.removeprefix("os."), path)
            return
        # Opened for reading, it changes nothing.
        changes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if changes and str(args[0]).startswith(self._run):
            self.point("open", str(args[0]))

    def _traced_fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(self._run):
            self.point("fsync", path)
        self._fsync(descriptor)

    def _traced_open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = self._open(path, mode, *args, **options)
        if mode.startswith("r") or not os.fspath(path).startswith(self._run):
            return file
        return TracedFile(file, os.fspath(path), self)


class TracedFile:
    """A file whose writes are points."""

    def __init__(self, file: Any, path: str, trace: Trace) -> None:
        self._file = file
        self._path = path
        self._trace = trace

    def write(self, data: Any) -> int:
        """Write all of it, or half of it and die."""
        if self._trace.point(f"write {len(data)} bytes", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            die()
        count: int = self._file.write(data)
        # What is buffered would reach the disk a moment later; nothing else happens in between.
        self._file.flush()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> TracedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def die() -> NoReturn:
    """End this process as the kernel ends one: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def save(case: Case, rank: int, gather: Callable[[str, Any], list[Any]]) -> None:
    """What train/saver.py does, without an engine."""
    run, step = Path(case.run), case.step
    if rank == 0:
        if case.prune_first:
            checkpoint.remove(checkpoint.retire_but(run, ()))
        checkpoint.begin(run, step)
    gather("begun", None)
    arrays, ranges = pieces(values(step), rank, case.num_ranks)
    entry = write_slices(checkpoint.step_folder(run, step), rank, arrays, ranges)
    entries = gather("written", entry)
    if rank == 0:
        checkpoint.commit(
            checkpoint.step_folder(run, step),
            step=step,
            parameters=inventory(),
            scalars={"step": float(step)},
            state={"step": step},
            files=entries,
        )
        rule = Retention(case.keep, case.every_steps)
        checkpoint.remove(checkpoint.retire(run, rule, newest=step))
    gather("committed", None)


def play(case: Case) -> dict[str, Any]:
    """Fork the ranks, wait for them; their exit codes and, where none was killed, their points."""
    children = {}
    for rank in range(case.num_ranks):
        pid = os.fork()
        if pid == 0:
            _rank(case, rank)
        children[pid] = rank
    codes = {}
    while len(codes) < case.num_ranks:
        pid, status = os.wait()
        codes[children[pid]] = os.waitstatus_to_exitcode(status)
        if codes[children[pid]] == -signal.SIGKILL:
            Path(case.control, "dead").touch()
            for other, rank in children.items():
                if case.whole_node and rank not in codes:
                    os.kill(other, signal.SIGKILL)
    points = {}
    for rank, code in codes.items():
        if code == 0:
            points[rank] = json.loads(Path(case.control, f"points-{rank}").read_text())
    return {"codes": codes, "points": points}


def _rank(case: Case, rank: int) -> NoReturn:
    code = 1
    try:
        slices.CHUNK_BYTES = case.chunk_bytes
        kill = case.kill[1:] if case.kill is not None and case.kill[0] == rank else None
        trace = Trace(case.run, kill)
        save(case, rank, lambda name, value: _gather(case, rank, name, value))
        points = list(trace.points)
        trace.point("end", case.run)
        Path(case.control, f"points-{rank}").write_text(json.dumps(points))
        code = 0
    finally:
        os._exit(code)


def _gather(case: Case, rank: int, name: str, value: Any) -> list[Any]:
    """Every rank's value, by files; a rank that waits for a dead one gives up."""
    folder = Path(case.control)
    place = folder / f"{name}-{rank}.json"
    temporary = place.with_suffix(".part")
    temporary.write_text(json.dumps(value))
    temporary.rename(place)
    found = [folder / f"{name}-{other}.json" for other in range(case.num_ranks)]
    while not all(path.exists() for path in found):
        if (folder / "dead").exists():
            os._exit(GAVE_UP)
        time.sleep(0.0005)
    return [json.loads(path.read_text()) for path in found]


def main() -> None:
    """Play cases until stdin ends."""
    for line in sys.stdin:
        fields = json.loads(line)
        fields["kill"] = tuple(fields["kill"]) if fields["kill"] else None
        print(json.dumps(play(Case(**fields))), flush=True)


def as_line(case: Case) -> str:
    """A case as `main` reads it."""
    return json.dumps(asdict(case)) + "\n"


if __name__ == "__main__":
    main()
