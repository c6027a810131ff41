"""Dropout and a step that was skipped, in one run that was interrupted around it: byte for byte.

A resume has to draw what the uninterrupted run drew, and must not count the skipped step in the
moments' bias correction. Two controls forget one of the two, and the comparison has to notice. The
row of tests/train/test_resume_runs.py that a model without dropout cannot have.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import train.attempt
import train.passes
from tests.ranks import run_ranks
from tests.train.folders import make_folder
from tests.train.test_finetune import config, labelled
from train import faults
from train.checkpoint import Checkpoint, open_checkpoint
from train.config import FinetuneConfig
from train.engine import Engine
from train.events import read_events
from train.finetune import finetune_on
from train.metrics import read_metrics
from train.world import World

RANKS, STEPS, SKIPPED = 2, 6, 4
Layout = tuple[str, int]
"""Precision and ZeRO stage."""
LAYOUTS: list[Layout] = [("fp32", 1), ("bf16", 3)]
CUTS = [SKIPPED - 1, SKIPPED]
"""The skipped step is the first one of the second attempt, or the last one of the first."""
Job = tuple[FinetuneConfig, Path, int | None, str]
"""Where a run stops, and what its resume forgets."""

__all__ = ["labelled"]
seed, load_newest = train.passes._seed, train.attempt.load_newest


def tune(world: World, jobs: list[Job]) -> list[str]:
    """One run after the other; the loss of rank 1 is no number in step SKIPPED."""
    outcomes = []
    for made, run, stop_at, forgets in jobs:
        train.passes._seed = drawing_from_the_start if forgets == "draws" else seed
        train.attempt.load_newest = counting_the_skip if forgets == "skip" else load_newest
        faults.arm(f"forward:{SKIPPED}:1:nan", world.rank)
        outcomes.append(finetune_on(world, made, run, stop_at=stop_at))
    return outcomes


def drawing_from_the_start(number: int, step: int, place: int) -> None:
    """As with a generator that nobody saved: a new process begins it again."""
    seed(number, step - SKIPPED, place)


def counting_the_skip(engine: Engine, *args: Any, **options: Any) -> Checkpoint | None:
    """A load whose optimizer goes on from the number of the step, not of the updates."""
    saved = load_newest(engine, *args, **options)
    for flat in engine.flats():
        flat.state["step"] += 1
    return saved


def everything(run: Path) -> dict[str, Any]:
    """What two runs of one history have alike."""
    saved = open_checkpoint(run)
    assert saved.step == STEPS
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "data_hash", "val_loss")
    rows = [[row.get(key) for key in (*keys, "skipped")] for row in read_metrics(run)]
    return {
        "rows": rows,
        "bytes": {(n, k): saved.read(n, k).tobytes() for n in saved.parameters for k in saved.keys},
        "scalars": saved.scalars,
        "guard": saved.state["guard"],
        "skips": [(event["step"], event["samples"]) for event in read_events(run, "skip")],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return make_folder(tmp_path_factory.mktemp("models") / "dropout", **rates)


def made(folder: Path, labelled: Path, layout: Layout) -> FinetuneConfig:
    precision, stage = layout
    settings = (f"model={folder}", f"data={labelled}", f"steps={STEPS}", "micro_batch=1")
    return config(*settings, f"precision={precision}", f"zero.stage={stage}")


def test_an_interruption_around_a_skipped_step_leaves_no_trace_under_dropout(
    folder: Path, labelled: Path, tmp_path: Path
) -> None:
    whole: dict[Layout, Job] = {}
    cut: list[Job] = []
    for layout in LAYOUTS:
        settings = made(folder, labelled, layout)
        whole[layout] = (settings, tmp_path / f"whole-{layout}", None, "")
        cut += [(settings, tmp_path / f"cut-{layout}-{stop}", stop, "") for stop in CUTS]
    still = made(make_folder(tmp_path / "still"), labelled, LAYOUTS[0])
    begun = [*whole.values(), *cut, (still, tmp_path / "dropping-nothing", SKIPPED, "")]
    ended = ["complete"] * len(whole) + ["stopped"] * (len(cut) + 1)
    assert run_ranks(RANKS, tune, begun) == [ended] * RANKS
    # Stopped right after the skip, so that nothing else can be forgotten.
    settings, run, stop, _ = cut[1]
    assert stop == SKIPPED
    damaged = [
        (settings, shutil.copytree(run, tmp_path / forgets / run.name), None, forgets)
        for forgets in ("draws", "skip")
    ]
    resumed = [(settings, run, None, "") for settings, run, _, _ in cut]
    ended = ["complete"] * (len(resumed) + len(damaged))
    assert run_ranks(RANKS, tune, resumed + damaged) == [ended] * RANKS
    expected = {layout: everything(job[1]) for layout, job in whole.items()}
    for number, (_, run, _, _) in enumerate(resumed):
        found = everything(run)
        assert found == expected[LAYOUTS[number // len(CUTS)]], run.name
        assert [step for step, _ in found["skips"]] == [SKIPPED]
    for _, run, _, forgets in damaged:
        found, right = everything(run), expected[LAYOUTS[0]]
        assert found["rows"] != right["rows"] and found["bytes"] != right["bytes"], forgets
        assert found["rows"][:SKIPPED] == right["rows"][:SKIPPED], "they differ by the resume alone"
    first = [read_metrics(run)[1]["loss"] for _, run, _, _ in (begun[0], begun[-1])]
    assert first[0] != first[1], "nothing was dropped"


def test_dropout_follows_the_samples_and_not_the_ranks(
    folder: Path, labelled: Path, tmp_path: Path
) -> None:
    settings = (f"model={folder}", f"data={labelled}", "batch_size=4", "micro_batch=1")
    exact = config(*settings, "zero.stage=0", "train.reproducible=across_world_sizes")
    for ranks in (1, 2):
        jobs: list[Job] = [
            (exact, tmp_path / f"exact-{ranks}", 2, ""),
            (config(*settings), tmp_path / f"deepspeed-{ranks}", 2, ""),
        ]
        assert run_ranks(ranks, tune, jobs) == [["stopped"] * 2] * ranks

    def numbers(name: str) -> list[Any]:
        rows = read_metrics(tmp_path / name)
        return [row[key] for row in rows for key in ("loss", "grad_norm") if key in row]

    assert numbers("exact-1") == numbers("exact-2")
    # fp32 in another order of additions.
    assert numbers("deepspeed-1") == pytest.approx(numbers("deepspeed-2"), rel=2e-4)
