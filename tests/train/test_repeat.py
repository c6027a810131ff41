"""A step that is computed twice is the same step, and what goes wrong in it once is found."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.ranks import RankFailure, run_ranks
from tests.train.folders import make_folder
from tests.train.test_finetune import config as finetune_config
from tests.train.test_finetune import labelled
from tests.train.test_pretrain import config, losses, train_run
from tests.train.test_replicas import EXACT, flip_one_bit
from tests.train.toy import Toy, loss_sum, micro_batches
from train import faults
from train.build import build_engine
from train.checkpoint import committed, open_checkpoint
from train.config import FinetuneConfig, JobConfig, RunConfig
from train.engine import Batch
from train.events import read_events
from train.exclusion import excluded
from train.finetune import finetune_on
from train.job import Job
from train.metrics import read_metrics
from train.passes import is_made_twice
from train.pretrain import PretrainTask
from train.progress import here
from train.repeat import Passes, RepeatDiffers, twice
from train.world import World

__all__ = ["labelled"]
RANKS, ACCUMULATION, MICRO_BATCH = 3, 2, 2
SIZE = RANKS * ACCUMULATION * MICRO_BATCH
Case = tuple[str, int]
CASES: list[Case] = [
    ("fp32", 0),
    ("fp32", 1),
    ("bf16", 1),
    ("bf16", 2),
    ("fp32", 3),
    ("bf16", 3),
    ("bf16", EXACT),
]
WRONG = {
    "nothing": "",
    "backward": "rank 1 on node1 had other numbers the second time, in embedding.weight, ",
    "loss": "rank 1 on node1 had other numbers the second time, in loss of micro-batch 2: ",
    "sum": "rank 1 on node1 had another sum over the ranks the second time, in ",
    "weights": "rank 1 on node1 had other numbers the second time, in embedding.weight, ",
    "everywhere": "every rank had other numbers the second time, in embedding.weight, ",
}
"""What goes wrong in the second micro-batch of the first pass, or after it, and what is said."""
CERTAIN = ("backward", "loss", "weights")
Told = list[tuple[str, Case, str]]


def findings(world: World, run: Path) -> Told:
    os.environ["SLURMD_NODENAME"] = f"node{world.rank}"
    return [found for case in CASES for found in findings_of(world, run, *case)]


def findings_of(world: World, run: Path, precision: str, stage: int) -> Told:
    settings: dict[str, Any] = {"precision": precision, "micro_batch": MICRO_BATCH}
    settings["zero"] = {"stage": max(stage, 0), "persistence_threshold": 20}
    if stage == EXACT:
        settings["train"] = {"reproducible": "across_world_sizes"}
    layout = {"micro_batch": MICRO_BATCH, "accumulation": ACCUMULATION}
    engine = build_engine(Toy(), JobConfig.model_validate(settings), world, **layout)
    real, wrong, count = engine.grad_norm, "", 0

    def computing(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = loss_sum(module, batch)
        is_wrong = wrong == "everywhere" or (wrong == "backward" and world.rank == 1)
        if count == 2 and is_wrong:
            # The loss stays as it is.
            loss.register_hook(lambda gradient: gradient * (1 + 2**-6))
        if count == 2 and wrong == "loss" and world.rank == 1:
            # Its gradient stays as it is.
            loss = loss + 2**-10 * loss.detach()
        return loss

    def adding_up() -> float:
        norm = real()
        if count == ACCUMULATION and world.rank == 1:
            if wrong == "sum":
                flip_one_bit(next(tensor for _, tensor in engine.gradients()))
            if wrong == "weights":
                flip_one_bit(weights)
        return norm

    engine.grad_norm = adding_up  # type: ignore[method-assign]
    weights = next((part for _, part in engine.lent()), next(engine.module.parameters()))

    def passes() -> Passes:
        parts = micro_batches(1, SIZE, world, **layout)
        return [
            (engine.forward_backward(part, num_valid=60, loss_sum=computing), torch.zeros(2))
            for part in parts
        ]

    told: Told = []
    for wrong in WRONG:
        count, found = 0, ""
        try:
            done, _ = twice(engine, world, run / wrong, passes, passes, step=7, attempt=2)
            assert len(done) == ACCUMULATION
        except RepeatDiffers as error:
            found = str(error)
        engine.skip()
        if wrong == "weights" and world.rank == 1:
            flip_one_bit(weights)
        told.append((wrong, (precision, stage), found))
    return told


def test_who_failed_once_is_named(tmp_path: Path) -> None:
    for wrong in WRONG:
        (tmp_path / wrong).mkdir()
    told = run_ranks(RANKS, findings, tmp_path)
    assert told[0] == told[1] == told[2]
    for wrong, (precision, stage), found in told[0]:
        start = f"step 7, computed twice: {WRONG[wrong]}"
        if wrong == "weights" and stage == 3:
            # They are gathered from there, and all ranks' numbers are others.
            start = "step 7, computed twice: rank 1 on node1 had other weights for the others the "
        assert found.startswith(start) if WRONG[wrong] else not found, (wrong, precision, stage)
        assert ("--exclude=NODE" in found) == (wrong in CERTAIN)
    for wrong in WRONG:
        ranks = [0, 1, 2] if wrong == "everywhere" else [1]
        events = read_events(tmp_path / wrong, "repeat differs")
        assert [event["ranks"] for event in events] == [ranks] * (len(CASES) * bool(WRONG[wrong]))
        # Who adds up wrong what others sent need not be the one who has failed.
        assert excluded(tmp_path / wrong) == (["node1"] if wrong in CERTAIN else [])


LAYOUTS = (
    ("zero.stage=0", "micro_batch=3"),
    ("zero.stage=1", "precision=bf16"),
    ("zero.stage=2", "micro_batch=2", "model.activation_checkpointing=true"),
    ("zero.stage=3", "precision=bf16", "micro_batch=2", "zero.persistence_threshold=40"),
    ("zero.stage=0", "micro_batch=2", "train.reproducible=across_world_sizes"),
)
POISONED, FAILED = 4, 5


def with_one_bad_step(
    world: World, jobs: list[tuple[RunConfig, Path]], tuned: list[tuple[FinetuneConfig, Path]]
) -> list[str]:
    """Runs in whose step POISONED the loss of rank 0 is no number, however often it is computed."""
    real = PretrainTask.loss_sum

    def computing(task: Any, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        loss = real(task, module, batch)
        return loss * math.nan if here().step == POISONED and world.rank == 0 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTask, "loss_sum", computing)
        ended = [train_run(world, *job) for job in jobs]
    return ended + [finetune_on(world, *job) for job in tuned]


def everything(run: Path) -> Any:
    """Rows, and every byte of every checkpoint."""
    found = {}
    for step in committed(run):
        saved = open_checkpoint(run, step)
        found[step] = (
            {(n, k): saved.read(n, k).tobytes() for n in saved.parameters for k in saved.keys},
            saved.scalars,
            saved.state["guard"],
        )
    skipped = [row["step"] for row in read_metrics(run) if row.get("skipped")]
    return losses(run), skipped, found


def rows_of_repeats(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row.get("repeat_seconds", 0) > 0]


def test_a_run_whose_steps_are_all_computed_twice_has_the_same_bits(
    dataset: Path, labelled: Path, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    ways = ("guard.repeat_every=0", "guard.repeat_every=1")
    saves = ("checkpoint.every=3", "steps=6")
    jobs = [
        (config(dataset, *layout, *saves, way), tmp_path / f"{number}-{way[-1]}")
        for number, layout in enumerate(LAYOUTS)
        for way in ways
    ]
    under_dropout = (f"model={folder}", f"data={labelled}", "steps=4", "checkpoint.every=2")
    tuned = [
        (finetune_config(*under_dropout, "micro_batch=1", way), tmp_path / f"tuned-{way[-1]}")
        for way in ways
    ]
    ended = ["complete"] * (len(jobs) + len(tuned))
    assert run_ranks(2, with_one_bad_step, jobs, tuned) == [ended] * 2
    runs = [run for _, run in [*jobs, *tuned]]
    for once, repeated in zip(runs[::2], runs[1::2], strict=True):
        assert everything(repeated) == everything(once), repeated.name
        assert [len(rows_of_repeats(run)) for run in (once, repeated)] == [0, committed(once)[0]]
        assert everything(once)[1] == ([] if "tuned" in once.name else [POISONED])
        assert len(committed(once)) >= 2


def failing_once(world: World, made: RunConfig, run: Path) -> str:
    """A run in which rank 1 computes one gradient of step FAILED wrong, the first time."""
    faults.arm(f"backward:{FAILED}:1:bitflip", world.rank)
    return train_run(world, made, run)


def test_a_gradient_that_was_wrong_once_is_not_trained_with(dataset: Path, tmp_path: Path) -> None:
    looks = ("zero.stage=1", "guard.check_every=1", "eval.samples=1")
    clean, unseen, seen = (tmp_path / name for name in ("clean", "unseen", "seen"))
    assert run_ranks(2, train_run, config(dataset, *looks), clean) == ["complete"] * 2
    # All ranks hold the same wrong weights: to compare them finds nothing.
    made = config(dataset, *looks, f"guard.repeat_every={FAILED + 1}")
    assert run_ranks(2, failing_once, made, unseen) == ["complete"] * 2
    assert losses(unseen)[: FAILED - 1] == losses(clean)[: FAILED - 1]
    assert losses(unseen) != losses(clean)
    made = config(dataset, *looks, f"guard.repeat_every={FAILED}")
    told = (
        rf"RepeatDiffers: step {FAILED}, computed twice: rank 1 on .* had other numbers the second"
    )
    with pytest.raises(RankFailure, match=told):
        run_ranks(2, failing_once, made, seen)
    assert losses(seen) == losses(clean)[: FAILED - 1], "nothing was updated with it"
    assert [(e["step"], e["ranks"]) for e in read_events(seen, "repeat differs")] == [(FAILED, [1])]
    assert run_ranks(2, train_run, made, seen) == ["complete"] * 2
    assert everything(seen) == everything(clean)


ANY = {"micro_batch": 1, "precision": "fp32", "zero": {"stage": 0}}


@pytest.mark.parametrize(
    ("device", "settings", "is_replay", "expected"),
    [
        ("cpu", {}, False, [1000, 2000]),
        ("cpu", {}, True, []),
        ("cpu", {"guard": {"repeat_every": 0}}, False, []),
        ("cuda", {}, False, []),
        ("cuda", {"train": {"deterministic": True}}, False, [1000, 2000]),
        ("cuda", {"train": {"reproducible": "across_world_sizes"}}, False, [1000, 2000]),
    ],
)
def test_only_kernels_that_repeat_themselves_are_asked_to(
    device: str, settings: dict[str, Any], is_replay: bool, expected: list[int]
) -> None:
    world = SimpleNamespace(device=torch.device(device))
    made = JobConfig.model_validate(ANY | settings)
    job = SimpleNamespace(world=world, config=made, is_replay=is_replay)
    assert [step for step in range(1, 2500) if is_made_twice(cast(Job, job), step)] == expected
