"""slurm/pretrain.sbatch on a real Slurm, as `headrace submit` fills it in: whatever happens to the
job, the run ends with the losses of a run that nothing happened to, and nobody is left behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.durable import read_rows
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STEPS, Pretraining, submit
from tests.train.test_pretrain import losses
from train.attempts import attempts
from train.checkpoint import committed

pytestmark = pytest.mark.slurm


def check_equal(job: Pretraining, plain: Path) -> None:
    """Every number of the run, and nothing left on the nodes."""
    assert losses(job.run) == losses(plain)
    assert committed(job.run)[0] == STEPS
    job.slurm.until(lambda: job.slurm.commands() == [], "end of all processes", seconds=30)


def test_a_job_on_two_nodes_trains_to_the_end(slurm: Cluster, dataset: Path, plain: Path) -> None:
    job = submit(slurm, dataset, "whole")
    assert slurm.wait(job.job) == "COMPLETED", job.said()
    assert job.outcomes() == [("complete", "")]
    check_equal(job, plain)


def test_a_job_that_is_told_its_time_is_over_saves_is_queued_again_and_goes_on(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    # Loader processes get the signal, too: srun sends it to every process of a step.
    job = submit(slurm, dataset, "signalled", "data.num_workers=2")
    job.reaches(120)
    # What Slurm sends before the time limit, by --signal=B:USR1.
    slurm.run("scancel", "--batch", "--signal=USR1", job.job)
    assert slurm.wait(job.job) == "COMPLETED", job.said()
    (first, second) = job.outcomes()
    assert first == ("stopped", "SIGUSR1") and second == ("complete", "")
    assert slurm.job(job.job)["Restarts"] == "1"
    # Nothing that was done was done again.
    steps = [row["step"] for row in _all_rows(job.run) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    check_equal(job, plain)


def test_a_job_that_makes_way_for_another_one_goes_on_after_it(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    job = submit(slurm, dataset, "preempted")
    job.reaches(120)
    other = slurm.run(
        "sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null",
        "--wrap", "true",
    )  # fmt: skip
    assert slurm.wait(other) == "COMPLETED"
    assert slurm.wait(job.job) == "COMPLETED", job.said()
    assert job.outcomes()[0][0] == "stopped", job.said()
    steps = [row["step"] for row in _all_rows(job.run) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    check_equal(job, plain)


@pytest.mark.parametrize("fate", ["power_off", "hang"])
def test_a_node_that_dies_or_hangs_is_replaced(
    fate: str, slurm: Cluster, dataset: Path, plain: Path
) -> None:
    job = submit(slurm, dataset, fate)
    job.reaches(120)
    lost = slurm.job(job.job)["NodeList"]
    victim = "n2" if "2" in lost else "n3"
    getattr(slurm, fate)(victim)
    try:
        assert slurm.wait(job.job) == "COMPLETED", job.said()
    finally:
        if fate == "hang":
            slurm.power_off(victim)
        slurm.power_on(victim)
    nodes = slurm.job(job.job)["NodeList"]
    assert victim[1] not in nodes, nodes
    assert job.outcomes()[-1] == ("complete", "")
    check_equal(job, plain)


def test_a_node_that_dies_and_has_no_substitute_is_done_without(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    job = submit(slurm, dataset, "fewer", "--min-nodes", "1", sbatch="--exclude=n1")
    job.reaches(120)
    slurm.power_off("n2")
    try:
        assert slurm.wait(job.job) == "COMPLETED", job.said()
    finally:
        slurm.power_on("n2")
    sizes = [row["world_size"] for row in attempts(job.run) if row["event"] == "start"]
    assert sizes == [2, 1] and job.outcomes()[-1] == ("complete", "")
    ours, theirs = losses(job.run), losses(plain)
    assert [row[:3] for row in ours] == [row[:3] for row in theirs], "samples, and their order"
    # One rank adds the same gradients up in another order, from the checkpoint on.
    assert [row[3] for row in ours] == pytest.approx([row[3] for row in theirs], rel=1e-3)


def test_a_run_that_crashes_without_progress_is_given_up(slurm: Cluster, dataset: Path) -> None:
    job = submit(slurm, dataset, "crashes", HEADRACE_FAULT="forward:2:1:raise")
    assert slurm.wait(job.job) == "FAILED"
    assert "3 failures in a row without a new checkpoint, giving up" in job.said()
    assert slurm.job(job.job)["Restarts"] == "2"
    started = [row["attempt"] for row in attempts(job.run) if row["event"] == "start"]
    assert started == [1, 2, 3]
    # srun may end rank 0 before it has heard of the other rank's death, and has said so.
    assert {outcome for outcome, _ in job.outcomes()} <= {"failed"}


def test_a_stop_file_ends_the_job_for_good(slurm: Cluster, dataset: Path, plain: Path) -> None:
    job = submit(slurm, dataset, "stopped")
    job.reaches(60)
    (job.run / "STOP").touch()
    assert slurm.wait(job.job) == "COMPLETED"
    assert "stopped by" in job.said()
    at = committed(job.run)[0]
    assert 60 <= at < STEPS and slurm.job(job.job)["Restarts"] == "0"
    with pytest.raises(AssertionError, match=r"STOP keeps the run standing, and a job would leave"):
        submit(slurm, dataset, "stopped")
    script = job.run / "logs" / "pretrain.sbatch"
    again = Pretraining(slurm, job.run, slurm.run("sbatch", "--parsable", script))
    assert slurm.wait(again.job) == "COMPLETED"
    assert "exists: not starting" in again.said() and committed(job.run)[0] == at
    (job.run / "STOP").unlink()
    last = submit(slurm, dataset, "stopped")
    assert slurm.wait(last.job) == "COMPLETED"
    check_equal(last, plain)


def test_scancel_leaves_nobody_behind_and_nothing_lost(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    job = submit(slurm, dataset, "cancelled")
    job.reaches(120)
    slurm.run("scancel", job.job)
    assert slurm.wait(job.job) == "CANCELLED"
    slurm.until(lambda: slurm.commands() == [], "end of all processes", seconds=30)
    again = submit(slurm, dataset, "cancelled")
    assert slurm.wait(again.job) == "COMPLETED", again.said()
    check_equal(again, plain)


def test_a_controller_that_dies_takes_no_job_with_it(
    slurm: Cluster, dataset: Path, plain: Path
) -> None:
    job = submit(slurm, dataset, "controller")
    job.reaches(120)
    slurm.restart_controller()
    assert slurm.wait(job.job) == "COMPLETED", job.said()
    assert slurm.job(job.job)["Restarts"] == "0"
    check_equal(job, plain)


def _all_rows(run: Path) -> list[dict[str, Any]]:
    """Every row that was written, repeated steps too."""
    return read_rows(run / "metrics.jsonl")
