"""What slurm/pretrain.sbatch runs around the torchrun of every node."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.template import FOLDER

SCRIPT = (FOLDER / "pretrain.sbatch").read_text()
(WRAPPER,) = re.findall(r"^WRAPPER='(.*?)'$", SCRIPT, re.MULTILINE | re.DOTALL)


def start(local: Path, command: str, *, node: int = 1) -> subprocess.Popen[str]:
    """The wrapper around a command of bash, on a node that holds something in `local`."""
    (local / "code").mkdir(parents=True)
    return subprocess.Popen(
        ["bash", "-c", WRAPPER, "_", str(local), "bash", "-c", command],
        env={"PATH": "/usr/bin:/bin", "SLURM_NODEID": str(node)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_command_knows_its_node_and_its_code_is_passed_on(tmp_path: Path) -> None:
    with start(tmp_path / "local", "echo $PET_NODE_RANK $(ulimit -c); exit 7") as ran:
        assert ran.stdout is not None and ran.stdout.read() == "1 0\n"
    # Another step of this job may follow.
    assert ran.returncode == 7 and (tmp_path / "local" / "code").is_dir()


def test_what_asks_to_save_does_not_reach_a_command_that_does_not_listen(tmp_path: Path) -> None:
    with start(tmp_path / "local", "echo ready; read -t 1 <&2; echo done; exit 0") as ran:
        assert ran.stdout is not None and ran.stdout.readline() == "ready\n"
        _signal_all(ran, signal.SIGUSR1)
        assert ran.stdout.read() == "done\n"
    assert ran.returncode == 0


@pytest.mark.parametrize(("node", "is_kept"), [(1, False), (0, True)])
def test_a_node_removes_what_it_holds_when_its_job_is_ended(
    node: int, is_kept: bool, tmp_path: Path
) -> None:
    """After the ranks, which may still save; the batch script looks after its own node."""
    local = tmp_path / "local"
    save = f"trap 'ls {local}; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    with start(local, save, node=node) as ran:
        assert ran.stdout is not None and ran.stdout.readline() == "ready\n"
        _signal_all(ran, signal.SIGTERM)
        assert ran.stdout.read() == "code\n"
    assert ran.returncode == 3 and local.exists() == is_kept


def _signal_all(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To every process of the step, as Slurm does."""
    os.killpg(process.pid, number)
