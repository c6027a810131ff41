"""The batch script: its text, and what it does when stand-ins play Slurm's commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import run_command
from launcher.jobs import render, submit
from launcher.lead import Lead
from launcher.site import Site
from launcher.slurm import rendezvous
from launcher.template import FOLDER, SlurmError, SlurmUsageError
from tests.launcher.slurm_stand_ins import Cluster, job
from train.config import RunConfig
from train.run import open_run

TEMPLATE = FOLDER / "pretrain.sbatch"


def test_the_script_is_the_template_with_the_settings_filled_in(tmp_path: Path) -> None:
    script = render(job(tmp_path / "run", options=("--partition=batch",)))
    settings = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert settings == [
        "#SBATCH --job-name=headrace-run",
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@300",
        f"#SBATCH --chdir={Path.cwd()}",
        "#SBATCH --partition=batch",
        f"#SBATCH --output={tmp_path}/run/logs/slurm-%j.out",
    ]
    assert "set -- llama-7b 'data=/data/books and more' optim.lr=1e-4\n" in script
    template = TEMPLATE.read_text().split("# to here\n")[1]
    assert script.endswith(template)


def test_without_gpus_none_are_asked_for(tmp_path: Path) -> None:
    assert "--gpus-per-node" not in [
        line.split("=")[0].removeprefix("#SBATCH ")
        for line in render(job(tmp_path, gpus_per_node=0)).splitlines()
        if line.startswith("#SBATCH")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "a day"}, r"--time 'a day' is no Slurm time; write MINUTES, HH:MM:SS or"),
        ({"min_nodes": 5}, r"--min-nodes 5 --nodes 4: the fewest nodes a job may start"),
        ({"num_nodes": 0}, r"--nodes 0 --gpus-per-node 8: a job needs at least one node"),
        ({"options": ("partition=x",)}, r"--sbatch 'partition=x' is no sbatch option"),
        ({"options": ("--nodes=5",)}, r"--sbatch=--nodes=5: the script sets --nodes itself; leave "
                                      r"it out: write --nodes$"),
        ({"options": ("-N 5",)}, r"--sbatch=-N 5: the script sets --nodes itself"),
        ({"options": ("-t10",)}, r"--sbatch=-t10: the script sets --time itself"),
        ({"options": ("--chdir /tmp",)}, r"the script sets --chdir itself"),
        ({"options": ("--signal=USR1@60",)}, r"sets --signal itself; leave it out: write --lead$"),
        ({"options": ("--mem=1G",)}, r"sets --mem itself; leave it out, or edit /"),
        ({"options": ("--nodelist=n1 --nodes=5",)}, r"is no sbatch option; write one with its da"),
        ({"options": ("--",)}, r"--sbatch '--' is no sbatch option"),
        ({"options": ("",)}, r"--sbatch '' is no sbatch option"),
        ({"options": ("--comment=it's",)}, r"is no sbatch option; write one with its dashes"),
        ({"options": ("--array=0-3",)}, r"sets --array itself; leave it out: one job goes on unt"),
        ({"time": "0", "lead": Lead(70_000, "why")}, r"save 70000 s before its limit \(why\), and "
                                                     r"Slurm takes 65535 at most; write --lead S"),
        ({"time": "\u0661\u0662:00:00"}, r"is no Slurm time"),
        ({"folder": Path("/r\udce9n")}, r"is not UTF-8, which a batch script is; choose another"),
        ({"time": "1"}, r"--time 1 is 60 s: the job is asked to save and stop 300 s before its "
                        r"limit, which is more than a third of it, .* at least --time 15, or "
                        r"--lead SECONDS if a save takes less$"),
        ({"time": "14:59"}, r"--time 14:59 is 899 s"),
        ({"time": "00:10:30"}, r"--time 00:10:30 is 630 s"),
        ({"time": "20", "lead": Lead(401, "why")}, r"401 s before its limit \(why\), .* --time 21"),
        ({"folder": Path("/shared/a\nb")}, r"'/shared/a\\nb' holds a line break or another"),
        ({"overrides": ("data=x", "log.wandb_project=\x1b")}, r"holds a line break or another"),
        ({"kind": "finetune", "num_nodes": 2}, r"nodes = 2: fine-tuning runs on one node; write 1"),
    ],
)  # fmt: skip
def test_a_job_that_slurm_would_refuse_is_refused_here(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SlurmUsageError, match=message) as refused:
        render(job(tmp_path, **changes))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("time", ["15", "15:00", "00:15:01", "1-0", "1-0:00", "1-00:00:00", "0"])
def test_a_limit_that_leaves_time_to_train_is_taken(time: str, tmp_path: Path) -> None:
    assert f"#SBATCH --time={time}\n" in render(job(tmp_path, time=time))


def test_what_is_no_business_of_the_script_goes_through(tmp_path: Path) -> None:
    options = ("--nodelist=n[1-4]", "-p batch", "--account=a", "--time-min=10")
    script = render(job(tmp_path, options=options))
    assert all(f"#SBATCH {option}\n" in script for option in options)


def test_submit_says_what_to_do_where_slurm_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SlurmError, match="sbatch not found: Slurm is not installed here; run this on"
    ):
        submit(job(tmp_path / "run"), dataset_in(tmp_path))


def test_a_job_without_a_dataset_is_not_submitted(tmp_path: Path) -> None:
    with pytest.raises(
        SlurmUsageError, match=r"no dataset at .*/gone \(it has no manifest\.json\); "
    ):
        submit(job(tmp_path / "run"), tmp_path / "gone")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_to_stand_still_is_not_submitted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    message = r"/run/STOP keeps the run standing, and a job would leave at once; remove it and "
    with pytest.raises(SlurmUsageError, match=message):
        submit(job(run), dataset_in(tmp_path))
    assert list(run.iterdir()) == [run / "STOP"]


def test_a_person_is_told_where_to_look_and_a_program_gets_the_number_alone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    cluster.command("sbatch", "echo 71")
    data = dataset_in(cluster.state)
    run_command(["submit", "tiny-cpu", f"data={data}", "--run", str(cluster.run)], standalone=False)
    out, err = capsys.readouterr()
    assert out == "71\n"
    assert err == (
        f"log: {cluster.run}/logs/slurm-71.out; how it is doing: headrace status {cluster.run}\n"
    )


def test_submit_hands_the_script_to_sbatch(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    cluster.command("sbatch", 'echo "$@" >"$STATE/sbatch"; echo "71;cluster"')
    assert submit(job(cluster.run), dataset_in(cluster.state)) == "71"
    script = cluster.run / "logs" / "pretrain.sbatch"
    assert (cluster.state / "sbatch").read_text() == f"--parsable {script}\n"
    assert script.read_text() == render(job(cluster.run))


def test_test_only_prints_what_slurm_says(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    cluster.command("sbatch", 'cat >"$STATE/text"; echo "sbatch: Job 7 to start at noon" >&2')
    argv = ["submit", "tiny-cpu", "data=x", "--run", str(cluster.run), "--test-only"]
    run_command(argv, standalone=False)
    assert capsys.readouterr().out == "sbatch: Job 7 to start at noon\n"
    assert "#SBATCH --job-name=headrace-run\n" in (cluster.state / "text").read_text()
    assert list(cluster.run.iterdir()) == []
    cluster.command("sbatch", 'echo "invalid partition" >&2; exit 1')
    with pytest.raises(SlurmError, match=r"`sbatch --test-only` left with 1: invalid partition"):
        run_command(argv, standalone=False)


def test_a_job_leaves_nothing_on_the_disk_of_a_node(cluster: Cluster) -> None:
    local = cluster.state / "local" / "headrace-123456"
    site = Site(scratch=str(local.parent))
    cluster.command("srun", f'mkdir -p "$TRITON_CACHE_DIR"; [ $TRITON_CACHE_DIR = {local}/triton ]')
    for count in range(3):  # queued again, and given up
        cluster.submitted(site=site, SLURM_RESTART_COUNT=str(count))
        assert local.parent.exists() and not local.exists()


def test_the_logs_of_a_job_do_not_keep_its_run_from_starting(tmp_path: Path) -> None:
    """Slurm opens them, and the code is there, before the first rank does anything."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "code").mkdir()
    open_run(tmp_path, RunConfig(), {})
    assert (tmp_path / "config.json").exists()


def test_the_rendezvous_of_a_step_follows_from_the_job(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", cluster.path)
    environ = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert rendezvous(environ) == {"MASTER_ADDR": "n1", "MASTER_PORT": "23456"}
    assert rendezvous(environ | {"MASTER_ADDR": "head", "MASTER_PORT": "1"}) == {}


def dataset_in(folder: Path) -> Path:
    """What a login node sees of a dataset."""
    (folder / "manifest.json").touch()
    return folder


def test_the_script_starts_one_torchrun_per_node(cluster: Cluster) -> None:
    cluster.ends(0, outcome="complete")
    done = cluster.submitted()
    assert done.returncode == 0, done.stdout + done.stderr
    argv = (cluster.state / "srun").read_text().split("\0")[:-1]
    assert argv[:5] == [
        "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=60", "--cpu-bind=none",
        f"--output={cluster.run}/logs/attempt-123456-0-node-%n.log",
    ]  # fmt: skip
    # What is in between, tests/launcher/test_slurm_wrapper.py runs.
    assert argv[5:7] == ["bash", "-c"]
    assert argv[8:] == [
        "_", "/tmp/headrace-123456", sys.executable, "-m", "torch.distributed.run",
        "--nnodes=2", "--nproc-per-node=8", "--max-restarts=0", "--master-addr=n1",
        "--master-port=23456", "-m", "--", "launcher", "pretrain", "llama-7b",
        "data=/data/books and more", "optim.lr=1e-4", "--run", str(cluster.run),
    ]  # fmt: skip
    environ = (cluster.state / "environment").read_text()
    assert "OMP_NUM_THREADS=8\n" in environ


def test_every_attempt_meets_at_another_port(cluster: Cluster) -> None:
    """One that another program holds would end every attempt; the job's number stays the same."""
    cluster.ends(1)
    ports = []
    for settings in ({}, {"SLURM_RESTART_COUNT": "1"}, {"MASTER_PORT": "30000"}):
        cluster.submitted(**settings)
        argv = (cluster.state / "srun").read_text().split("\0")
        ports += [word for word in argv if word.startswith("--master-port=")]
    assert ports == ["--master-port=23456", "--master-port=23557", "--master-port=30000"]


@pytest.mark.parametrize(
    ("outcome", "code", "left", "requeued"),
    [
        ("complete", 0, 0, False),
        ("stopped", 0, 0, False),  # --stop-at
        ("failed", 1, 0, True),
        ("", 137, 0, True),  # a node died: no row at all
    ],
)
def test_the_job_goes_back_into_the_queue_after_a_failure_alone(
    outcome: str, code: int, left: int, requeued: bool, cluster: Cluster
) -> None:
    cluster.ends(code, outcome=outcome)
    done = cluster.submitted()
    assert (done.returncode, cluster.requeued) == (left, requeued), done.stdout + done.stderr


def test_a_run_that_was_ahead_of_the_signal_goes_on(cluster: Cluster) -> None:
    """It has seen the limit by itself; only --stop-at and RUN/STOP end the job."""
    cluster.ends(0, outcome="stopped", reason="42 s before the end of the Slurm job")
    done = cluster.submitted()
    assert (done.returncode, cluster.requeued) == (0, True), done.stdout + done.stderr
    assert not (cluster.run / "logs" / "failures-123456").exists()


def test_an_older_outcome_does_not_hide_a_failure(cluster: Cluster) -> None:
    (cluster.run / "attempts.jsonl").write_text('{"outcome": "complete"}\n')
    cluster.ends(1)
    done = cluster.submitted(SLURM_RESTART_COUNT="4")
    assert cluster.requeued
    assert (
        "attempt 4: failure 1 of 3 without a new checkpoint; what its ranks said: "
        f"{cluster.run}/logs/attempt-123456-4-node-*.log\n"
    ) in done.stdout


def test_a_stop_file_keeps_the_job_from_starting(cluster: Cluster) -> None:
    (cluster.run / "STOP").touch()
    done = cluster.submitted()
    assert done.returncode == 0
    assert "STOP exists: not starting" in done.stdout


def test_no_host_name_is_an_error_and_never_localhost(cluster: Cluster) -> None:
    cluster.command("scontrol", "exit 1")
    done = cluster.submitted()
    assert done.returncode == 1
    assert "no host name for n[1-2]" in done.stdout


def test_a_percent_sign_in_the_name_of_a_run_is_one(cluster: Cluster) -> None:
    """srun fills in patterns, and starts no task whose log has no folder."""
    run = cluster.run.parent / "run%n"
    cluster.ends(1)
    cluster.started(TEMPLATE, run, "tiny-cpu", PREFLIGHT="0")
    argv = (cluster.state / "srun").read_text().split("\0")
    assert f"--output={cluster.run.parent}/run%%n/logs/attempt-123456-0-node-%n.log" in argv


def test_usr1_reaches_the_step_and_the_job_is_queued_again(cluster: Cluster) -> None:
    """Slurm signals the batch shell; the stand-in for srun saves when the signal arrives."""
    row = '{"attempt": 1, "outcome": "stopped", "step": 3}'
    (cluster.state / "row").write_text(row + "\n")
    cluster.command(
        "srun",
        f"trap 'cat $STATE/row >>{cluster.run}/attempts.jsonl; exit 0' USR1\n"
        'kill -USR1 "$PPID"\nfor _ in {1..200}; do /bin/sleep 0.05; done; exit 1',
    )
    done = cluster.submitted()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "outcome 'stopped', stop 'USR1'" in done.stdout
    assert cluster.requeued


def test_the_template_can_be_submitted_by_hand() -> None:
    done = subprocess.run(["bash", str(TEMPLATE)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: sbatch slurm/pretrain.sbatch RUN RECIPE [key=value ...]" in done.stderr
