"""srun itself starts the ranks, one task per GPU, without torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.slurm.cluster import cluster
from tests.train.test_pretrain import RECIPE, config, losses, train_run
from train.attempts import attempts

STEPS = ("steps=12", "eval.samples=2", "zero.stage=3")
pytestmark = pytest.mark.slurm


def test_one_task_per_gpu_trains_what_torchrun_trains(
    dataset: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_ranks(4, train_run, config(dataset, *STEPS), tmp_path / "plain")
    with cluster(tmp_path_factory.mktemp("srun"), nodes=2) as slurm:
        (slurm.folder / "small.toml").write_text(RECIPE)
        run = slurm.folder / "run"
        slurm.run(
            *("srun", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--mem=0"),
            *(sys.executable, "-m", "launcher", "pretrain", "small.toml", f"data={dataset}"),
            *("--run", run, *STEPS),
        )
        assert losses(run) == losses(tmp_path / "plain")
        first, last = attempts(run)
        assert (first["world_size"], last["outcome"]) == (4, "complete")
        assert first["slurm_job"] is not None
        slurm.until(lambda: slurm.commands() == [], "end of all processes", seconds=30)
