"""The code of a job is what was submitted: what is taken along, and that it is what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.snapshot import Snapshot, take
from launcher.template import FOLDER
from tests.launcher.slurm_stand_ins import Cluster
from train.code import ROOT

WHERE = "import launcher, sys; print(launcher.__file__); print(sys.dont_write_bytecode)"


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "complete"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_every_source_and_the_recipe_are_taken_along(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("steps = 3\n")
    made = take(tmp_path / "code", recipe)
    assert not (tmp_path / "code").exists()
    made.write()
    found = files_of(made.folder)
    assert found.pop("recipe/mine.toml") == b"steps = 3\n"
    assert made.recipe_path == made.folder / "recipe" / "mine.toml"
    assert found == {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for package in ("launcher", "train", "model", "data")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_name_follows_the_content_and_a_folder_is_written_once(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("steps = 3\n")
    first = take(tmp_path, recipe)
    first.write()
    assert take(tmp_path, recipe).folder == first.folder
    (first.folder / "mark").touch()
    first.write()
    assert (first.folder / "mark").exists()
    recipe.write_text("steps = 4\n")
    assert take(tmp_path, recipe).folder != first.folder
    assert take(tmp_path).folder not in (first.folder, take(tmp_path, recipe).folder)
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_copy_that_has_lost_or_changed_files_is_made_whole_again(tmp_path: Path) -> None:
    """A scratch disk removes what nobody has read for weeks."""
    code = Snapshot(tmp_path / "code", {"launcher/a.py": b"a", "train/b.py": b"b"})
    code.write()
    (code.folder / "launcher" / "a.py").write_bytes(b"edited")
    (code.folder / "train" / "b.py").unlink()
    (code.folder / "train").rmdir()
    code.write()
    assert files_of(code.folder) == code.files


def test_a_copy_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    code = Snapshot(tmp_path / "code", {"launcher/a.py": b"a", "launcher/a.py/b.py": b"b"})
    with pytest.raises(OSError):
        code.write()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def cluster(cluster: Cluster) -> Cluster:
    """Stand-ins; srun tells which code Python would run."""
    cluster.command("srun", f"{sys.executable} -c '{WHERE}'; exit 1")
    return cluster


@pytest.mark.parametrize("name", ["pretrain", "finetune", "export", "evaluate"])
def test_a_job_runs_from_its_copy_wherever_it_starts(name: str, cluster: Cluster) -> None:
    """In the clone, which `python -m` would look into first."""
    code = cluster.state / "code"
    Snapshot(code, {"launcher/__init__.py": b""}).write()
    cluster.command("sbcast", "exit 1")
    settings = {"CODE": str(code), "FORCE": "1", "PYTHONPATH": str(ROOT)}
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        done = cluster.started(FOLDER / f"{name}.sbatch", cluster.run, "x", **settings)
    finally:
        os.chdir(before)
    written = cluster.run / "evaluation.json.tmp"
    shown = written.read_text() if name == "evaluate" else done.stdout
    assert f"{code}/launcher/__init__.py\nTrue\n" in shown, done.stderr
    assert list(code.rglob("__pycache__")) == []


def test_the_code_may_go_to_every_node_first(cluster: Cluster) -> None:
    """sbcast's stand-in copies; where it cannot, the shared copy is run."""
    code, local = cluster.state / "code", cluster.state / "local"
    Snapshot(code, {"launcher/__init__.py": b""}).write()
    ask = f"{sys.executable} -c '{WHERE}'; exit 1"
    run = 'while [[ $1 == --* ]]; do shift; done; "$@"'
    cluster.command("srun", f'case "$*" in *"-- launcher"*) {ask} ;; esac; {run}')
    settings = {"CODE": str(code), "COPY_CODE": "yes", "NODE_LOCAL": str(local)}
    script = FOLDER / "pretrain.sbatch"
    cluster.command("sbcast", 'shift; cp "$@"')
    done = cluster.started(script, cluster.run, "tiny-cpu", **settings)
    assert f"{local}/headrace-123456/code/launcher/__init__.py\n" in done.stdout, done.stderr
    assert list(local.iterdir()) == []
    cluster.command("sbcast", "exit 1")
    done = cluster.started(script, cluster.run, "tiny-cpu", **settings)
    assert f"{code} could not be copied to every node; running from there" in done.stdout
    assert f"{code}/launcher/__init__.py\n" in done.stdout


def test_a_module_that_was_taken_along_can_be_run(tmp_path: Path) -> None:
    made = take(tmp_path)
    made.write()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "recipes"],
        env={"PYTHONPATH": str(made.folder), "PYTHONSAFEPATH": "1", "PATH": os.environ["PATH"]},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny-cpu" in done.stdout
