"""One command, several processes, one exit code: with a toy job under the real torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.rank import Role, rank_of, recognise
from launcher.spawn import LaunchError, run_job
from launcher.spawn import thread_settings as threads
from train.attempts import attempts
from train.faults import FaultError

ROOT = Path(__file__).resolve().parent.parent.parent
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environ", "role", "rank"),
    [
        ({}, Role.LAUNCHER, 0),
        ({"RANK": "3"}, Role.LAUNCHER, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Role.TORCHRUN_RANK, 3),
        # A batch script has the job's variables but is no step.
        (ALLOCATION, Role.LAUNCHER, 0),
        # One task per node starts a launcher of its own, as does salloc's shell.
        (ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Role.LAUNCHER, 0),
        (
            ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"},
            Role.SRUN_RANK,
            2,
        ),
        # torchrun under srun: the nearer parent decides.
        (
            {"RANK": "9", "WORLD_SIZE": "16", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            Role.TORCHRUN_RANK,
            9,
        ),
    ],
)
def test_who_am_i(environ: dict[str, str], role: Role, rank: int) -> None:
    assert recognise(environ) is role
    assert rank_of(environ) == rank


def test_threads_are_shared_out_unless_somebody_decided() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads(1, {}) == {"OMP_NUM_THREADS": str(cores)}
    assert threads(10 * cores, {}) == {"OMP_NUM_THREADS": "1"}
    assert threads(2, {"OMP_NUM_THREADS": "7"}) == {}


@pytest.mark.parametrize(("outcome", "code"), [("complete", 0), ("failed", 1), ("stopped", 3)])
def test_one_process_trains_in_place(outcome: str, code: int, tmp_path: Path) -> None:
    pids = []

    def train() -> str:
        pids.append(os.getpid())
        return outcome

    assert run_job(train, run=tmp_path, num_processes=1) == code
    assert pids == [os.getpid()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_one_process_trains_stops_it_with_3(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> str:
        os.kill(os.getpid(), number)
        time.sleep(1)
        return "complete"

    caplog.set_level("INFO")
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run_job(train, run=tmp_path, num_processes=1) == 3
        assert signal.getsignal(number) is signal.SIG_IGN, "as it was"
    finally:
        signal.signal(number, before)
    assert caplog.messages[-1] == f"{signal.Signals(number).name}: stopped before training began"


@pytest.mark.parametrize(("num_processes", "ranks"), [(1, "rank 0 alone"), (2, "ranks 0 to 1")])
def test_a_fault_of_a_rank_that_there_is_not_starts_no_processes(
    num_processes: int, ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_FAULT", "data:5:2:kill")
    with pytest.raises(FaultError, match=f"there is no rank 2 here, but {ranks}"):
        run_job(lambda: "complete", run=tmp_path, num_processes=num_processes)


def test_an_srun_rank_starts_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(
        LaunchError, match="each task is one rank already; leave --nproc out"
    ) as raised:
        run_job(lambda: "complete", run=tmp_path, num_processes=2)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("what", "code", "last"),
    [
        ("complete", 0, "torchrun rank 0 of 2"),
        ("refuse", 2, "error: steps=60 in the run, 61 now"),
        ("refuse alone", 2, "error: shard-000000.tar is damaged"),
        (
            "die",
            1,
            "error: training failed: rank 1 ended with SIGKILL (somebody killed it, or the system "
            "did to reclaim memory: see `dmesg`); once the cause is mended, the same command goes "
            "on from the beginning",
        ),
    ],
)
def test_the_end_of_the_ranks_becomes_one_exit_code_and_one_line(
    what: str, code: int, last: str, tmp_path: Path
) -> None:
    with start(what, tmp_path) as job:
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == code, stderr
    first = ["launcher: starting 2 processes with torchrun", "torchrun rank 0 of 2"]
    assert stderr.splitlines() == first + [last] * (code > 0)
    rows = attempts(tmp_path)
    assert not rows or rows[-1]["outcome"] == ("complete" if code == 0 else "failed")


def test_what_ended_a_rank_outweighs_what_another_heard_of_it(tmp_path: Path) -> None:
    with start("hear of a death", tmp_path) as job:
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 1, stderr
    assert [row["event"] for row in attempts(tmp_path)] == ["start", "end", "end"]
    assert attempts(tmp_path)[-1]["reason"].startswith("rank 1 ended with SIGKILL (somebody")


def test_a_launch_that_is_refused_ends_no_attempt_of_another(tmp_path: Path) -> None:
    with start("refused by another", tmp_path) as job:
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 2 and "is being trained by attempt 1" in stderr
    assert [row["event"] for row in attempts(tmp_path)] == ["start"], "that one lives"


def test_an_error_that_nobody_expected_shows_its_traceback_once(tmp_path: Path) -> None:
    with start("crash", tmp_path) as job:
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 1
    assert stderr.count("Traceback") == 1
    assert stderr.count("\nRuntimeError: out of luck\n") == 1
    assert stderr.splitlines()[-1] == (
        "error: training failed: RuntimeError: out of luck; once the cause is mended, the same "
        "command goes on from the beginning"
    )
    assert len(stderr.splitlines()) < 20


@pytest.mark.parametrize(
    ("number", "to_all"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)]
)
def test_a_signal_reaches_the_ranks_and_the_code_is_3(
    number: int, to_all: bool, tmp_path: Path
) -> None:
    """To the launcher alone, as from a terminal, or to all, as from srun and systemd."""
    with start("wait", tmp_path) as job:
        until(lambda: all((tmp_path / f"listening-{rank}").exists() for rank in (0, 1)))
        ranks = [(tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1)]
        pids = {job.pid, *(int(pid) for pair in ranks for pid in pair)} if to_all else {job.pid}
        assert len(pids) == (4 if to_all else 1), "launcher, torchrun, two ranks"
        for pid in pids:
            os.kill(pid, number)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 3, stderr
    last = attempts(tmp_path)[-1]
    assert last["outcome"] == "stopped" and "reason" not in last, "it has saved"
    assert "Traceback" not in stderr


@pytest.mark.parametrize("what", ["wait and die", "be deaf"])
def test_what_a_rank_dies_of_that_was_asked_to_stop_tells_whether_it_failed(
    what: str, tmp_path: Path
) -> None:
    """While it saves, of something else; or of what it was asked with, as it did not listen yet."""
    with start(what, tmp_path) as job:
        until(lambda: all((tmp_path / f"listening-{rank}").exists() for rank in (0, 1)))
        job.send_signal(signal.SIGTERM)
        _, stderr = job.communicate(timeout=60)
    last, row = stderr.splitlines()[-1], attempts(tmp_path)[-1]
    if what == "be deaf":
        assert job.returncode == 3 and "error" not in stderr, stderr
        assert (row["outcome"], row["reason"]) == ("stopped", "SIGTERM; ended before it was saved")
        return
    assert job.returncode == 1 and row["outcome"] == "failed", stderr
    assert last.startswith("error: training failed: rank 0 ended with SIGKILL (somebody killed it")
    assert last.endswith("the same command goes on from the beginning")


def test_the_same_signal_twice_ends_the_ranks_at_once_with_3(tmp_path: Path) -> None:
    with start("wait", tmp_path) as job:
        until(lambda: all((tmp_path / f"listening-{rank}").exists() for rank in (0, 1)))
        job.send_signal(signal.SIGINT)
        time.sleep(0.02)
        job.send_signal(signal.SIGINT)
        _, stderr = job.communicate(timeout=10)
    assert job.returncode == 3, stderr
    assert stderr.splitlines()[-2:] == [
        "asked again: stopping at once",
        "the same command goes on from the beginning",
    ]
    assert len(stderr.splitlines()) <= 5
    assert attempts(tmp_path)[-1]["outcome"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_stops_at_once_with_3(number: int, tmp_path: Path) -> None:
    with start("wait", tmp_path) as job:
        assert job.stderr is not None
        assert "launcher: starting 2 processes" in job.stderr.readline()
        job.send_signal(number)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 3
    assert stderr == f"{signal.Signals(number).name}: stopping before training has begun\n"
    assert not (tmp_path / "attempts.jsonl").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="ranks follow their parent on Linux only")
@pytest.mark.parametrize("victim", ["launcher", "torchrun"])
def test_no_rank_outlives_a_killed_parent(victim: str, tmp_path: Path) -> None:
    with start("wait", tmp_path) as job:
        until(lambda: all((tmp_path / f"listening-{rank}").exists() for rank in (0, 1)))
        ranks = [(tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1)]
        os.kill(job.pid if victim == "launcher" else int(ranks[0][1]), signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pair in ranks for pid in pair))
        job.communicate(timeout=60)
    assert job.returncode == (-signal.SIGKILL if victim == "launcher" else 1)


def start(what: str, run: Path) -> subprocess.Popen[str]:
    """The toy job in a process of its own, as from a shell."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.launcher.toy_job", what, str(run)],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for `condition`, which something else makes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
