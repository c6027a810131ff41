"""What a job runs is what was submitted, on a real Slurm: the clone and the recipe are edited while
the job waits.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster
from tests.train.test_pretrain import RECIPE
from train.attempts import attempts
from train.metrics import read_metrics

LAYOUT = ("--nodes", "2", "--gpus-per-node", "0", "--time", "30", "steps=8", "eval.samples=2")
pytestmark = pytest.mark.slurm


def said(run: Path, job: str) -> str:
    logs = [run / "logs" / f"slurm-{job}.out", *sorted((run / "logs").glob("attempt-*"))]
    return "\n".join(log.read_text() for log in logs if log.exists())


def test_a_clone_and_a_recipe_that_are_edited_while_a_job_waits_do_not_change_it(
    slurm: Cluster, dataset: Path
) -> None:
    clone, run = slurm.folder / "clone", slurm.folder / "run"
    for name in ("launcher", "train", "model", "data", "slurm"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = slurm.folder / "mine.toml"
    recipe.write_text(RECIPE)
    mine = {"PYTHONPATH": str(clone)}
    job = slurm.run(
        "headrace", "submit", recipe, f"data={dataset}", "--run", run, *LAYOUT, "--sbatch=--hold",
        **mine,
    )  # fmt: skip
    for package in ("launcher", "train"):
        (clone / package / "__init__.py").write_text("raise SystemExit('the clone was edited')\n")
    recipe.write_text("no = 'recipe'\n")
    slurm.run("scontrol", "release", job)
    assert slurm.wait(job) == "COMPLETED", said(run, job)
    assert attempts(run)[-1]["outcome"] == "complete"
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 9))
    assert list((run / "code").rglob("__pycache__")) == [], "no bytecode on a shared disk"


def test_the_code_is_copied_to_every_node_and_removed_from_it(
    slurm: Cluster, dataset: Path
) -> None:
    """/dev/shm is a disk of each virtual node's own."""
    run = slurm.folder / "staged"
    (slurm.folder / "site.toml").write_text('scratch = "/dev/shm"\npartition = "batch"\n')
    asked = ("headrace", "submit", "small.toml", f"data={dataset}", "--run", run, *LAYOUT)
    site = ("--site", "site.toml", "--stage")
    assert "to start at" in slurm.run(*asked, *site, "--test-only")
    job = slurm.run(*asked, *site)
    assert slurm.wait(job) == "COMPLETED", said(run, job)
    assert slurm.job(job)["Partition"] == "batch"
    assert "could not be copied" not in said(run, job)
    # What the nodes' disks hold now, seen from each of them.
    left = slurm.run("srun", "-N2", "--ntasks-per-node=1", "ls", "/dev/shm")
    assert "headrace-" not in left
    # And it is from there that the ranks have run.
    fault = slurm.folder / "fault"
    more = ("headrace", "submit", "small.toml", f"data={dataset}", "--run", fault, *LAYOUT, *site)
    job = slurm.run(*more, HEADRACE_FAULT="forward:2:1:raise", MAX_FAILURES="1")
    assert slurm.wait(job) == "FAILED"
    assert f'File "/dev/shm/headrace-{job}/code/train/' in said(fault, job)


def test_a_job_that_is_cancelled_leaves_nothing_on_the_disk_of_any_node(
    slurm: Cluster, dataset: Path
) -> None:
    run = slurm.folder / "cancelled"
    (slurm.folder / "site.toml").write_text('scratch = "/dev/shm"\n')
    asked = ("headrace", "submit", "small.toml", f"data={dataset}", "--run", run, *LAYOUT)
    job = slurm.run(*asked, "steps=100000", "--site", "site.toml", "--stage")
    slurm.until(
        lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run)) > 5, "its first steps"
    )
    held = ("srun", "--overlap", f"--jobid={job}", "-N2", "--ntasks-per-node=1", "ls", "-d")
    assert slurm.run(*held, f"/dev/shm/headrace-{job}/code").count("code") == 2
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    slurm.until(lambda: slurm.commands() == [], "end of all processes", seconds=30)
    nodes = slurm.job(job)["NodeList"]
    left = slurm.run("srun", "-w", nodes, "-N2", "--ntasks-per-node=1", "ls", "/dev/shm")
    assert f"headrace-{job}" not in left, said(run, job)
