"""slurm/pretrain.sbatch and nodes that are no good, on a real Slurm: they are named, the job goes
on without them, and its losses are those of a run that nothing happened to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.presence import left_by_ranks
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STEPS, Pretraining, submit
from tests.train.test_pretrain import losses
from train.checkpoint import committed
from train.exclusion import excluded

pytestmark = pytest.mark.slurm


def check_went_on_without_n2(job: Pretraining, plain: Path) -> None:
    assert excluded(job.run) == ["n2"]
    told = job.slurm.job(job.job)
    assert told["ExcNodeList"] == "n2" and told["Restarts"] == "1"
    assert job.slurm.run("scontrol", "show", "hostnames", told["NodeList"]).split() == ["n1", "n3"]
    assert losses(job.run) == losses(plain)
    assert committed(job.run)[0] == STEPS
    job.slurm.until(lambda: job.slurm.commands() == [], "end of all processes", seconds=30)


def verdict_of(job: Pretraining) -> dict[str, Any]:
    """Of the last preflight."""
    found: dict[str, Any] = json.loads((job.run / "logs/preflight/verdict.json").read_bytes())
    return found


def test_a_node_without_the_dataset_is_left_out_before_training(
    slurm: Cluster, dataset: Path, plain: Path, tmp_path: Path
) -> None:
    with slurm.covered("n2", dataset, tmp_path):
        job = submit(slurm, dataset, "no-dataset", PREFLIGHT="1")
        assert slurm.wait(job.job) == "COMPLETED", job.said()
    said = job.said()
    assert f"unfit: n2: dataset: {dataset} is not a dataset: it holds no manifest.json" in said
    assert "queueing again without n2" in said
    # The second preflight has measured what the network between the two that are left gives.
    last = verdict_of(job)
    assert last["fit"] and {one["host"] for one in last["ranks"]} == {"n1", "n3"}
    assert {host for one in last["ranks"] for host in one["pairs"]} == {"n1", "n3"}
    # No attempt of the training has failed.
    assert job.outcomes() == [("complete", "")]
    check_went_on_without_n2(job, plain)


def test_a_node_that_cannot_start_python_is_left_out(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    with slurm.covered("n2", Path(sys.executable).resolve(), Path("/bin/false").resolve()):
        job = submit(slurm, dataset, "no-python", PREFLIGHT="1")
        assert slurm.wait(job.job) == "COMPLETED", job.said()
    assert "unfit: n2: presence: never came: nothing of it has reached the run's folder" in (
        job.said()
    )
    check_went_on_without_n2(job, plain)


def test_a_node_whose_ranks_hang_in_the_preflight_is_left_out(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    job = submit(slurm, dataset, "stuck", PREFLIGHT="1", PREFLIGHT_SECONDS="10")
    on_its_way = ("dataset", "rendezvous", "matmul")
    slurm.until(
        lambda: any(f.host == "n2" and f.phase in on_its_way for f in left_by_ranks(job.run)),
        "rank 1 on its way",
    )
    assert slurm.stop_ranks("n2", "preflight") == 1
    assert slurm.wait(job.job) == "COMPLETED", job.said()
    assert "unfit: n2: presence: rank 1 no longer answers at " in job.said()
    assert job.outcomes() == [("complete", "")]
    check_went_on_without_n2(job, plain)


def test_a_node_whose_ranks_hang_is_named_by_the_watch_and_left_out(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    job = submit(slurm, dataset, "hung", "stall_seconds=15")
    job.reaches(120)
    assert slurm.stop_ranks("n2", "pretrain") == 1
    assert slurm.wait(job.job) == "COMPLETED", job.said()
    (first, reason), last = job.outcomes()
    assert first == "failed" and reason.startswith("rank 1 on n2 no longer answers: ")
    assert last == ("complete", "")
    report = json.loads((job.run / "attempts" / "000001.stall.json").read_bytes())
    assert report["exclude"] == ["n2"]
    assert "queueing again without n2" in job.said()
    check_went_on_without_n2(job, plain)
