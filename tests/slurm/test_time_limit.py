"""A real time limit: Slurm's own USR1, a save, the queue, and the same bits as without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.slurm.cluster import Cluster, cluster
from tests.train.test_pretrain import RECIPE, config, losses, train_run
from train.attempts import attempts
from train.metrics import read_metrics

# More than fits: the test ends the run some steps behind the limit, however fast the machine is.
SIZES = ("steps=1000000", "checkpoint.every=0", "eval.samples=2", "zero.stage=3", "optim.lr=1e-3")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as made:
        (made.folder / "small.toml").write_text(RECIPE)
        yield made


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    rows = read_metrics(run) if path.exists() else []
    return max((row["step"] for row in rows), default=0)


def test_a_run_goes_through_its_time_limit_to_the_bit(
    slurm: Cluster, dataset: Path, tmp_path: Path
) -> None:
    run = slurm.folder / "run"
    job = slurm.run(
        "headrace", "submit", "small.toml", f"data={dataset}", "--run", run, *SIZES,
        "--nodes", "2", "--gpus-per-node", "0", "--time", "3", "--lead", "60",
    )  # fmt: skip
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "a limit", seconds=240)
    first = [row for row in attempts(run) if row["event"] == "end"]
    said = (run / "logs" / f"slurm-{job}.out").read_text()
    assert [row["outcome"] for row in first] == ["stopped"], said
    assert first[0]["reason"] == "SIGUSR1" or "before the end of" in first[0]["reason"]
    assert "queueing again" in said
    at = first[0]["step"]
    slurm.until(lambda: last_step(run) > at + 20, "steps behind the limit", seconds=120)
    (run / "STOP").touch()
    assert slurm.wait(job) == "COMPLETED"
    found = losses(run)
    assert [row[0] for row in found] == list(range(1, len(found) + 1)), "no step twice, none left"
    whole = tmp_path / "whole"
    run_ranks(2, train_run, config(dataset, *SIZES), whole, len(found))
    assert losses(whole) == found
