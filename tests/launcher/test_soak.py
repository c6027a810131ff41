"""A run that meets one random fault after the other, and ends with the bits of a run that met none.

    make soak FAULTS=200     HEADRACE_RESULTS (or build/results) keeps the rows; started again, it
                             goes on with the fault that it was at
    MEAN_SECONDS=30          between a start and its fault, where a start takes long; 15 without it

Three faults by default. Every start is the real command: launcher, torchrun, DeepSpeed over gloo.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from data.durable import read_rows
from tests.data.tiny import documents, write_dataset
from tests.launcher import soak
from tests.launcher.random_faults import (
    DEATHS,
    EVERY,
    MEAN_SECONDS,
    OUTSIDE,
    PLANNED,
    RANKS,
    STANDING,
    Strike,
    Typical,
    draw,
    measured,
    predicted,
    typical,
)
from tests.launcher.soak import RECIPE, STALL_SECONDS, command
from tests.ranks import run_ranks
from tests.results import Results, code
from tests.train.test_pretrain import train_run
from train import faults
from train.checkpoint import committed, open_checkpoint
from train.config import RunConfig
from train.decode import load_config
from train.faults import AT_START, IN_A_SAVE, IN_A_STEP
from train.metrics import read_metrics

FAULTS = int(os.environ.get("FAULTS") or 10)
ENOUGH = 20
"""Faults whose mean says something."""
TYPICAL = Typical(ranks=2.0, attempt=5.0, first=8.0, step=0.02)
THREE = (
    Strike("write:100:1:kill", 8.0),
    Strike("launcher:SIGKILL", 2.0),
    Strike("torchrun:SIGKILL", 2.0),
)
SAME = ("step", "samples", "data_hash", "loss", "grad_norm", "lr", "tokens")


def is_death(fault: str) -> bool:
    """Whether a rank dies or fails of it. Ranks whose launcher is killed are asked to stop by
    torchrun, which the kernel has told: they save first.
    """
    kind = fault.rsplit(":", 1)[1]
    return kind in (*DEATHS, "nan", "SIGKILL") and not fault.startswith("launcher")


def test_a_fault_is_drawn_from_seed_and_index_alone() -> None:
    drawn = [draw(7, index, TYPICAL, done=100) for index in range(400)]
    assert drawn == [draw(7, index, TYPICAL, done=100) for index in range(400)]
    assert drawn != [draw(8, index, TYPICAL, done=100) for index in range(400)]
    inside = [faults.parse(strike.fault) for strike in drawn if not strike.is_outside]
    assert {fault.phase for fault in inside} == {*AT_START, *IN_A_STEP, *IN_A_SAVE}
    assert {fault.kind for fault in inside} == {*DEATHS, *PLANNED, *STANDING, "nan"}
    assert {fault.rank for fault in inside} == set(range(RANKS))
    assert {strike.fault for strike in drawn if strike.is_outside} == set(OUTSIDE)
    for fault in inside:
        assert fault.phase in AT_START or fault.step > 100
        assert fault.phase not in IN_A_SAVE or fault.step % EVERY == 0


@pytest.mark.parametrize("count", [10, 30, 200])
def test_the_seconds_between_faults_are_exponential_over_any_run_of_them(count: int) -> None:
    for first in (0, 17, 1000):
        found = sorted(draw(0, n, TYPICAL, done=0).seconds for n in range(first, first + count))
        # The sample's own quantiles: within two places of where they belong.
        for share in (0.25, 0.5, 0.75):
            below = sum(seconds < -MEAN_SECONDS * math.log1p(-share) for seconds in found)
            assert abs(below - share * count) <= 2
        assert fmean(found) == pytest.approx(MEAN_SECONDS, rel=0.25 if count == 10 else 0.1)


def ideal(count: int, *, restart: float, step: float, save: float, down: float) -> list[Any]:
    """Rows of a machine that takes the same time for everything."""
    rows = []
    for index in range(count):
        struck = draw(1, index, TYPICAL, done=0).seconds
        first = restart if struck >= restart else None
        whole, rest = divmod(max(struck - restart, 0.0), EVERY * step + save)
        steps = int(whole) * EVERY + min(int(rest / step), EVERY)
        rows.append(
            {
                "first": first,
                "struck": struck,
                "ended": struck + down,
                "steps": steps,
                "step": step + save / EVERY,
                "training": steps * step,
                "kept": int(whole) * EVERY * step,
            }
        )
    return rows


@pytest.mark.parametrize(
    ("restart", "step", "save"), [(8, 0.02, 0.1), (14, 0.05, 0.5), (3, 0.01, 0)]
)
def test_the_formula_tells_the_goodput_of_a_machine_without_moods(
    restart: float, step: float, save: float
) -> None:
    rows = ideal(2000, restart=restart, step=step, save=save, down=1.5)
    found, parts = predicted(rows)
    assert found == pytest.approx(measured(rows), abs=0.01)
    assert parts["restart"] == restart and parts["down"] == pytest.approx(1.5)
    # One that forgets the time in which there is no job is caught.
    up = parts["between_failures"] / (parts["between_failures"] + parts["down"])
    assert abs(found / up - measured(rows)) > 0.015


def check_row(row: dict[str, Any]) -> None:
    """What each fault makes of its attempt, and how soon."""
    kind = row["fault"].rsplit(":", 1)[1]
    code, seconds = row["exit_code"], row["gone"] - row["struck"]
    if is_death(row["fault"]):
        assert seconds <= 5, row
    if kind in STANDING:
        # Of a writer that hangs the loop hears at the next save.
        at_most = STALL_SECONDS + 5 + (EVERY * row["step"] if "write" in row["fault"] else 0)
        assert code == 4 and seconds <= at_most, row
    elif row["fault"] == "launcher:SIGTERM":
        # Python itself may still be starting.
        assert code == 3 or (code == -signal.SIGTERM and row["ranks"] is None), row
    elif row["fault"] in OUTSIDE:
        # To the launcher, where the others are not there yet.
        assert code == (-signal.SIGKILL if row["whom"] == "launcher" else 1), row
    elif kind in PLANNED:
        # Before the loop listens, a rank dies of it.
        assert code == 3 or (code == 1 and row["first"] is None), row
    else:
        assert code == 1, row


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
    for row in soak.play(tmp_path, rows, 3, lambda index, done: THREE[index]):
        print(row)
        check_row(row)
    assert [row["done"] for row in rows] == [50, 50, 50] and rows[0]["reached"] >= 100
    finish(tmp_path, rows)


@pytest.mark.slow
def test_any_number_of_faults_leaves_no_trace_and_costs_what_the_formula_says() -> None:
    results = Results(f"soak-{code()}/faults")
    folder, rows = results.path.parent, results.rows()
    prepare(folder)

    def strike(index: int, done: int) -> Strike:
        return draw(0, index, typical(rows), done=done)

    for row in soak.play(folder, rows, FAULTS, strike):
        print(row, flush=True)
        check_row(row)
        results.append(row)
    finish(folder, rows)
    found, (expected, parts) = measured(rows), predicted(rows)
    deaths = [row["gone"] - row["struck"] for row in rows if is_death(row["fault"])]
    print(f"{len(rows)} faults, {sum(row['steps'] > 0 for row in rows)} of them after a step")
    print(f"goodput {found:.3f} measured, {expected:.3f} by the formula from {parts}")
    print(f"a death ends all ranks after {fmean(deaths):.2f} s, {max(deaths):.2f} s at most")
    if len(rows) >= ENOUGH:
        assert abs(found - expected) <= 0.03
