"""One submission of a run at a time, beside no job of it that is in the queue already."""

from __future__ import annotations

import pytest

from launcher import queue
from launcher.jobs import submit
from launcher.template import SlurmError, SlurmUsageError
from tests.launcher.slurm_stand_ins import Cluster, job
from tests.launcher.test_slurm import dataset_in


def test_a_run_has_one_job_in_the_queue(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody names what the second one waits for."""
    monkeypatch.setenv("PATH", cluster.path)
    cluster.command("sbatch", "echo 71")
    log = f"{cluster.run}/logs/slurm-%j.out"
    (cluster.state / "queue").write_text(
        f"70|RUNNING|None|30|0|n1|{log}|\n69|COMPLETING|None|30|0|n1|{log}|\n"
    )
    dataset = dataset_in(cluster.state)
    with pytest.raises(SlurmUsageError) as refused:
        submit(job(cluster.run), dataset)
    assert str(refused.value).endswith(
        f":\n  pretrain: job 70 (RUNNING), whose log is "
        f"{cluster.run}/logs/slurm-70.out\n"
        "let them end, or cancel them (scancel 70), then submit again"
    )
    assert not (cluster.run / "logs" / "pretrain.sbatch").exists()
    assert submit(job(cluster.run, options=("--dependency=singleton",)), dataset) == "71"


@pytest.mark.parametrize(
    ("squeue", "why"),
    [
        ("echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1", "slurm_load_jobs error: U"),
        ("exit 3", "it left with 3"),
        ("exec sleep 60", "no answer in 1 s"),
    ],
)
def test_nothing_is_submitted_while_nobody_tells_what_is_in_the_queue(
    squeue: str, why: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    monkeypatch.setattr(queue, "PATIENT_SECONDS", 1.0)
    cluster.command("sbatch", 'touch "$STATE/sbatch"; echo 71')
    cluster.command("sleep", 'exec /bin/sleep "$@"')
    cluster.command("squeue", squeue)
    with pytest.raises(SlurmError, match=rf"squeue does not say .* \({why}.* was submitted: try"):
        submit(job(cluster.run), dataset_in(cluster.state))
    assert not (cluster.state / "sbatch").exists()


def test_the_second_of_two_submissions_at_once_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    cluster.command("sbatch", "echo 71")
    with (
        queue.sole_submission(cluster.run / "logs"),
        pytest.raises(
            SlurmUsageError, match=r"another `headrace submit` is at work on .*/run/logs"
        ),
    ):
        submit(job(cluster.run), dataset_in(cluster.state))
    assert submit(job(cluster.run), dataset_in(cluster.state)) == "71"


@pytest.mark.parametrize(
    ("said", "number"),
    [("71", "71"), ("71;cluster", "71"), ("Welcome\\n42\\n71", "71"), ("", ""), ("Bye", "")],
)
def test_the_number_of_a_job_is_one(
    said: str, number: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    cluster.command("sbatch", f'echo "{said}"')
    if number:
        assert submit(job(cluster.run), dataset_in(cluster.state)) == number
        return
    with pytest.raises(SlurmError, match=rf"names no job: '{said}'; it may have taken the script"):
        submit(job(cluster.run), dataset_in(cluster.state))
