"""Rendered batch scripts, held against files that people can read, and all of them by shellcheck.

HEADRACE_WRITE_GOLDEN=1 writes the files anew; what changed is then for a person to look at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.jobs import Job, render
from launcher.lead import Lead
from launcher.site import Site, load_site
from launcher.snapshot import Snapshot
from launcher.template import FOLDER
from tests.launcher.test_site import FULL

GOLDEN = Path(__file__).parent / "golden"
APPTAINER = {"runtime": "apptainer", "image": "/images/headrace.sif", "mounts": ("/data:/data",)}


def job(**changes: object) -> Job:
    values = {
        "recipe": "llama-7b", "overrides": ("data=/data/books and more", "optim.lr=1e-4"),
        "run": Path("/shared/runs/7b"), "num_nodes": 4, "gpus_per_node": 8, "time": "1-12:00:00",
        "code": Snapshot(Path("/shared/runs/7b/code/0123456789abcdef"), {}),
        "folder": Path("/shared/project"), "python": "/shared/venv/bin/python",
    }  # fmt: skip
    return Job(**(values | changes))  # type: ignore[arg-type]


def scripts(folder: Path) -> dict[str, str]:
    """Every script whose text is held."""
    (folder / "site.toml").write_text(FULL)
    pyxis = load_site(folder / "site.toml")
    apptainer = Site.model_validate({"container": APPTAINER})
    return {
        "pretrain": render(job()),
        "pretrain-pyxis": render(job(site=pyxis, options=("--nodelist=n[1-4]",), copies_code=True)),
        "pretrain-apptainer": render(job(site=apptainer)),
        "finetune": render(job(kind="finetune", num_nodes=1, recipe="classify")),
        "pretrain-cpu": render(
            job(gpus_per_node=0, num_nodes=2, min_nodes=1, time="60", lead=Lead(60))
        ),
    }


def test_every_script_is_as_it_was(tmp_path: Path) -> None:
    made = scripts(tmp_path)
    if os.environ.get("HEADRACE_WRITE_GOLDEN"):
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
        for name, text in made.items():
            (GOLDEN / f"{name}.sbatch").write_text(text)
    held = {path.stem: path.read_text() for path in GOLDEN.glob("*.sbatch")}
    assert held.keys() == made.keys()
    for name, text in made.items():
        assert text == held[name], f"{name}: HEADRACE_WRITE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize(
    "path", [*sorted(FOLDER.glob("*.sbatch")), *sorted(GOLDEN.glob("*.sbatch"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)  # fmt: skip
def test_shellcheck_finds_nothing(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        told = "no shellcheck: apt-get install shellcheck"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
