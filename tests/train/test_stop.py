"""Stops that nobody sends a signal for: files in the run, and the end of the job; and evaluations
that give way.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import train.step
from tests.ranks import run_ranks
from tests.train.test_pretrain import config, losses, train_run
from train.attempts import attempts
from train.checkpoint import committed
from train.config import RunConfig
from train.deadline import Deadline
from train.metrics import read_metrics
from train.stop import StopRequest, how_to_go_on
from train.world import World


def test_files_and_the_end_of_the_job_ask_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("train.deadline.ask_slurm", lambda job: "")
    stop = StopRequest()
    stop.watch(tmp_path, Deadline("77", seconds_left=60))
    (tmp_path / "SAVE").touch()
    stop.look(30)
    assert (stop.save, stop.reason) == (True, None)
    stop.saved()
    assert not (tmp_path / "SAVE").exists() and not stop.save
    (tmp_path / "STOP").touch()
    stop.look(30)
    assert stop.reason is None, "the same second"
    now[0] += 31
    stop.look(30)
    assert stop.reason == f"the file {tmp_path / 'STOP'}"
    late = StopRequest()
    late.watch(tmp_path / "none", Deadline("77", seconds_left=60))
    now[0] += 31
    late.look(30)
    assert late.reason == "29 s before the end of the Slurm job"


def at_step(world: World, made: RunConfig, run: Path, acts: dict[int, str]) -> str:
    """Train; after a step rank 0 makes a file."""
    original = train.step._agreed

    def agreed(job: Any, step: int, *rest: Any) -> Any:
        act = acts.get(step, "")
        job.stop._looked = -1e9
        if act and world.is_main:
            (run / act).touch()
        return original(job, step, *rest)

    train.step._agreed = agreed
    return train_run(world, made, run)


def test_a_stop_file_ends_the_run_and_keeps_it_ended_until_it_is_gone(
    dataset: Path, tmp_path: Path
) -> None:
    run, made = tmp_path / "run", config(dataset, "eval.samples=1")
    assert run_ranks(2, at_step, made, run, {2: "SAVE", 4: "STOP"}) == ["stopped"] * 2
    assert committed(run) == [4, 3, 2]
    assert not (run / "SAVE").exists()
    assert attempts(run)[-1]["reason"] == f"the file {run / 'STOP'}"
    reason = attempts(run)[-1]["reason"]
    assert how_to_go_on(run, reason) == (
        f"remove {run / 'STOP'}, and the same command goes on from there"
    )
    assert run_ranks(2, train_run, made, run) == ["stopped"] * 2
    assert [row[0] for row in losses(run)] == [1, 2, 3, 4]
    (run / "STOP").unlink()
    assert how_to_go_on(run, reason) == "the same command goes on from there"
    assert run_ranks(2, train_run, made, run) == ["complete"] * 2
    assert [row[0] for row in losses(run)] == list(range(1, 9))


def ask_while_validating(
    world: World, made: RunConfig, run: Path, step: int, act: str = "TERM"
) -> str:
    """Train; between two batches of the validation of a step the last rank gets SIGTERM, or rank 0
    makes a file.
    """
    original = train.step.faults.point
    seen = []

    def point(phase: str, at: int = 0) -> None:
        if (phase, at) == ("evaluate", step):
            seen.append(1)
            if len(seen) == 2 and act == "TERM" and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(seen) == 2 and act == "STOP" and world.is_main:
                (run / act).touch()
                time.sleep(1.1)  # files are looked for once a second
        original(phase, at)

    train.step.faults.point = point
    return train_run(world, made, run)


@pytest.mark.parametrize("step", [4, 8])
def test_a_validation_gives_way_to_a_stop_and_is_made_up_for(
    dataset: Path, tmp_path: Path, step: int
) -> None:
    made = config(dataset, "eval.samples=8", "eval.every=2", "micro_batch=1", "checkpoint.every=2")
    plain, run = tmp_path / "plain", tmp_path / "run"
    run_ranks(2, train_run, made, plain)
    assert run_ranks(2, ask_while_validating, made, run, step) == ["stopped"] * 2
    assert attempts(run)[-1]["reason"] == "SIGTERM", "of the last rank"

    def validated(folder: Path) -> dict[int, float]:
        return {r["step"]: r["val_loss"] for r in read_metrics(folder) if "val_loss" in r}

    assert set(validated(run)) == set(range(0, step, 2))
    assert run_ranks(2, train_run, made, run) == ["complete"] * 2
    assert validated(run) == validated(plain)
    assert losses(run) == losses(plain)
    num_rows = len((run / "metrics.jsonl").read_text().splitlines())
    assert run_ranks(2, train_run, made, run) == ["complete"] * 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == num_rows, "nothing was left"


def test_a_validation_gives_way_to_a_stop_file(dataset: Path, tmp_path: Path) -> None:
    made = config(dataset, "eval.samples=8", "eval.every=2", "micro_batch=1", "checkpoint.every=2")
    assert run_ranks(2, ask_while_validating, made, tmp_path, 4, "STOP") == ["stopped"] * 2
    validated = [row["step"] for row in read_metrics(tmp_path) if "val_loss" in row]
    assert validated == [0, 2], "that of step 4 gave way"
