"""The README's commands for several hosts without Slurm, on hosts with networks of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts import NETWORK, Host, hosts
from tests.ranks import run_ranks
from tests.train.test_pretrain import RECIPE, config, losses, train_run
from train.attempts import attempts

STEPS = ("steps=12", "eval.samples=2", "zero.stage=2")
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Host, ...]]:
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on four ranks of one machine."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_ranks(4, train_run, config(dataset, *STEPS), run)
    return run


def job(folder: Path, dataset: Path) -> list[object]:
    """What every launcher is told to run; what it leaves is in folder/run."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    return ["pretrain", recipe, f"data={dataset}", "--run", folder / "run", *STEPS]


def launchers(style: str, folder: Path, first: Host) -> list[list[object]]:
    """What is typed on each host, in front of the job."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    if style == "static":
        place = [f"--master-addr={first.address}", "--master-port=29500"]
        return [[*torchrun, f"--node-rank={n}", *place, "-m", "--", "launcher"] for n in (0, 1)]
    if style == "c10d":
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:29501", "--rdzv-id=run"]
        return [[*torchrun, *meet, "-m", "--", "launcher"]] * 2
    hostfile = folder / "hostfile"
    hostfile.write_text("host1 slots=2\nhost2 slots=2\n")
    deepspeed = [Path(sys.executable).with_name("deepspeed"), f"--hostfile={hostfile}", "--no_ssh"]
    place = [f"--master_addr={first.address}", "--master_port=29502", "--no_local_rank"]
    return [[*deepspeed, f"--node_rank={n}", *place, "--module", "launcher"] for n in (0, 1)]


@pytest.mark.parametrize("style", ["static", "c10d", "deepspeed"])
def test_two_hosts_train_what_one_trains(
    two: tuple[Host, ...], dataset: Path, plain: Path, tmp_path: Path, style: str
) -> None:
    commands = launchers(style, tmp_path, two[0])
    started = [
        host.start([*command, *job(tmp_path, dataset)], DS_ACCELERATOR="cpu")
        for host, command in zip(two, commands, strict=True)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        end(started)
    assert [process.returncode for process in started] == [0, 0], said
    assert losses(tmp_path / "run") == losses(plain)
    (start,) = (row for row in attempts(tmp_path / "run") if row["event"] == "start")
    assert (start["host"], start["world_size"]) == ("host1", 4)


def test_a_spare_host_takes_the_place_of_one_that_dies(dataset: Path, tmp_path: Path) -> None:
    """Two hosts train; the third waits in the rendezvous until one of them is gone."""
    more = ("steps=60", "checkpoint.every=5")
    plain = tmp_path / "plain"
    run_ranks(2, train_run, config(dataset, *STEPS, *more), plain)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={NETWORK}.1:29500", "--rdzv-id=run"),
        *("--max-restarts=3", "-m", "--", "launcher", *job(tmp_path, dataset), *more),
    ]
    run = tmp_path / "run"
    with hosts(3) as made:
        # torch 2.13 does not tell a host that comes later where the ranks' own store is.
        own = {"DS_ACCELERATOR": "cpu", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        started = [host.start(command, **own) for host in made[:2]]
        try:
            wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 2)
            assert attempts(run)[0]["host"] == "host1"
            # Whoever comes third waits.
            started.append(made[2].start(command, **own))
            wait_for(lambda: len(losses(run)) >= 12)
            made[1].power_off()
            said = started[0].communicate(timeout=240)[0]
        finally:
            end(started)
    assert started[0].returncode == 0, said
    assert losses(run) == losses(plain)
    assert len([row for row in attempts(run) if row["event"] == "start"]) >= 2


def end(started: Sequence[subprocess.Popen[str]]) -> None:
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
