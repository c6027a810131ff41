"""A cluster of three nodes per file, and the run that its jobs are held against."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.jobs import SIZES
from tests.train.test_pretrain import RECIPE, config, train_run


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as made:
        (made.folder / "small.toml").write_text(RECIPE)
        yield made


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, on two ranks."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_ranks(2, train_run, config(dataset, *SIZES, "zero.stage=2"), run)
    return run
