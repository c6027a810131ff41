"""Random faults in one run, one after the other, through the command that a person types.

An `Attempt` starts the command and watches, from outside, what becomes of it: when its ranks are
there, when it trains, when the fault strikes, when all is over.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.durable import read_rows
from launcher import mailbox
from launcher.rank import follow_parent
from tests.launcher.random_faults import EVERY, RANKS, Strike
from train import attempts
from train.checkpoint import committed
from train.faults import VARIABLE

STALL_SECONDS = 8
POLL_SECONDS = 0.02
LATE_SECONDS = 240.0
"""How much later than meant a fault may strike on a busy machine."""
RECIPE = f"""
steps = 1_000_000
seed = 3
seq_len = 32
batch_tokens = 256
precision = "fp32"
optim.lr = 1e-3
checkpoint.every = {EVERY}
eval.samples = 4
guard.max_skips = 0
stall_seconds = {STALL_SECONDS}
model = {{ num_layers = 1, hidden_size = 32, num_heads = 2, num_kv_heads = 1, ffn_size = 32 }}
"""


class Attempt:
    """One start of the command."""

    def __init__(self, command: Sequence[str], run: Path, strike: Strike, scratch: Path) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self._run, self._strike, self._scratch = run, strike, scratch
        self._metrics = run / "metrics.jsonl"
        # Rows of this attempt begin here.
        self._offset = _bytes(self._metrics)
        self._attempts = run / attempts.FILE
        self._attempts_bytes = _bytes(self._attempts)
        self._pids: set[int] = set()
        self._begun = time.monotonic()
        with (scratch / "stderr").open("wb") as stderr:
            self._launcher = subprocess.Popen(
                command,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
                | {VARIABLE: "" if strike.is_outside else strike.fault},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                preexec_fn=end_with_us,
            )
        self._whom = "rank"
        self._ranks: float | None = None
        self._attempt: float | None = None
        self._first: float | None = None
        self._struck: float | None = None
        self._gone: float | None = None

    def play(self) -> dict[str, Any]:
        """Wait until the fault has struck and all is over; returns the row of it. AssertionError
        when it does not strike, with what the command has said.
        """
        try:
            while self._launcher.poll() is None or self._alive():
                self._look()
                assert self._seconds < self._strike.seconds + LATE_SECONDS, self._told("no end")
                time.sleep(POLL_SECONDS)
            self._look()
        finally:
            self._launcher.kill()
            self._launcher.wait()
        ended = self._seconds
        assert self._struck is not None, self._told("the fault has not struck")
        return {
            "fault": self._strike.fault,
            "whom": self._whom,
            "drawn": self._strike.seconds,
            "ranks": self._ranks,
            "attempt": self._attempt,
            "first": self._first,
            "struck": self._struck,
            "gone": self._gone or ended,
            "ended": ended,
            "exit_code": self._launcher.returncode,
            **self._trained(),
        }

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._begun

    def _look(self) -> None:
        now = self._seconds
        self._pids |= set(self._processes().values())
        if self._ranks is None and len(self._pids) == RANKS:
            self._ranks = now
        if self._attempt is None and _bytes(self._attempts) > self._attempts_bytes:
            self._attempt = now
        if self._first is None and (rows := self._rows()):
            self._first = now - rows[0]["step_seconds"]
        if self._struck is None:
            if self._strike.is_outside:
                self._signal(now)
            elif f"{VARIABLE}: {self._strike.kind} at".encode() in self._stderr():
                self._struck = now
        elif self._gone is None and not self._alive():
            self._gone = now

    def _signal(self, now: float) -> None:
        """Send what comes from outside, when its time has come; to the launcher where whom it is
        for is not there yet.
        """
        if now < self._strike.seconds or self._launcher.poll() is not None:
            return
        self._whom, name = self._strike.fault.split(":")
        pids = {
            "launcher": [],
            "torchrun": self._children(),
            "rank": sorted(self._processes().values()),
        }[self._whom]
        if not pids:
            self._whom, pids = "launcher", [self._launcher.pid]
        os.kill(pids[-1], signal.Signals[name])
        self._struck = now

    def _processes(self) -> dict[int, int]:
        for folder in self._scratch.glob("headrace-*"):
            # The launcher may remove it just now.
            with suppress(OSError):
                return mailbox.processes(folder)
        return {}

    def _children(self) -> list[int]:
        pid = self._launcher.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _alive(self) -> bool:
        return any(map(_is_running, self._pids))

    def _stderr(self) -> bytes:
        return (self._scratch / "stderr").read_bytes()

    def _told(self, what: str) -> str:
        return f"{what}: {self._strike}\n{self._stderr().decode()[-3000:]}"

    def _rows(self) -> list[dict[str, Any]]:
        """Rows of steps that this attempt has taken."""
        if _bytes(self._metrics) == self._offset:
            return []
        part = self._scratch / "rows"
        with self._metrics.open("rb") as file:
            file.seek(self._offset)
            part.write_bytes(file.read())
        return [row for row in read_rows(part) if "loss" in row]

    def _trained(self) -> dict[str, Any]:
        """What of it counts: steps up to the newest checkpoint that is left."""
        rows = self._rows()
        done = next(iter(committed(self._run)), 0)
        kept = [row["step_seconds"] for row in rows if row["step"] <= done]
        saved = [row for row in rows if "checkpoint_step" in row]
        training = math.fsum(row["step_seconds"] for row in rows)
        # Between the first step and the fault.
        spent = self._struck - self._first if rows else None  # type: ignore[operator]
        return {
            "done": done,
            "reached": rows[-1]["step"] if rows else done,
            "steps": len(rows),
            "step": max(spent, training) / len(rows) if spent is not None else None,
            "training": training,
            "kept": math.fsum(kept),
            "saves": len(saved),
            "stalled": math.fsum(row["checkpoint_stall_seconds"] for row in saved),
            # Steps until the run knew of a save.
            "in_flight": max((row["step"] - row["checkpoint_step"] for row in saved), default=0),
        }


def command(recipe: Path, dataset: Path, run: Path, *more: str) -> list[str]:
    """What a person types."""
    argv = ["pretrain", str(recipe), f"data={dataset}", "--run", str(run), "--nproc", str(RANKS)]
    return [sys.executable, "-m", "launcher", *argv, *more]


def play(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    faults: int,
    strike: Callable[[int, int], Strike],
    *,
    check: Callable[[dict[str, Any]], None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Let faults happen to the run below `folder` until there are `faults` rows, each of which is
    checked and kept. `strike` makes the fault from its index and the step of the newest checkpoint.

    Raises at a row that `check` refuses and at a fault that does not strike: with `ok`
    False and `why` their rows are kept like any other.
    """
    run = folder / "run"
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    started = command(folder / "recipe.toml", folder / "dataset", run)
    for index in range(len(rows), faults):
        meant = strike(index, next(iter(committed(run)), 0))
        row: dict[str, Any] = {"index": index, "fault": meant.fault}
        try:
            row |= Attempt(started, run, meant, folder / "scratch").play()
            check(row)
        except Exception:
            keep(row | {"ok": False, "why": traceback.format_exc()})
            raise
        keep(row | {"ok": True})


def end_with_us() -> None:
    """In a child: be killed when we are, so that a soak that is killed leaves nobody behind."""
    follow_parent(signal.SIGKILL)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # What nobody has waited for is a zombie.
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"
