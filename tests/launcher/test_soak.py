"""A run that meets one random fault after the other, and ends with the bits of a run that met none.

    make soak FAULTS=200     30 without it. HEADRACE_RESULTS (or build/results) keeps the rows:
                             started again, it goes on with the fault that it was at; one that has
                             failed is told again, and not drawn anew
    MEAN_SECONDS=30          between a start and its fault, where a start takes long; 15 without it

Three faults by default. Every start is the real command: launcher, torchrun, DeepSpeed over gloo.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from data.durable import read_rows
from tests.data.tiny import documents, write_dataset
from tests.launcher import soak
from tests.launcher.random_faults import EVERY, RANKS, Strike, draw, measured, predicted, typical
from tests.launcher.soak import RECIPE, command
from tests.launcher.soak_checks import GOODPUT_MARGIN, check_row, is_death
from tests.ranks import run_ranks
from tests.results import Results, code
from tests.train.test_pretrain import train_run
from train.checkpoint import committed, open_checkpoint
from train.config import RunConfig
from train.decode import load_config
from train.metrics import read_metrics

FAULTS = int(os.environ.get("FAULTS") or 30)
ENOUGH = 20
"""Faults whose mean says something."""
THREE = (
    Strike("write:100:1:kill", 8.0),
    Strike("launcher:SIGKILL", 2.0),
    Strike("torchrun:SIGKILL", 2.0),
)
SAME = ("step", "samples", "data_hash", "loss", "grad_norm", "lr", "tokens")


def check_run(run: Path, reference: Path, last_step: int) -> None:
    """Every row, and the weights and moments at the end, are those of the run that met nothing;
    every sample was consumed once, in order; whatever was computed twice gave the same bits.
    """
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    first: dict[int, list[Any]] = {}
    for row in rows:
        found = [row[key] for key in SAME]
        assert first.setdefault(row["step"], found) == found, "computed again, to other bits"
    counted = [row for row in read_metrics(run) if "loss" in row]
    assert [row["step"] for row in counted] == list(range(1, last_step + 1))
    spans = [row["samples"] for row in counted]
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(spans))
    assert spans[-1][1] == last_step * 8, "8 samples a step"
    wanted = [row for row in read_metrics(reference) if "loss" in row]
    assert [[row[k] for k in SAME] for row in counted] == [[row[k] for k in SAME] for row in wanted]
    ours, theirs = open_checkpoint(run), open_checkpoint(reference)
    assert ours.step == theirs.step == last_step and ours.scalars == theirs.scalars
    assert ours.state["data"] == theirs.state["data"]
    assert set(theirs.keys) == {"param", "exp_avg", "exp_avg_sq"}
    for name in theirs.parameters:
        for key in theirs.keys:
            assert ours.read(name, key).tobytes() == theirs.read(name, key).tobytes(), name


def finish(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Let the run go on to a step that no fault has reached, and compare it with another one that
    goes there at once.
    """
    last_step = (max(row["reached"] for row in rows) // EVERY + 1) * EVERY
    argv = command(
        folder / "recipe.toml", folder / "dataset", folder / "run", "--stop-at", str(last_step)
    )
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        argv,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=soak.end_with_us,
    )
    assert ended.returncode == 3, ended.stderr
    reference = folder / f"reference-{last_step}"
    if last_step not in committed(reference):
        # One that was cut short has been interrupted.
        shutil.rmtree(reference, ignore_errors=True)
        made = load_config(RunConfig, RECIPE, [f"data={folder / 'dataset'}"])
        outcome = run_ranks(RANKS, train_run, made, reference, last_step, timeout=3600)
        assert outcome == ["stopped"] * RANKS
    assert {row["attempt"] for row in read_metrics(reference)} == {1}
    check_run(folder / "run", reference, last_step)


def prepare(folder: Path) -> None:
    texts = {"train/main": documents(400, seed=1), "val/main": documents(9, seed=2)}
    if not (folder / "dataset/manifest.json").exists():
        write_dataset(folder / "dataset", texts)


def test_three_faults_leave_no_trace(tmp_path: Path) -> None:
    prepare(tmp_path)
    rows: list[dict[str, Any]] = []
    soak.play(tmp_path, rows, 3, lambda index, _: THREE[index], check=check_row, keep=rows.append)
    assert [row["done"] for row in rows] == [50, 50, 50] and rows[0]["reached"] >= 100
    finish(tmp_path, rows)


@pytest.mark.slow
def test_any_number_of_faults_leaves_no_trace_and_costs_what_the_formula_says() -> None:
    results = Results(f"soak-{code()}/faults")
    folder, rows = results.path.parent, results.rows()
    results.fail_again(rows)
    prepare(folder)

    def strike(index: int, done: int) -> Strike:
        return draw(0, index, typical(rows), done=done)

    def keep(row: dict[str, Any]) -> None:
        print(row, flush=True)
        results.append(row)
        rows.append(row)

    soak.play(folder, rows, FAULTS, strike, check=check_row, keep=keep)
    finish(folder, rows)
    found, (expected, parts) = measured(rows), predicted(rows)
    deaths = [row["gone"] - row["struck"] for row in rows if is_death(row["fault"])]
    print(f"{len(rows)} faults, {sum(row['steps'] > 0 for row in rows)} of them after a step")
    print(f"goodput {found:.3f} measured, {expected:.3f} by the formula from {parts}")
    print(f"a death ends all ranks after {fmean(deaths):.2f} s, {max(deaths):.2f} s at most")
    if len(rows) >= ENOUGH:
        assert abs(found - expected) <= GOODPUT_MARGIN
