"""Twenty requeues in a row: a job that is always told to make way loses no step and no bit."""

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
SIZES = ("steps=1000000", "checkpoint.every=0", "eval.samples=2", "zero.stage=2", "optim.lr=1e-3")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as made:
        (made.folder / "small.toml").write_text(RECIPE)
        yield made


def last_step(run: Path) -> int:
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    return max((row["step"] for row in rows), default=0)


def test_a_run_is_queued_again_twenty_times_to_the_bit(
    slurm: Cluster, dataset: Path, tmp_path: Path
) -> None:
    run = slurm.folder / "run"
    job = slurm.run(
        "headrace", "submit", "small.toml", f"data={dataset}", "--run", run, *SIZES,
        "--nodes", "2", "--gpus-per-node", "0", "--time", "120",
    )  # fmt: skip
    for number in range(NUM_REQUEUES):
        before = last_step(run)
        slurm.until(lambda b=before: last_step(run) > b + 5, f"steps of attempt {number + 1}")
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        slurm.until(lambda n=number: slurm.job(job)["Restarts"] == str(n + 1), "the queue")
    before = last_step(run)
    slurm.until(lambda: last_step(run) > before + 5, "steps of the last attempt")
    (run / "STOP").touch()
    said = (run / "logs" / f"slurm-{job}.out").read_text()
    assert slurm.wait(job) == "COMPLETED", said
    ends = [row for row in attempts(run) if row["event"] == "end"]
    assert [row["outcome"] for row in ends] == ["stopped"] * (NUM_REQUEUES + 1), said
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)), "no step twice, none left out"
    slurm.until(lambda: slurm.commands() == [], "end of all processes", seconds=30)
    whole = tmp_path / "whole"
    run_ranks(2, train_run, config(dataset, *SIZES), whole, len(steps))
    assert losses(whole) == losses(run)
