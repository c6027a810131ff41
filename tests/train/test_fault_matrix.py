"""Whatever happens to a rank, wherever it is: the run ends as declared here, and the same command
brings it to the same numbers.

Ranks are real, with real DeepSpeed engines. Every phase and every kind happens at least once by
default, all cells in soak. `import`, `rendezvous` and `export`, which happen outside of a run, and
what the launcher makes of ranks that stand still are in tests/launcher/test_faults.py.
"""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import train.watch
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, losses, train_run
from train import faults
from train.checkpoint import committed, open_checkpoint
from train.config import RunConfig
from train.faults import IN_A_SAVE, IN_A_STEP, KINDS, ONLY_AT, VARIABLE
from train.metrics import read_metrics
from train.world import World

STEP, RANKS = 6, 2
"""A step with a checkpoint and a validation; the one before is 3."""
SETTINGS = ("eval.every=3", "eval.samples=4", "guard.max_skips=0")
PHASES = ("build", "load", *IN_A_STEP, *IN_A_SAVE, "evaluate")
ON_PURPOSE = ("term", "usr1")
STANDS_STILL = ("stop", "hang")
STALL_SECONDS = 5
"""After which the watch ends the others."""
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
    faults.arm(text, world.rank)
    return train_run(world, made, run)


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    assert run_ranks(RANKS, train_run, config(dataset, *SETTINGS), run) == ["complete"] * RANKS
    return run


def numbers(run: Path) -> list[Any]:
    """What a run has measured: every loss, norm and hash, and every validation."""
    validated = [(r["step"], r["val_loss"]) for r in read_metrics(run) if "val_loss" in r]
    return [*losses(run), *validated]


@pytest.mark.usefixtures("three_times")
@pytest.mark.parametrize(
    "text",
    [t if t in DEFAULT else pytest.param(t, marks=pytest.mark.slow) for t in cells()],
)
def test_a_run_that_met_a_fault_ends_as_declared_and_goes_on(
    dataset: Path, plain: Path, tmp_path: Path, text: str
) -> None:
    fault, run, made = faults.parse(text), tmp_path / "run", config(dataset, *SETTINGS)
    watched = [f"stall_seconds={STALL_SECONDS}"] if fault.kind in STANDS_STILL else []
    try:
        ended = run_ranks(
            RANKS, train_to_the_fault, config(dataset, *SETTINGS, *watched), run, text
        )
    except RankFailure as failure:
        ended = [str(failure)]
    check_end(fault, ended, run)
    if fault.kind == "bitflip":
        return
    assert run_ranks(RANKS, train_run, made, run) == ["complete"] * RANKS
    assert numbers(run) == numbers(plain)
    ours, theirs = open_checkpoint(run), open_checkpoint(plain)
    for name in theirs.parameters:
        for key in theirs.keys:
            assert ours.read(name, key).tobytes() == theirs.read(name, key).tobytes()


def check_end(fault: faults.Fault, ended: list[str], run: Path) -> None:
    """What each kind makes of a run."""
    text, before = "".join(ended), committed(run)
    if fault.kind in ON_PURPOSE:
        assert ended == ["stopped"] * RANKS
    elif fault.kind in ("slow", "bitflip"):
        # No run stops of a flipped bit at once: the replicas' hashes and `replay` tell.
        assert ended == ["complete"] * RANKS
    elif fault.kind in STANDS_STILL:
        told = json.loads((run / "attempts/000001.stall.json").read_bytes())["verdict"]
        assert told.startswith(f"rank {fault.rank} "), told
    elif fault.kind == "nan":
        assert "NonFiniteLoss: step 6: loss nan" in text
    elif fault.kind in ("enospc", "eio"):
        assert f"{VARIABLE} {fault.phase}" in text, text
    else:
        assert re.search("died without a word|raised", text), text
    if fault.phase in (*IN_A_STEP, "snapshot", "write") and fault.kind in ("kill", "exit", "raise"):
        assert before in ([3], [6, 3]), "an interval was lost"


def test_every_phase_and_kind_is_in_the_default_run() -> None:
    chosen = [faults.parse(text) for text in DEFAULT]
    assert {fault.phase for fault in chosen} == set(PHASES)
    missing = set(KINDS) - {fault.kind for fault in chosen} - set(STANDS_STILL)
    assert missing == {"bitflip"}, "that one is in tests/train/test_replay.py"
    assert set(cells()) >= DEFAULT


def test_cells_that_make_no_sense_are_few_and_say_why() -> None:
    every = list(product(PHASES, KINDS))
    left_out = [cell for cell in every if not_applicable(*cell) is not None]
    assert RANKS * (len(every) - len(left_out)) == len(cells())
    assert {kind for _, kind in left_out} == set(ONLY_AT)
    assert len(left_out) < len(every) / 6
