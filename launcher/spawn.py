"""From one command to the processes of a run, and from their ends to one exit code.

Who am I: RANK and WORLD_SIZE set -> a torchrun rank; SLURM_STEP_ID set and more than one task in
the step -> an srun rank; otherwise the launcher (a batch shell is never a rank). With `--nproc 1`
the launcher itself trains; with more it starts torchrun, which starts the same command line on
every rank. It signals and ends only processes it started.

Ranks leave with 0 after a planned stop, because torchrun turns every other code into 1. What
happened stands in the last row of RUN/attempts.jsonl; a refusal meant for a person travels to the
launcher as a file in HEADRACE_LAUNCH, a private folder that lives as long as torchrun does, and is
printed once and last.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import slurm

log = logging.getLogger(__name__)

EXIT_CODES = {"complete": 0, "failed": 1, "stopped": 3}
LAUNCH_FOLDER = "HEADRACE_LAUNCH"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1


class Role(StrEnum):
    """What this process is."""

    LAUNCHER = "launcher"
    TORCHRUN_RANK = "torchrun rank"
    SRUN_RANK = "srun rank"


class LaunchError(ValueError):
    """A run that could not be started or failed on a rank; the message is meant for a person."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def recognise(environ: Mapping[str, str]) -> Role:
    """Whether this process is a rank or the launcher, from its environment alone."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Role.TORCHRUN_RANK
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Role.SRUN_RANK
    return Role.LAUNCHER


def rank_of(environ: Mapping[str, str]) -> int:
    """Global rank of this process; 0 for the launcher."""
    role = recognise(environ)
    if role is Role.LAUNCHER:
        return 0
    return int(environ["RANK" if role is Role.TORCHRUN_RANK else "SLURM_PROCID"])


def run_job(
    train: Callable[[], str], *, run: Path, num_processes: int, program: str = "launcher"
) -> int:
    """Run `train` here, or this command line under torchrun.

    Returns the exit code: 0 done, 1 failed, 3 stopped. `train` returns the outcome of the run:
    "complete", "stopped" or "failed".
    """
    role = recognise(os.environ)
    if role is Role.SRUN_RANK and num_processes > 1:
        raise LaunchError(
            f"--nproc {num_processes} inside an srun step of several tasks: each task is one rank "
            "already; leave --nproc out, or give srun one task per node and start torchrun there",
            exit_code=2,
        )
    if role is not Role.LAUNCHER:
        return _run_rank(train, role)
    if num_processes > 1:
        return launch(sys.argv[1:], run=run, num_processes=num_processes, program=program)
    log.info("launcher: one process, no torchrun")
    return EXIT_CODES[train()]


def launch(argv: Sequence[str], *, run: Path, num_processes: int, program: str = "launcher") -> int:
    """Start `python -m PROGRAM ARGV` on `num_processes` ranks of this machine and wait for them.

    Returns the exit code of the whole. SIGINT, SIGTERM and SIGUSR1 ask the ranks to save and stop.
    LaunchError carries the message and the code of a rank that refused, or says that one failed.
    """
    rows_before = _num_rows(run)
    with tempfile.TemporaryDirectory(prefix="headrace-") as name, _StopRequests() as stop:
        log.info("launcher: starting %d processes with torchrun", num_processes)
        folder = Path(name)
        torchrun = _start_torchrun([program, *argv], num_processes, folder)
        while torchrun.poll() is None:
            if (number := stop.take()) is not None:
                _pass_on(number, folder, num_processes, torchrun)
            time.sleep(POLL_SECONDS)
        refusal = _first_refusal(folder)
    if refusal is not None:
        raise refusal
    code = torchrun.returncode
    outcome = last_outcome(run)
    if code == 0 and outcome is not None:
        return EXIT_CODES[outcome]
    if stop.asked and (outcome == "stopped" or _num_rows(run) == rows_before):
        # Ended on request, after the last save or before the first step.
        return EXIT_CODES["stopped"]
    raise LaunchError(
        f"training failed: torchrun left with {code}; the first traceback above is the cause. "
        f"The same command continues from the newest checkpoint in {run}"
    )


def thread_settings(num_processes: int, environ: Mapping[str, str]) -> dict[str, str]:
    """OMP_NUM_THREADS for one of `num_processes` on this machine, unless somebody has set it."""
    if "OMP_NUM_THREADS" in environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, num_cores() // num_processes))}


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_outcome(run: Path) -> str | None:
    """The `outcome` of the last row of RUN/attempts.jsonl; None when that attempt has not ended."""
    path = run / "attempts.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        outcome = json.loads(rows[-1]).get("outcome") if rows else None
    except json.JSONDecodeError:
        # Killed while the row was written.
        return None
    return outcome if outcome in EXIT_CODES else None


def _run_rank(train: Callable[[], str], role: Role) -> int:
    rank = rank_of(os.environ)
    if role is Role.SRUN_RANK:
        os.environ.update(slurm.rendezvous(os.environ))
    if rank == 0:
        size = "WORLD_SIZE" if role is Role.TORCHRUN_RANK else "SLURM_STEP_NUM_TASKS"
        log.info("%s 0 of %s", role, os.environ[size])
    folder = _register(rank)
    try:
        return 1 if train() == "failed" else 0
    except ValueError as error:
        if folder is None or not hasattr(error, "exit_code"):
            raise
        refusal = {"message": str(error), "exit_code": error.exit_code}
        _write(folder / f"refusal-{rank:05d}.json", json.dumps(refusal))
        # The launcher prints it and leaves with its code; 0 here keeps torchrun from shouting.
        return 0


def _register(rank: int) -> Path | None:
    """Let the launcher know this rank; None when torchrun was started by somebody else."""
    name = os.environ.get(LAUNCH_FOLDER, "")
    if not name or not Path(name).is_dir():
        return None
    # Until the loop listens, a stop request ends the rank: nothing is trained, so nothing is lost.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    # torchrun gives every rank a session of its own: nothing else ends it when torchrun is killed.
    _follow_parent(signal.SIGKILL)
    _write(Path(name) / f"rank-{rank:05d}.pid", str(os.getpid()))
    return Path(name)


def _start_torchrun(
    program: Sequence[str], num_processes: int, folder: Path
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
    # Else torchrun leaves an empty folder per launch in /tmp.
    command += [f"--log-dir={folder}"]
    # Without the bare -- it would take --run for a prefix of its own options.
    command += [f"--nproc-per-node={num_processes}", "-m", "--", *program]
    settings = thread_settings(num_processes, os.environ) | {LAUNCH_FOLDER: str(folder)}

    def in_child() -> None:
        # torchrun would die of USR1, which srun sends to every process of a step.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        _follow_parent(signal.SIGTERM)

    # A process group of its own: Ctrl-C in a terminal reaches the launcher alone, and that asks the
    # ranks to save first.
    return subprocess.Popen(
        command, env=os.environ | settings, process_group=0, preexec_fn=in_child
    )


def _pass_on(
    number: int, folder: Path, num_processes: int, torchrun: subprocess.Popen[bytes]
) -> None:
    """Ask every rank to stop; torchrun is ended instead while some rank has not even started."""
    pids = [int(path.read_text()) for path in sorted(folder.glob("rank-*.pid"))]
    if len(pids) < num_processes:
        torchrun.terminate()
        return
    # srun by itself delivers USR1 to all processes, and the second signal of a kind ends a rank.
    forwarded = signal.SIGTERM if number == signal.SIGUSR1 else signal.SIGUSR1
    for pid in pids:
        try:
            os.kill(pid, forwarded)
        except ProcessLookupError:
            continue


def _first_refusal(folder: Path) -> LaunchError | None:
    for path in sorted(folder.glob("refusal-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        return LaunchError(found["message"], found["exit_code"])
    return None


def _num_rows(run: Path) -> int:
    path = run / "attempts.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


class _StopRequests:
    """Collects stop signals while it is entered, and says once how to insist."""

    def __init__(self) -> None:
        self.asked = False
        self._pending: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequests:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> int | None:
        """The oldest signal that nobody has acted on."""
        if not self._pending:
            return None
        number = self._pending.pop(0)
        if not self.asked:
            name = signal.Signals(number).name
            log.info("%s: saving and stopping; the same signal again stops at once", name)
        self.asked = True
        return number

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._pending.append(number)


def _follow_parent(number: signal.Signals) -> None:
    """Have the kernel send us `number` when our parent ends, however it ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
