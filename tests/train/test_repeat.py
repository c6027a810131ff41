"""A step that is computed twice is the same step, and what goes wrong in it once is found."""

from __future__ import annotations

import math
import os
from itertools import product
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
    "later": "rank 1 on node1 had other numbers the second time, in embedding.weight, ",
    "loss": "rank 1 on node1 had other numbers the second time, in loss of micro-batch 2: ",
    "sum": "rank 1 on node1 had another sum over the ranks the second time, in ",
    "weights": "rank 1 on node1 had other numbers the second time, in embedding.weight, ",
    "everywhere": "every rank had other numbers the second time, in embedding.weight, ",
}
"""What goes wrong in the second micro-batch of a pass, the first one but for `later`, or after it,
and what is said.
"""
GATHERED = "rank 1 on node1 held other weights, which the others gather, the second time, in embedd"
Told = list[tuple[str, Case, str]]


def is_certain(wrong: str, case: Case) -> bool:
    """Who adds up wrong what others sent need not have failed, nor who was sent wrong weights."""
    _, stage = case
    return wrong == "weights" or (wrong in ("backward", "later", "loss") and stage != 3)


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
        is_wrong = wrong == "everywhere" or (wrong in ("backward", "later") and world.rank == 1)
        if count == (2 + ACCUMULATION if wrong == "later" else 2) and is_wrong:
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
            place = run / f"{wrong} {precision} {stage}"
            done, _ = twice(engine, world, place, passes, passes, step=7, attempt=2)
            assert len(done) == ACCUMULATION
        except RepeatDiffers as error:
            found = str(error)
        engine.skip()
        if wrong == "weights" and world.rank == 1:
            flip_one_bit(weights)
        told.append((wrong, (precision, stage), found))
    return told


def test_who_failed_once_is_named(tmp_path: Path) -> None:
    for wrong, (precision, stage) in product(WRONG, CASES):
        (tmp_path / f"{wrong} {precision} {stage}").mkdir()
    told = run_ranks(RANKS, findings, tmp_path)
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == len(WRONG) * len(CASES)
    for wrong, (precision, stage), found in told[0]:
        run = tmp_path / f"{wrong} {precision} {stage}"
        # At stage 3 all ranks compute with them.
        said = GATHERED if wrong == "weights" and stage == 3 else WRONG[wrong]
        assert found.startswith(f"step 7, computed twice: {said}") if said else not found, run.name
        certain = is_certain(wrong, (precision, stage))
        assert ("--exclude=NODE" in found) == certain, run.name
        assert excluded(run) == (["node1"] if certain else []), run.name
        ranks = [0, 1, 2] if wrong == "everywhere" else [1]
        events = read_events(run, "repeat differs")
        assert [event["ranks"] for event in events] == ([ranks] if said else []), run.name


LAYOUTS = (
    ("zero.stage=0", "micro_batch=3"),
    ("zero.stage=1", "precision=bf16"),
    ("zero.stage=2", "micro_batch=2", "model.activation_checkpointing=true"),
    ("zero.stage=3", "precision=bf16", "micro_batch=2", "zero.persistence_threshold=40"),
    ("zero.stage=0", "micro_batch=2", "train.reproducible=across_world_sizes"),
)
POISONED, FAILED = 4, 5
FAILURES = (f"backward:{FAILED}:1:bitflip", f"forward:{FAILED}:1:nan")


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


def failing_once(world: World, made: RunConfig, run: Path, fault: str) -> str:
    """A run in which rank 1 computes something of step FAILED wrong, the first time."""
    faults.arm(fault, world.rank)
    return train_run(world, made, run)


def test_a_gradient_that_was_wrong_once_is_not_trained_with(dataset: Path, tmp_path: Path) -> None:
    looks = ("zero.stage=1", "guard.check_every=1", "eval.samples=1")
    clean, unseen = tmp_path / "clean", tmp_path / "unseen"
    assert run_ranks(2, train_run, config(dataset, *looks), clean) == ["complete"] * 2
    # All ranks hold the same wrong weights: to compare them finds nothing.
    made = config(dataset, *looks, f"guard.repeat_every={FAILED + 1}")
    assert run_ranks(2, failing_once, made, unseen, FAILURES[0]) == ["complete"] * 2
    assert losses(unseen)[: FAILED - 1] == losses(clean)[: FAILED - 1]
    assert losses(unseen) != losses(clean)
    made = config(dataset, *looks, f"guard.repeat_every={FAILED}")
    told = rf"RepeatDiffers: step {FAILED}, computed twice: rank 1 on .* had other numbers the sec"
    # A NaN that comes but once is no bad step: that would be skipped.
    for fault in FAILURES:
        seen = tmp_path / fault.replace(":", "-")
        with pytest.raises(RankFailure, match=told):
            run_ranks(2, failing_once, made, seen, fault)
        assert losses(seen) == losses(clean)[: FAILED - 1], "nothing was updated with it"
        events = read_events(seen, "repeat differs")
        assert [(event["step"], event["ranks"]) for event in events] == [(FAILED, [1])]
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
