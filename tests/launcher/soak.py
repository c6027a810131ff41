"""Random faults in one run, one after the other, through the command that a person types.

`draw` says which fault is the next; `Attempt` starts the command and watches, from outside, what
becomes of it: when its ranks are there, when it trains, when the fault strikes, when all is over.
The times are a row of results each; `measured` and `predicted` make goodputs of them.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from data.durable import read_rows
from launcher import mailbox
from launcher.rank import follow_parent
from train import attempts
from train.checkpoint import committed
from train.faults import AT_START, ERRORS, IN_A_SAVE, IN_A_STEP, VARIABLE
from train.interval import Costs, goodput

RANKS = 2
EVERY = 50
"""Steps between checkpoints: about what Daly's formula asks for at this rate of failures."""
MEAN_SECONDS = float(os.environ.get("MEAN_SECONDS") or 15)
"""Between the start of an attempt and its fault; a machine that takes long to start needs more for
any step to be taken.
"""
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

DEATHS = ("kill", "exit", "raise", *ERRORS)
PLANNED = ("term", "usr1")
STANDING = ("stop", "hang")
OUTSIDE = ("launcher:SIGKILL", "launcher:SIGTERM", "torchrun:SIGKILL", "rank:SIGKILL")


@dataclass(frozen=True)
class Typical:
    """Seconds from the start of the command."""

    ranks: float
    """Until the ranks are processes."""
    attempt: float
    """Until they have met and the attempt is recorded."""
    first: float
    """Until the first step."""
    step: float
    """From a step to the next one."""


@dataclass(frozen=True)
class Strike:
    """A fault that is to happen."""

    fault: str
    """phase:step:rank:kind as in HEADRACE_FAULT, or whom a signal reaches from outside."""
    seconds: float
    """When, from the start of the command."""

    @property
    def is_outside(self) -> bool:
        """Whether we send the signal."""
        return self.fault in OUTSIDE

    @property
    def kind(self) -> str:
        """Its last word."""
        return self.fault.rsplit(":", 1)[1]


def draw(seed: int, index: int, typical: Typical, *, done: int) -> Strike:
    """The fault of an attempt that goes on from step `done`: a function of its arguments alone.

    The seconds until it are distributed exponentially, and evenly so over any run of indices: they
    are quantiles at multiples of the golden ratio. Half the faults before the first step, and a
    quarter of the others, come from outside.
    """
    chosen = random.Random(f"{seed}/{index}")
    quantile = (random.Random(seed).random() + index * (math.sqrt(5) - 1) / 2) % 1
    seconds = -MEAN_SECONDS * math.log1p(-quantile)
    rank = chosen.randrange(RANKS)
    in_step = seconds >= typical.first
    if chosen.random() < (0.25 if in_step else 0.5) or seconds < typical.ranks / 2:
        return Strike(chosen.choice(OUTSIDE), seconds)
    if not in_step:
        # They follow each other as the ranks start; the nearest one is meant.
        between = typical.attempt - typical.ranks, typical.first - typical.attempt
        places = dict(zip(AT_START, (0.0, 0.6 * between[0], between[0], between[0]), strict=True))
        places["load"] += 0.5 * between[1]
        phase = min(places, key=lambda name: abs(typical.ranks + places[name] - seconds))
        return Strike(f"{phase}:0:{rank}:{chosen.choice((*DEATHS, *PLANNED))}", seconds)
    step = done + 1 + int((seconds - typical.first) / typical.step)
    phase = chosen.choice((*IN_A_STEP, *IN_A_SAVE))
    if phase in IN_A_SAVE:
        step = max(round(step / EVERY), done // EVERY + 1) * EVERY
    kinds = [*DEATHS, *PLANNED, *STANDING, *(["nan"] if phase == "forward" else [])]
    return Strike(f"{phase}:{step}:{rank}:{chosen.choice(kinds)}", seconds)


def typical(rows: Sequence[Mapping[str, Any]]) -> Typical:
    """What the last attempts took; a guess before the first one."""

    def mean(key: str, guess: float) -> float:
        found = [row[key] for row in rows if row[key] is not None]
        return fmean(found[-5:]) if found else guess

    guess = Typical(ranks=2.0, attempt=5.0, first=8.0, step=0.02)
    return Typical(**{key: mean(key, value) for key, value in vars(guess).items()})


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
        saves = [row["checkpoint_stall_seconds"] for row in rows if "checkpoint_step" in row]
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
            "saves": len(saves),
            "stalled": math.fsum(saves),
        }


def measured(rows: Sequence[Mapping[str, Any]]) -> float:
    """Goodput: time of the steps that count, over all time."""
    return math.fsum(row["kept"] for row in rows) / math.fsum(row["ended"] for row in rows)


def predicted(rows: Sequence[Mapping[str, Any]]) -> tuple[float, dict[str, float]]:
    """Goodput by Daly's formula (train/interval.py), and what it is computed from, in seconds.

    The formula lets a job fail at any time. Between a fault and the next start there is no job, so
    that time is added to every mean interval. A save costs whatever an interval takes besides its
    steps.
    """
    trained = [row for row in rows if row["steps"]]
    steps = sum(row["steps"] for row in trained)
    step = math.fsum(row["training"] for row in trained) / steps
    beside = math.fsum(row["steps"] * row["step"] - row["training"] for row in trained) / steps
    found = {
        "between_failures": fmean(row["struck"] for row in rows),
        "down": fmean(row["ended"] - row["struck"] for row in rows),
        "restart": fmean(row["first"] for row in trained),
        "interval": EVERY * step,
        "save": EVERY * beside,
        "lost": fmean(row["training"] - row["kept"] for row in trained),
    }
    costs = Costs(
        stall=found["save"],
        lag=0.0,
        restart=found["restart"],
        between_failures=found["between_failures"],
    )
    up = found["between_failures"] / (found["between_failures"] + found["down"])
    return goodput(found["interval"], costs) * up, found


def command(recipe: Path, dataset: Path, run: Path, *more: str) -> list[str]:
    """What a person types."""
    argv = ["pretrain", str(recipe), f"data={dataset}", "--run", str(run), "--nproc", str(RANKS)]
    return [sys.executable, "-m", "launcher", *argv, *more]


def play(
    folder: Path,
    rows: list[dict[str, Any]],
    faults: int,
    strike: Callable[[int, int], Strike],
) -> Iterator[dict[str, Any]]:
    """Let faults happen to the run below `folder` until there are `faults` rows; adds and yields
    each new one. `strike` makes the fault from its index and the step of the newest checkpoint.
    """
    run = folder / "run"
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    started = command(folder / "recipe.toml", folder / "dataset", run)
    for index in range(len(rows), faults):
        meant = strike(index, next(iter(committed(run)), 0))
        rows.append({"index": index, **Attempt(started, run, meant, folder / "scratch").play()})
        yield rows[-1]


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
