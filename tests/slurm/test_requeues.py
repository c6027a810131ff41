"""Jobs that are queued again, by a real time limit and twenty times in a row, lose no step and no
bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data.durable import read_rows
from tests.ranks import run_ranks
from tests.slurm.cluster import Cluster, cluster
from tests.train.test_pretrain import RECIPE, config, losses, train_run
from train.attempts import attempts

NUM_REQUEUES = 20
# More steps than fit: a test ends its run where it has seen enough, however fast the machine is.
SIZES = ("steps=1000000", "checkpoint.every=0", "eval.samples=2", "optim.lr=1e-3")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as made:
        (made.folder / "small.toml").write_text(RECIPE)
        yield made


def submit(slurm: Cluster, dataset: Path, run: Path, *more: str) -> str:
    """A job on two nodes of one rank each."""
    argv = ["submit", "small.toml", f"data={dataset}", "--run", run, *SIZES]
    return slurm.run("headrace", *argv, "--nodes", "2", "--gpus-per-node", "0", *more)


def steps_of(run: Path) -> list[int]:
    """Every step that was recorded, those that were done twice, too."""
    return [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def goes_on(slurm: Cluster, run: Path, count: int) -> None:
    """Wait for so many more steps."""
    before = max(steps_of(run), default=0)
    what = f"{count} steps behind {before}"
    slurm.until(lambda: max(steps_of(run), default=0) > before + count, what)


def ends_of(run: Path) -> list[tuple[str, str]]:
    rows = [row for row in attempts(run) if row["event"] == "end"]
    return [(row["outcome"], row["reason"]) for row in rows]


def check(slurm: Cluster, dataset: Path, run: Path, whole: Path, *more: str) -> None:
    """Nobody is left, every step was done once, and all have the bits of a run without a break."""
    slurm.until(lambda: slurm.commands() == [], "end of all processes", seconds=30)
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1)), "no step twice, none left out"
    run_ranks(2, train_run, config(dataset, *SIZES, *more), whole, len(steps))
    assert losses(whole) == losses(run)


def test_a_run_goes_through_its_time_limit_to_the_bit(
    slurm: Cluster, dataset: Path, tmp_path: Path
) -> None:
    run = slurm.folder / "run"
    job = submit(slurm, dataset, run, "zero.stage=3", "--time", "3", "--lead", "60")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "a limit", seconds=240)
    said = (run / "logs" / f"slurm-{job}.out").read_text()
    ((outcome, reason),) = ends_of(run)
    assert outcome == "stopped" and "queueing again" in said, said
    assert reason == "SIGUSR1" or "before the end of" in reason
    goes_on(slurm, run, 20)
    (run / "STOP").touch()
    assert slurm.wait(job) == "COMPLETED"
    check(slurm, dataset, run, tmp_path / "whole", "zero.stage=3")


def test_a_run_is_queued_again_twenty_times_to_the_bit(
    slurm: Cluster, dataset: Path, tmp_path: Path
) -> None:
    run = slurm.folder / "run"
    job = submit(slurm, dataset, run, "zero.stage=2", "--time", "120")
    for number in range(NUM_REQUEUES):
        goes_on(slurm, run, 5)
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        slurm.until(lambda n=number: slurm.job(job)["Restarts"] == str(n + 1), "the queue")
    goes_on(slurm, run, 5)
    (run / "STOP").touch()
    said = (run / "logs" / f"slurm-{job}.out").read_text()
    assert slurm.wait(job) == "COMPLETED", said
    assert [outcome for outcome, _ in ends_of(run)] == ["stopped"] * (NUM_REQUEUES + 1), said
    check(slurm, dataset, run, tmp_path / "whole", "zero.stage=2")
