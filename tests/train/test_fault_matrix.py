"""Whatever happens to a rank, wherever it is: it happens, the run ends as declared here, and the
same command brings it to the same numbers. Only a flipped bit stays: the numbers are others then.

Ranks are real, with real DeepSpeed engines. Every phase and every kind happens at least once by
default, all cells in soak. `import`, `rendezvous` and `export`, which happen outside of a run, and
what the launcher makes of ranks that stand still are in tests/launcher/test_faults.py.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from concurrent.futures import wait
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.watch
from tests.ranks import RankFailure, run_ranks
from tests.train.fault_ends import (
    BEFORE,
    RANKS,
    STALL_SECONDS,
    STANDS_STILL,
    STEP,
    STEPS,
    Ended,
    check_end,
)
from tests.train.test_pretrain import config, losses, train_run
from train import faults
from train.checkpoint import Checkpoint, committed, open_checkpoint
from train.config import RunConfig
from train.faults import IN_A_SAVE, IN_A_STEP, KINDS, ONLY_AT, VARIABLE, Fault
from train.metrics import read_metrics
from train.saver import Saver
from train.world import World

SETTINGS = ("eval.every=3", "eval.samples=4", "guard.max_skips=0")
PHASES = ("build", "load", *IN_A_STEP, *IN_A_SAVE, "evaluate")
DEFAULT = {
    "build:0:1:raise",
    "load:0:0:eio",
    "data:6:1:slow",
    "data:6:0:enospc",
    "forward:6:1:nan",
    "backward:6:0:kill",
    "reduce:6:1:term",
    "reduce:6:0:exit",
    "optimizer:6:1:kill",
    "snapshot:6:1:enospc",
    "write:6:0:kill",
    "write:6:1:eio",
    "commit:6:0:kill",
    "prune:6:0:raise",
    "evaluate:6:1:usr1",
}


def cells() -> list[str]:
    """All that can happen."""
    return [
        f"{phase}:{STEP if phase not in ('build', 'load') else 0}:{rank}:{kind}"
        for phase, kind, rank in product(PHASES, KINDS, range(RANKS))
        if not_applicable(phase, kind) is None
    ]


def not_applicable(phase: str, kind: str) -> str | None:
    """Why cells make no sense; None where they do."""
    if phase not in ONLY_AT.get(kind, PHASES):
        return "it changes a number, and none passes by there"
    return None


def train_to_the_fault(world: World, made: RunConfig, run: Path, text: str) -> str:
    if faults.parse(text).kind in STANDS_STILL:
        train.watch.START_SECONDS = STALL_SECONDS
    # Only the rank that it happens to says so.
    said = logging.FileHandler(struck_file(run), delay=True)
    said.setFormatter(logging.Formatter("%(created)f %(message)s"))
    logging.getLogger(faults.__name__).addHandler(said)
    Saver.is_written = property(wait_for_the_one_before)  # type: ignore[assignment]
    faults.arm(text, world.rank)
    return train_run(world, made, run)


def wait_for_the_one_before(saver: Saver) -> bool:
    """As `Saver.is_written`. A machine so busy that three steps pass during a write would lose that
    checkpoint, too.
    """
    pending = saver._pending
    if pending is not None and pending.step < STEP:
        wait([pending.written])
    return pending is not None and pending.written.done()


def struck_file(run: Path) -> Path:
    """When the fault struck, and what."""
    return run.with_name("struck")


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    assert run_ranks(RANKS, train_run, config(dataset, *SETTINGS), run) == ["complete"] * RANKS
    return run


@pytest.fixture(scope="module")
def begun(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has something to load."""
    run = tmp_path_factory.mktemp("begun") / "run"
    ended = run_ranks(RANKS, train_run, config(dataset, *SETTINGS), run, BEFORE)
    assert ended == ["stopped"] * RANKS
    return run


def meet(made: RunConfig, run: Path, text: str) -> Ended:
    """Train until the fault, and beyond where it is survived."""
    try:
        told = dict(enumerate(run_ranks(RANKS, train_to_the_fault, made, run, text)))
    except RankFailure as failure:
        told = by_rank(str(failure))
    ended, verdict = time.time(), ""
    for report in run.glob("attempts/*.stall.json"):
        ended, verdict = report.stat().st_mtime, json.loads(report.read_bytes())["verdict"]
    file = struck_file(run)
    when, _, struck = (file.read_text() if file.exists() else "nan ").partition(" ")
    rows = losses(run) if (run / "metrics.jsonl").exists() else []
    return Ended(
        struck=struck.strip(),
        told=told,
        seconds=ended - float(when),
        verdict=verdict,
        committed=committed(run),
        reached=rows[-1][0] if rows else 0,
    )


def by_rank(failure: str) -> dict[int, str]:
    """The failures of ranks that tests/ranks.py puts into one text."""
    parts = re.split(r"^rank (\d+) (?=raised:|died|did not)", failure, flags=re.M)[1:]
    return {int(rank): told for rank, told in zip(parts[::2], parts[1::2], strict=True)}


def numbers(run: Path) -> list[Any]:
    """What a run has measured: every loss, norm and hash, and every validation."""
    validated = [(r["step"], r["val_loss"]) for r in read_metrics(run) if "val_loss" in r]
    return [*losses(run), *validated]


def differing(ours: Checkpoint, theirs: Checkpoint) -> int:
    """How many numbers of two checkpoints are not the same bits."""
    return sum(
        int(np.count_nonzero(ours.read(name, key).view("u4") != theirs.read(name, key).view("u4")))
        for name in theirs.parameters
        for key in theirs.keys
    )


@pytest.mark.usefixtures("three_times")
@pytest.mark.parametrize(
    "text",
    [t if t in DEFAULT else pytest.param(t, marks=pytest.mark.slow) for t in cells()],
)
def test_a_run_that_met_a_fault_ends_as_declared_and_goes_on(
    request: pytest.FixtureRequest,
    record_property: Any,
    dataset: Path,
    plain: Path,
    tmp_path: Path,
    text: str,
) -> None:
    fault, run, made = faults.parse(text), tmp_path / "run", config(dataset, *SETTINGS)
    if fault.phase == "load":
        shutil.copytree(request.getfixturevalue("begun"), run)
    watched = [f"stall_seconds={STALL_SECONDS}"] if fault.kind in STANDS_STILL else []
    ended = meet(config(dataset, *SETTINGS, *watched), run, text)
    record_property("seconds", ended.seconds)
    check_end(fault, ended)
    if fault.kind == "bitflip":
        check_flipped(fault, run, plain)
        return
    if set(ended.told.values()) != {"complete"}:
        assert run_ranks(RANKS, train_run, made, run) == ["complete"] * RANKS
    assert numbers(run) == numbers(plain)
    assert differing(open_checkpoint(run), open_checkpoint(plain)) == 0
    went_on_from = {*ended.committed[:1], *([BEFORE] if fault.phase == "load" else [])} - {STEPS}
    for row in read_metrics(run):
        if "loss" in row and row["step"] - 1 in went_on_from:
            assert row["resumed_from"] == row["step"] - 1, "not where it could go on"


def check_flipped(fault: Fault, run: Path, plain: Path) -> None:
    """One number is wrong, or those that are computed with it, and, where training goes on with
    them, all that follows.
    """
    wrong = differing(open_checkpoint(run, STEP), open_checkpoint(plain, STEP))
    assert wrong > 1 if fault.phase == "backward" else wrong == 1
    at_the_end = differing(open_checkpoint(run), open_checkpoint(plain))
    if fault.phase == "snapshot":
        assert numbers(run) == numbers(plain) and at_the_end == 0
    else:
        right = STEP - 1 if fault.phase == "backward" else STEP
        assert losses(run)[:right] == losses(plain)[:right] and at_the_end > 1
        assert losses(run)[STEP] != losses(plain)[STEP]


def sound(fault: Fault) -> Ended:
    """What `check_end` wants to see of a fault at forward."""
    other = "raised:\nanother rank was gone\n"
    error = f"OSError: [Errno 5] Input/output error: '{VARIABLE} forward'"
    told, verdict, at_end, reached = "complete", "", [STEPS, STEP, BEFORE], STEPS
    if fault.kind == "term":
        told, at_end, reached = "stopped", [STEP, BEFORE], STEP
    elif fault.kind == "hang":
        verdict = f"rank {fault.rank} on a (process 1) stands still at forward of step 6 for 5.1 s"
    if fault.kind in ("kill", "eio", "hang"):
        told = {"kill": "died without a word\n"}.get(fault.kind, f"raised:\n{error}\n")
        at_end, reached = [BEFORE], STEP - 1
    return Ended(
        struck=f"{VARIABLE}: {fault.kind} at forward, step 6",
        told={fault.rank: told, 1 - fault.rank: other if told[:4] in ("died", "rais") else told},
        seconds=1.0,
        verdict=verdict,
        committed=at_end,
        reached=reached,
    )


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("kill", {"told": {0: "died without a word\n", 1: "raised:\n"}}),
        ("kill", {"seconds": 5.1}),
        ("kill", {"committed": []}),
        ("kill", {"committed": [STEP, BEFORE]}),
        ("eio", {"told": {0: f"raised:\n{VARIABLE} forward", 1: "raised:\n"}}),
        ("hang", {"verdict": "rank 0 on a (process 1) stands still at forward of step 6 for 5 s"}),
        ("hang", {"verdict": "rank 1 on a (process 1) stands still at data of step 6 for 5 s"}),
        ("hang", {"seconds": STALL_SECONDS + 5.1}),
        ("hang", {"committed": []}),
        ("term", {"committed": [BEFORE]}),
        ("term", {"committed": [STEPS, STEP, BEFORE], "reached": STEPS}),
        ("slow", {"committed": [STEPS, BEFORE]}),
    ],
)
def test_what_is_not_as_declared_is_seen(kind: str, wrong: dict[str, Any]) -> None:
    fault = faults.parse(f"forward:6:1:{kind}")
    check_end(fault, sound(fault))
    with pytest.raises(AssertionError):
        check_end(fault, replace(sound(fault), **wrong))


def test_no_cell_passes_where_nothing_happens(plain: Path) -> None:
    nothing = Ended("", dict.fromkeys(range(RANKS), "complete"), 0.0, "", committed(plain), STEPS)
    for fault in map(faults.parse, cells()):
        with pytest.raises(AssertionError):
            check_end(fault, nothing)
        if fault.kind == "bitflip":
            with pytest.raises(AssertionError):
                check_flipped(fault, plain, plain)


def test_every_phase_and_kind_is_in_the_default_run() -> None:
    chosen = [faults.parse(text) for text in DEFAULT]
    assert {fault.phase for fault in chosen} == set(PHASES)
    missing = set(KINDS) - {fault.kind for fault in chosen} - set(STANDS_STILL)
    assert missing == {"bitflip"}, "that one is in test_replicas, test_repeat and test_replay"
    assert set(cells()) >= DEFAULT


def test_cells_that_make_no_sense_are_few_and_say_why() -> None:
    every = list(product(PHASES, KINDS))
    left_out = [cell for cell in every if not_applicable(*cell) is not None]
    assert RANKS * (len(every) - len(left_out)) == len(cells())
    assert {kind for _, kind in left_out} == set(ONLY_AT)
    assert len(left_out) < len(every) / 6
