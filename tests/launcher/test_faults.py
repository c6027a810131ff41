"""What the launcher makes of ranks that die before they can tell, stand still, or are stopped: an
exit code, one line that names the rank, and a run that goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.test_pretrain import RECIPE, config, train_run
from train import faults
from train.attempts import attempts

STALL_SECONDS = 6
MESSAGES = {
    "kill": "training failed: rank {rank} ended with SIGKILL",
    "term": "training failed: rank {rank} ended with SIGTERM",
    "usr1": "training failed: rank {rank} ended with SIGUSR1",
    "eio": "training failed: OSError: [Errno 5] Input/output error: 'HEADRACE_FAULT {phase}'",
    "enospc": "error: HEADRACE_FAULT {phase} cannot be written: No space left on device; make room",
    "exit": "training failed: rank {rank} left with 0, and nothing was done yet",
    "raise": "training failed: RuntimeError: HEADRACE_FAULT {phase}",
    "stop": "error: rank {rank} on ",
    "hang": "error: rank {rank} on ",
}
"""What is told of a rank that something happens to before it has met the others."""
BEFORE_THEY_MEET = [
    f"{phase}:0:{rank}:{kind}"
    for phase in ("import", "rendezvous")
    for kind in (*MESSAGES, "slow")
    for rank in (0, 1)
]
BY_DEFAULT = ("import:0:1:kill", "rendezvous:0:0:raise", "import:0:1:exit")
EXPORTS = {
    "kill": (-9, ""),
    "term": (-15, ""),
    "usr1": (-10, ""),
    "exit": (0, ""),
    "raise": (1, "RuntimeError: HEADRACE_FAULT export"),
    "enospc": (1, "HEADRACE_FAULT export"),
    "eio": (1, "HEADRACE_FAULT export"),
}
"""The exit code of an export, and what it says. It is one process: nobody waits for one that is
stopped or hangs, and a slow one is as good as any.
"""


def headrace(argv: list[str], fault: str = "") -> subprocess.CompletedProcess[str]:
    """One command, with a fault."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *argv],
        env=os.environ | {"HEADRACE_FAULT": fault, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def pretrain(
    dataset: Path, folder: Path, fault: str = "", *more: str
) -> subprocess.CompletedProcess[str]:
    """`headrace pretrain` on two ranks, unless `more` says otherwise."""
    recipe = folder / "small.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    argv = ["pretrain", str(recipe), f"data={dataset}", "--run", str(folder / "run")]
    argv += ["steps=5", "eval.samples=2", "checkpoint.every=2", f"stall_seconds={STALL_SECONDS}"]
    return headrace([*argv, "--nproc", "2", *more], fault)


@pytest.mark.parametrize(
    "text",
    [t if t in BY_DEFAULT else pytest.param(t, marks=pytest.mark.slow) for t in BEFORE_THEY_MEET],
)
def test_a_rank_that_dies_before_it_has_met_the_others_ends_all(
    dataset: Path, tmp_path: Path, text: str
) -> None:
    fault, done = faults.parse(text), pretrain(dataset, tmp_path, text)
    assert f"HEADRACE_FAULT: {fault.kind} at {fault.phase}, step 0" in done.stderr
    if fault.kind == "slow":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert MESSAGES[fault.kind].format(rank=fault.rank, phase=fault.phase) in last, done.stderr
    if fault.kind in ("stop", "hang"):
        assert " did not come to the rendezvous at localhost:" in last
    end = {
        "stop": "Then run the same command again",
        "hang": "Then run the same command again",
        "enospc": "run the same command again: what was finished is kept",
    }.get(fault.kind, "the same command goes on from the beginning")
    assert last.endswith(end), done.stderr


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("data:4:1:hang", "stands still at data of step 4 for "),
        ("backward:4:1:stop", " no longer answers: its process is stopped"),
    ],
)
def test_a_rank_that_stands_still_is_named_with_the_stacks_of_all(
    dataset: Path, tmp_path: Path, fault: str, verdict: str
) -> None:
    done = pretrain(dataset, tmp_path, fault)
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert verdict in last and last.startswith("error: rank 1 "), done.stderr
    report = json.loads((tmp_path / "run/attempts/000001.stall.json").read_bytes())
    assert report["verdict"] in last
    told = {row["rank"]: row for row in report["ranks"]}
    assert set(told) == ({0, 1} if "hang" in fault else {0})
    assert told[0]["waits"] and "Thread" in told[0]["stacks"]
    if "hang" in fault:
        assert told[1]["reading"].startswith("reading samples 36 to 47 from train/main/shard-")
        assert "faults.py" in told[1]["stacks"]
    assert attempts(tmp_path / "run")[-1]["outcome"] == "failed"
    # Whatever comes before the fault is not the watch's; what follows it takes 5 s at most.
    assert STALL_SECONDS <= told[0]["seconds"] <= STALL_SECONDS + 5
    again = pretrain(dataset, tmp_path, "data:99:0:kill", "--nproc", "1")
    assert again.returncode == 0, again.stderr
    missed = "HEADRACE_FAULT: kill at data, step 99 did not happen, as rank 0 never came there"
    assert missed in again.stderr


@pytest.mark.parametrize("argv", [["pretrain", "tiny-cpu"], ["export", "RUN", "OUT"]])
def test_a_fault_that_there_is_not_is_refused_by_every_command(argv: list[str]) -> None:
    done = headrace(argv, "forward:3:0:faint")
    assert done.returncode == 2
    assert "HEADRACE_FAULT='forward:3:0:faint': no kind 'faint'; there are" in done.stderr


@pytest.fixture(scope="module")
def short(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps: enough to export."""
    run = tmp_path_factory.mktemp("short") / "run"
    assert run_ranks(1, train_run, config(dataset, "steps=2"), run) == ["complete"]
    return run


@pytest.mark.parametrize(
    "kind", [k if k == "kill" else pytest.param(k, marks=pytest.mark.slow) for k in EXPORTS]
)
def test_an_export_that_dies_before_it_is_published_leaves_nothing_of_that_name(
    short: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    failed = headrace(["export", str(short), str(out)], f"export:0:0:{kind}")
    assert f"HEADRACE_FAULT: {kind} at export, step 0" in failed.stderr
    code, message = EXPORTS[kind]
    assert failed.returncode == code and message in failed.stderr, failed.stderr
    assert not out.exists()
    done = headrace(["export", str(short), str(out)])
    assert done.returncode == 0 and (out / "config.json").is_file(), done.stderr
