"""`headrace checkpoint`: what it prints, its exit codes, what it refuses, and that it is quick."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from data.store import FolderStore
from launcher.cli import run_command
from tests.test_architecture import run_clean
from tests.train.checkpoints import values, write
from train.attempts import begin_attempt, end_attempt
from train.checkpoint import committed, step_folder
from train.config import RunConfig
from train.mirror import Mirror
from train.ownership import RunInUse, own
from train.settings import CheckpointConfig, ZeroConfig
from train.slices import CheckpointError

SLOWER = 2.0
"""Machines on which the tests run may be that much slower than the one that was measured."""


def flip(path: Path, position: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def make_run(run: Path, *steps: int, lr: float = 1e-3, mirror: str = "") -> Path:
    """A run of one ended attempt with checkpoints of two ranks, and leftovers of step 90."""
    config = RunConfig(
        steps=100,
        zero=ZeroConfig(stage=2),
        checkpoint=CheckpointConfig(keep_every_steps=40, mirror=mirror),
        precision="fp32",
    )
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": lr})})
    run.mkdir()
    (run / "config.json").write_text("{}")
    begin_attempt(run, 1, world_size=2, resumed_from=None, config=config, machine={})
    end_attempt(run, 1, outcome="stopped", step=max(steps))
    for step in steps:
        state = {"step": step, "attempt": 1, "tokens": 1000 * step, "data": {"seed": 0}}
        write(run, step, state=state)
    (run / "checkpoints" / "step-000000090").mkdir()
    return run


def away(store: FolderStore) -> list[str]:
    raise PermissionError("Permission denied")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def headrace(*argv: object) -> Done:
    """The command in this process, its errors told as `main` tells them."""
    out, err = io.StringIO(), ""
    with contextlib.redirect_stdout(out):
        try:
            code = run_command([str(word) for word in argv], standalone=False)
        except typer.BadParameter as error:
            code, err = error.exit_code, error.message
        except (CheckpointError, RunInUse) as error:
            code, err = error.exit_code, str(error)
    return Done(code, out.getvalue(), err)


def as_json(*argv: object, code: int = 0) -> Any:
    done = headrace("checkpoint", *argv, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_ls_shows_the_mirror_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    run = make_run(tmp_path / "run", 10, 20, mirror=str(tmp_path / "far"))
    mirror = Mirror(str(tmp_path / "far"), run)
    for step in (10, 20):
        mirror.copy_out(step)
    (tmp_path / "far/run/step-000000010/rank-00000.safetensors").unlink()
    found = as_json("ls", run)["checkpoints"]
    assert [(row["step"], row["mirror"]) for row in found] == [
        *((step, None) for step in (90, 20, 10)),
        *((step, str(tmp_path / "far/run")) for step in (20, 10)),
    ]
    assert {**found[3], "mirror": None} == found[1]
    assert found[4]["problem"].endswith("far/run/step-000000010/rank-00000.safetensors is missing")
    text = headrace("checkpoint", "ls", run).stdout
    heading, *lines = text.splitlines()
    assert heading.split()[-2:] == ["sizes", "where"]
    assert [line.split()[0] for line in lines[:5]] == ["90", "20", "10", "20", "10"]
    assert f"mirror: {tmp_path / 'far/run'}" in text
    for command in ("ls", "verify"):
        done = headrace("checkpoint", command, tmp_path / "far/run")
        assert done.returncode == 1 and "is a mirror's copy of a run: name the run" in done.stderr


def test_ls_shows_the_run_when_its_mirror_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", 10, 20, mirror=str(tmp_path / "far"))
    monkeypatch.setattr(FolderStore, "names", away)
    problem = (
        f"the mirror {tmp_path / 'far/run'} cannot be read: PermissionError: Permission denied"
    )
    found = as_json("ls", run)
    assert [row["step"] for row in found["checkpoints"]] == [90, 20, 10]
    assert found["mirror_problem"] == problem
    lines = headrace("checkpoint", "ls", run).stdout.splitlines()
    assert lines[0].split()[-1] == "sizes" and len(lines) == 6
    assert lines[-1] == f"nothing is told of the mirror: {problem}"


def test_ls_tells_what_is_there_and_what_is_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30)
    shard = step_folder(run, 20) / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    flip(step_folder(run, 10) / "manifest.json", 5)
    found = as_json("ls", run)["checkpoints"]
    assert [row["step"] for row in found] == [90, 30, 20, 10]
    leftover, good, cut, damaged = found
    assert leftover["problem"] == "not committed: a save was interrupted"
    assert good["bytes"] == sum(p.stat().st_size for p in step_folder(run, 30).iterdir())
    assert (good["files"], good["world_size"], good["zero_stage"]) == (3, 2, 2)
    assert (good["tokens"], good["problem"]) == (30_000, None)
    assert time.time() - 600 < good["time"] <= time.time()
    assert "rank-00001.safetensors has" in cut["problem"] and cut["tokens"] == 20_000
    assert "does not match the sha256 at its end" in damaged["problem"]
    text = headrace("checkpoint", "ls", run).stdout.splitlines()
    assert text[0].split() == [
        "step",
        "committed",
        "bytes",
        "files",
        "ranks",
        "stage",
        "tokens",
        "sizes",
    ]
    assert text[2].split()[-5:] == ["3", "2", "2", "30,000", "fit"]
    assert "step 20: " + cut["problem"] in text


def test_verify_names_file_and_chunk_and_what_a_resume_takes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30)
    done = headrace("checkpoint", "verify", run)
    assert done.returncode == 0
    assert "of 3 checkpoints read; intact: 30, 20, 10\na resume takes step 30\n" in done.stdout
    flip(step_folder(run, 30) / "rank-00001.safetensors")
    (step_folder(run, 20) / "rank-00000.safetensors").unlink()
    found = as_json("verify", run, code=1)
    assert [(d["step"], d["file"], d["chunk"]) for d in found["damages"]] == [
        (30, "rank-00001.safetensors", 0),
        (20, "rank-00000.safetensors", None),
    ]
    assert found["resume_takes"] == 10
    assert [passed["step"] for passed in found["passed_over"]] == [30, 20]
    done = headrace("checkpoint", "verify", run)
    assert f"{step_folder(run, 30)}/rank-00001.safetensors: chunk 0 (bytes 0 to" in done.stdout
    assert "a resume passes over step 20: " in done.stdout
    assert done.stdout.endswith("a resume takes step 10\n")


def test_verify_asks_the_mirror_as_a_resume_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, far = (
        make_run(tmp_path / "run", 10, 20, 30, mirror=str(tmp_path / "far")),
        tmp_path / "far",
    )
    for step in (10, 20, 30):
        Mirror(str(far), run).copy_out(step)
    (step_folder(run, 20) / "rank-00000.safetensors").unlink()
    shutil.rmtree(step_folder(run, 30))
    found = as_json("verify", run, code=1)
    assert (found["resume_takes"], found["mirror"], found["steps"]) == (30, f"{far}/run", [20, 10])
    copy = "rank-00001.safetensors: chunk 0 (from byte 0) is not what was written"
    flip(far / "run/step-000000030/rank-00001.safetensors")
    lines = headrace("checkpoint", "verify", run).stdout.splitlines()
    assert lines[-2:] == [
        f"a resume passes over step 30: {step_folder(run, 30)} is lost; the mirror is no help: "
        f"{far}/run/step-000000030/{copy}",
        f"a resume takes step 20 from the mirror {far}/run",
    ]
    flip(far / "run/step-000000020/rank-00001.safetensors")
    lines = headrace("checkpoint", "verify", run).stdout.splitlines()
    assert lines[-1] == "a resume takes step 10"
    assert lines[-2].startswith("a resume passes over step 20: ") and lines[-2].endswith(
        f"rank-00000.safetensors is missing; the mirror is no help: {far}/run/step-000000020/{copy}"
    )
    monkeypatch.setattr(FolderStore, "names", away)
    found = as_json("verify", run, code=1)
    assert (found["resume_takes"], found["mirror"]) == (10, None)
    assert (
        f"the mirror was not asked, which a resume does: {found['mirror_problem']}\na resume takes "
        "step 10\n" in headrace("checkpoint", "verify", run).stdout
    )


def test_verifying_one_step_reads_it_and_what_a_resume_would_try(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30)
    flip(step_folder(run, 10) / "rank-00001.safetensors")
    assert as_json("verify", run, "--step", 20)["steps"] == [30, 20]
    found = as_json("verify", run, "--step", 10, code=1)
    assert (found["steps"], found["resume_takes"], found["ok"]) == ([30, 10], 30, False)
    done = headrace("checkpoint", "verify", run, "--step", 11)
    assert done.returncode == 1
    assert "no committed checkpoint of step 11; committed steps: 10, 20, 30" in done.stderr


def test_diff_tells_manifest_state_config_and_every_parameter(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    found = as_json("diff", run, "--step", 10, "--step", 20)
    first, second = values(10), values(20)
    assert {row["name"]: row["max_abs"] for row in found["parameters"]} == {
        name: float(np.abs(first[f"param/{name}"].astype("f8") - second[f"param/{name}"]).max())
        for name in ("a", "b")
    }
    assert {row["key"] for row in found["manifest"]} == {"step", "scalars.step"}
    assert {row["key"]: row["second"] for row in found["state"]} == {"step": 20, "tokens": 20_000}
    assert found["config"] == []
    other = make_run(tmp_path / "other", 20, lr=2e-3)
    found = as_json("diff", run, other)
    assert found["parameters"] == [] and found["num_parameters"] == 2
    assert found["config"] == [{"key": "optim.lr", "first": 1e-3, "second": 2e-3}]
    text = headrace("checkpoint", "diff", run, other).stdout
    assert "parameters: 0 of 2 differ" in text and "state: the same" in text
    done = headrace("checkpoint", "diff", run)
    assert done.returncode == 2 and "write --step A --step B, or name two runs" in done.stderr


def test_prune_keeps_the_newest_intact_one_and_what_the_run_keeps_for_good(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30, 40, 50, 60, 70)
    flip(step_folder(run, 70) / "rank-00001.safetensors")
    flip(step_folder(run, 60) / "manifest.json", 3)
    would = as_json("prune", run, "--keep", 1, "--dry-run")
    assert (would["kept"], would["intact"]) == ([70, 50, 40], 50)
    assert committed(run) == [70, 60, 50, 40, 30, 20, 10]
    size = sum(f.stat().st_size for s in (10, 20, 30, 60) for f in step_folder(run, s).iterdir())
    assert would["bytes"] == size
    done = headrace("checkpoint", "prune", run, "--keep", 1)
    assert done.returncode == 0
    assert f"{run}: 5 folders with {size:,} bytes went; steps that stay: 70, 50, 40" in done.stdout
    assert committed(run) == [70, 50, 40] and not (run / "checkpoints/step-000000090").exists()
    for step in (50, 40):
        flip(step_folder(run, step) / "rank-00000.safetensors")
    done = headrace("checkpoint", "prune", run, "--keep", 1)
    assert done.returncode == 1 and "none is intact" not in done.stdout
    assert f"no checkpoint of {run} is intact, so none is removed" in done.stderr
    assert committed(run) == [70, 50, 40]


def test_prune_is_refused_while_an_attempt_lives(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    owner = own(run)
    try:
        done = headrace("checkpoint", "prune", run, "--keep", 1)
    finally:
        owner.release()
    assert done.returncode == 2
    assert f"is being trained by attempt {owner.number} (process {os.getpid()} on" in done.stderr
    assert committed(run) == [20, 10]
    end_attempt(run, owner.number, outcome="stopped", step=20)
    assert headrace("checkpoint", "prune", run, "--keep", 1).returncode == 0
    assert committed(run) == [20]


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_a_folder_that_is_no_run_is_refused(command: str, tmp_path: Path) -> None:
    keep = ("--keep", 1) if command == "prune" else ()
    done = headrace("checkpoint", command, tmp_path, *keep)
    assert done.returncode == 1
    assert "is no run directory: it has neither config.json nor checkpoints" in done.stderr


@pytest.mark.parametrize(
    "argv", ["ls", "verify", "diff --step 10 --step 20", "prune --keep 1 --dry-run"]
)
def test_commands_answer_without_torch(tmp_path: Path, argv: str) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    command, *options = argv.split()
    run_clean(f"""
        sys.argv = ["headrace", "checkpoint", {command!r}, {str(run)!r}, *{options!r}]
        from launcher.cli import main
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        check("headrace checkpoint")
    """)


def test_ls_takes_half_a_second_of_one_core(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", *range(10, 80, 10))
    program = (
        "import os, sys; from launcher.cli import run_command; "
        f"run_command(['checkpoint', 'ls', {str(run)!r}], standalone=False); "
        "used = os.times(); print(used.user + used.system, file=sys.stderr)"
    )
    # The least of three: other work on the machine slows any single one.
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", program],
                cwd=Path(__file__).parent.parent.parent,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            ).stderr
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.5 * SLOWER


def test_a_copy_of_the_checkpoints_alone_can_be_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    (row,) = [row for row in as_json("ls", copy)["checkpoints"] if row["step"] == 10]
    assert (row["zero_stage"], row["world_size"], row["problem"]) == (None, 2, None)
