"""From one command to the processes of a run, and from their ends to one exit code.

With `--nproc 1` the launcher itself trains; with more it starts torchrun, which starts the same
command line on every rank (launcher/rank.py). It signals and ends only processes it started.

What happened stands in the last row of RUN/attempts.jsonl, which is completed here when the ranks
were ended before they could. Why a rank failed it has told (launcher/mailbox.py): the reason is
printed once and last, after the traceback if it was an error that nobody expected.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from data.durable import StorageError
from data.signals import STOP_SIGNALS
from launcher import mailbox
from launcher.mailbox import Failure
from launcher.rank import Role, follow_parent, place_of, recognise, run_rank
from launcher.rank import rank_of as rank_of
from train import faults
from train.attempts import HEARSAY, Outcome, attempts, end_attempt
from train.progress import at

log = logging.getLogger(__name__)

EXIT_CODES = {"complete": 0, "failed": 1, "stopped": 3}
END_TORCHRUN = signal.SIGHUP
"""What torchrun ends its ranks and itself of: none of STOP_SIGNALS."""
POLL_SECONDS = 0.1
NOTICE_SECONDS = 0.5
"""Within which torchrun, which looks after its ranks every 0.1 s, notices that one is gone."""


class LaunchError(ValueError):
    """A run that could not be started or failed on a rank; the message is meant for a person."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
    if role is Role.LAUNCHER and num_processes > 1:
        return launch(sys.argv[1:], run=run, num_processes=num_processes, program=program)
    faults.check_rank(os.environ.get(faults.VARIABLE), place_of(os.environ)[1])
    if role is not Role.LAUNCHER:
        return run_rank(train)
    log.info("launcher: one process, no torchrun")
    try:
        with _interruptible():
            at("import")
            return EXIT_CODES[train()]
    except KeyboardInterrupt as asked:
        # The loop listens once it runs; nothing was trained yet.
        log.info("%s: stopped before training began", asked)
        return EXIT_CODES["stopped"]


def launch(argv: Sequence[str], *, run: Path, num_processes: int, program: str = "launcher") -> int:
    """Start `python -m PROGRAM ARGV` on `num_processes` ranks of this machine and wait for them.

    Returns the exit code of the whole: 0, or 3 when it was stopped on purpose. SIGINT, SIGTERM and
    SIGUSR1 ask the ranks to save and stop; a second signal of the same kind ends them at once.
    LaunchError carries the message and the code of a rank that refused, or says that one failed.
    """
    faults.check_rank(os.environ.get(faults.VARIABLE), num_processes)
    num_rows = len(attempts(run))
    with tempfile.TemporaryDirectory(prefix="headrace-") as name, _StopRequests() as stop:
        log.info("launcher: starting %d processes with torchrun", num_processes)
        folder = Path(name)
        torchrun = _start_torchrun([program, *argv], num_processes, folder)
        failure = _attend(torchrun, folder, stop, num_processes)
        pids = mailbox.processes(folder).values()
        has_begun = bool(_rows_of(run, num_rows, pids))
        failure = failure or _unspoken(torchrun, folder, stop, has_begun)
    if failure is not None:
        _close(run, num_rows, pids, "failed", failure.message)
        raise _error(failure, run)
    if stop.asked:
        _close(run, num_rows, pids, "stopped", f"{stop.asked}; ended before it was saved")
    if stop.insisted:
        log.info("the same command goes on from %s", _last_saved(run))
    rows = _rows_of(run, num_rows, pids)
    if stop.asked and not rows:
        # Before the first step.
        return EXIT_CODES["stopped"]
    return EXIT_CODES[rows[-1]["outcome"] if rows else "complete"]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within, each of STOP_SIGNALS is a KeyboardInterrupt of its name, until the loop listens."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)


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


def _start_torchrun(
    program: Sequence[str], num_processes: int, folder: Path
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launcher.torchrun", "--standalone", "--max-restarts=0"]
    # Else torchrun leaves an empty folder per launch in /tmp.
    command += [f"--log-dir={folder}"]
    command += [f"--signals-to-handle={END_TORCHRUN.name}"]
    # Without the bare -- it would take --run for a prefix of its own options.
    command += [f"--nproc-per-node={num_processes}", "-m", "--", *program]
    # What the loaders of a rank that was ended have left is cleaned up, with a warning each.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    settings = thread_settings(num_processes, os.environ) | {
        mailbox.VARIABLE: str(folder),
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet])),
    }

    def in_child() -> None:
        # srun and systemd send them to all processes; torchrun would end ranks that are saving.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # nohup has us ignore it.
        signal.signal(END_TORCHRUN, signal.SIG_DFL)
        follow_parent(END_TORCHRUN)

    # A process group of its own: Ctrl-C in a terminal reaches the launcher alone, and that asks the
    # ranks to save first.
    return subprocess.Popen(
        command, env=os.environ | settings, process_group=0, preexec_fn=in_child
    )


def _attend(
    torchrun: subprocess.Popen[bytes], folder: Path, stop: _StopRequests, num_processes: int
) -> Failure | None:
    """Wait for torchrun; pass on a request to stop; end every rank when one has failed.

    Returns the failure that a rank has told and that was not the death of another rank.
    """
    silent: list[int] = []
    while torchrun.poll() is None:
        number = stop.take()
        failure = mailbox.first_failure(folder)
        silent = silent or mailbox.silent_ranks(folder)
        if silent or (failure and failure.exit_code is None):
            # A rank that dies makes the others fail: torchrun knows which one was the first.
            time.sleep(NOTICE_SECONDS)
            if not mailbox.silent_ranks(folder):
                torchrun.send_signal(END_TORCHRUN)
            _end_ranks(folder)
        elif failure is not None or stop.insisted:
            torchrun.send_signal(END_TORCHRUN)
            _end_ranks(folder)
        elif number is not None:
            _pass_on(number, folder, num_processes, torchrun)
        time.sleep(POLL_SECONDS)
    told, words = mailbox.first_failure(folder), mailbox.last_words(folder)
    if told is not None and told.exit_code is not None:
        return told
    if silent and words and not any(words.startswith(f"rank {rank} ") for rank in silent):
        # torchrun takes a rank that leaves with 0 for one that is done, and tells of those that
        # were ended because of it.
        return Failure(silent[0], f"rank {silent[0]} left with 0, and nothing was done yet")
    return None if words else told


def _pass_on(
    number: int, folder: Path, num_processes: int, torchrun: subprocess.Popen[bytes]
) -> None:
    """Ask every rank to stop; all are ended instead while some rank has not even started."""
    name = signal.Signals(number).name
    if len(mailbox.processes(folder)) < num_processes:
        log.info("%s: stopping before training has begun", name)
        torchrun.send_signal(END_TORCHRUN)
        _end_ranks(folder)
        return
    log.info("%s: saving and stopping; the same signal again stops at once", name)
    # srun by itself delivers USR1 to all processes, and the second signal of a kind ends a rank.
    _signal_ranks(folder, signal.SIGTERM if number == signal.SIGUSR1 else signal.SIGUSR1)


def _end_ranks(folder: Path) -> None:
    # A rank that listens takes SIGTERM for a request to save, which it cannot without the others.
    _signal_ranks(folder, signal.SIGKILL)


def _signal_ranks(folder: Path, number: signal.Signals) -> None:
    for pid in mailbox.processes(folder).values():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _unspoken(
    torchrun: subprocess.Popen[bytes], folder: Path, stop: _StopRequests, has_begun: bool
) -> Failure | None:
    """The failure that no rank has told; none when it is the end that was asked for."""
    if torchrun.returncode == 0 or stop.insisted or (stop.asked and not has_begun):
        return None
    words = mailbox.last_words(folder)
    if stop.asked and words.endswith(tuple(number.name for number in STOP_SIGNALS)):
        # What asks ends a rank that does not listen yet.
        return None
    if not words:
        return Failure(0, f"torchrun left with {torchrun.returncode}")
    if "SIGKILL" in words:
        words += " (somebody killed it, or the system did to reclaim memory: see `dmesg`)"
    return Failure(0, words)


def _rows_of(run: Path, num_rows: int, pids: Collection[int]) -> list[dict[str, Any]]:
    """Rows, after the first `num_rows`, of the attempt that one of these processes has begun.
    Another launch, which has the run while this one is refused, adds rows of its own.
    """
    rows = attempts(run)[num_rows:]
    ours = [
        row["attempt"]
        for row in rows
        if row["event"] == "start" and row["host"] == socket.gethostname() and row["pid"] in pids
    ]
    return [row for row in rows if row["attempt"] in ours[-1:]]


def _close(run: Path, num_rows: int, pids: Collection[int], outcome: Outcome, reason: str) -> None:
    """Write the end of the attempt of this launch, if its ranks were ended before they could, or
    the one that did has only heard of it.
    """
    rows = _rows_of(run, num_rows, pids)
    if rows and (rows[-1]["event"] == "start" or rows[-1].get("reason", "").startswith(HEARSAY)):
        # A full disk may be what ended them.
        with suppress(StorageError):
            end_attempt(run, rows[-1]["attempt"], outcome=outcome, step=None, reason=reason)


def _error(failure: Failure, run: Path) -> LaunchError:
    if failure.exit_code is not None:
        return LaunchError(failure.message, failure.exit_code)
    if failure.traceback:
        log.error("rank %d:\n%s", failure.rank, failure.traceback.rstrip())
    return LaunchError(
        f"training failed: {failure.message}; once the cause is mended, the same command goes on "
        f"from {_last_saved(run)}"
    )


def _last_saved(run: Path) -> str:
    from train.checkpoint import committed

    step = next(iter(committed(run)), 0)
    return f"step {step} of {run}" if step else "the beginning"


class _StopRequests:
    """Collects stop signals while it is entered."""

    def __init__(self) -> None:
        self.asked = ""
        """Name of the first signal."""
        self.insisted = False
        """Whether a signal of one kind came twice."""
        self._received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequests:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> int | None:
        """The first signal, once; a later one of another kind asks for nothing new."""
        if not self.insisted and len(set(self._received)) < len(self._received):
            self.insisted = True
            log.info("asked again: stopping at once")
        if self.asked or not self._received:
            return None
        self.asked = signal.Signals(self._received[0]).name
        return self._received[0]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
