"""A flipped bit in what every rank holds alike is found, and the rank and the tensor are named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train.replicas
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, losses, train_run
from tests.train.toy import Toy, loss_sum, make_engine, micro_batches, run_steps
from train import faults
from train.build import build_engine
from train.checkpoint import committed
from train.config import JobConfig, RunConfig
from train.events import read_events
from train.metrics import read_metrics
from train.pretrain import PretrainTask
from train.replicas import ReplicasDiffer, check_replicas, checksum
from train.world import World

SIZE = 6
EXACT = -1
"""No stage: train.reproducible=across_world_sizes, whose fp32 twins every rank holds."""
Case = tuple[str, int, str]
CASES: list[Case] = [
    ("fp32", 0, "embedding.weight"),
    ("fp32", 0, "wide.weight (exp_avg_sq)"),
    ("fp32", 1, "narrow.weight"),
    ("bf16", 1, "wide.bias"),
    ("bf16", 2, "embedding.weight"),
    ("fp32", 3, "norm.weight"),
    ("bf16", 3, "narrow.bias"),
    ("bf16", EXACT, "wide.weight (param)"),
]


def alarms(
    world: World, run: Path, culprit: int, cases: list[Case], is_far: bool = False
) -> list[tuple[str, str]]:
    """What is said of each case before a bit of `culprit` flips, and after. `is_far`: with the
    checksum of a GPU.
    """
    if is_far:
        train.replicas.is_near = lambda _: False
    found = []
    for precision, stage, name in cases:
        settings: dict[str, Any] = {"precision": precision, "micro_batch": 2}
        if stage == EXACT:
            settings["train"] = {"reproducible": "across_world_sizes"}
        made = JobConfig.model_validate(settings | {"zero": {"stage": max(stage, 0)}})
        layout = {"micro_batch": 2, "accumulation": -(-SIZE // (2 * world.size))}
        engine = build_engine(Toy(), made, world, **layout)
        told = []
        for step in (1, 2):
            run_steps(engine, world, range(step, step + 1), size=SIZE, **layout)
            if step == 2 and world.rank == culprit:
                flip_one_bit(dict(engine.replicas())[name])
            told.append(alarm(engine, world, run))
        found.append((told[0], told[1]))
    return found


def flip_one_bit(tensor: torch.Tensor) -> None:
    """The lowest bit of one byte, in place."""
    tensor.detach().view(-1).view(torch.uint8)[5] ^= 1


def alarm(engine: Any, world: World, run: Path) -> str:
    try:
        check_replicas(engine, world, run, step=7, attempt=2)
    except ReplicasDiffer as error:
        return str(error)
    return ""


def test_the_odd_rank_and_its_tensor_are_named(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(3, alarms, tmp_path, 1, CASES)):
        for (before, after), (precision, stage, name) in zip(found, CASES, strict=True):
            where = f"{precision} z{stage} {name}, rank {rank}"
            assert before == "", where
            start = f"step 7: rank 1 differs from the other 2 in {name} (rank 1 on "
            assert after.startswith(start), where
            assert "take that node out (with Slurm, --exclude=NODE)" in after
    events = read_events(tmp_path, "replicas differ")
    assert [(event["ranks"], event["names"]) for event in events] == [
        ([1], [name]) for _, _, name in CASES
    ]


WHOLE_GRADIENTS = [
    ("fp32", 0, "same_layout", "wide.weight (gradient)"),
    ("fp32", 0, "across_world_sizes", "wide.weight (gradient)"),
    ("bf16", 1, "same_layout", "gradient (part 2)"),
]


def gradient_alarms(world: World, run: Path) -> list[tuple[str, str]]:
    """What is said before a bit of rank 1's reduced gradient flips, and after, both before the
    update.
    """
    found = []
    for precision, stage, reproducible, name in WHOLE_GRADIENTS:
        settings = {"precision": precision, "micro_batch": 2, "zero": {"stage": stage}}
        made = JobConfig.model_validate(settings | {"train": {"reproducible": reproducible}})
        engine = build_engine(Toy(), made, world, micro_batch=2, accumulation=1)
        (batch,) = itertools.islice(micro_batches(1, SIZE, world, micro_batch=2, accumulation=1), 1)
        engine.forward_backward(batch, num_valid=SIZE, loss_sum=loss_sum)
        engine.grad_norm()
        before = alarm(engine, world, run)
        if world.rank == 1:
            flip_one_bit(dict(engine.gradients())[name])
        found.append((before, alarm(engine, world, run)))
    return found


def test_a_gradient_that_one_rank_alone_has_is_found_before_the_update(tmp_path: Path) -> None:
    for found in run_ranks(3, gradient_alarms, tmp_path):
        for (before, after), (*_, name) in zip(found, WHOLE_GRADIENTS, strict=True):
            assert before == ""
            start = f"step 7: rank 1 differs from the other 2 in {name} (rank 1 on "
            assert after.startswith(start)


def test_of_two_ranks_nobody_is_right(tmp_path: Path) -> None:
    ((before, after),) = run_ranks(2, alarms, tmp_path, 0, CASES[:1])[0]
    assert before == ""
    assert "the ranks [0, 1] differ in embedding.weight, and no majority tells" in after


def test_the_checksum_of_a_gpu_names_the_same_tensor(tmp_path: Path) -> None:
    cases = [CASES[1], CASES[4], CASES[6]]
    found = run_ranks(2, alarms, tmp_path, 1, cases, True)[0]
    for (before, after), (_, _, name) in zip(found, cases, strict=True):
        assert before == ""
        assert f"the ranks [0, 1] differ in {name}, and no majority tells" in after


NUMBERS = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


@given(
    dtype=st.sampled_from(NUMBERS),
    size=st.integers(1, 40),
    flips=st.lists(st.integers(0, 2**20), min_size=1, max_size=2, unique=True),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_any_flipped_bit_and_any_two_change_the_checksum(
    dtype: torch.dtype, size: int, flips: list[int], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.replicas, "PIECE", 7)
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randint(0, 200, (size,), generator=generator).to(dtype)
        before = int(checksum(tensor))
        assert int(checksum(tensor.clone())) == before
        # However it lies in memory.
        assert int(checksum(tensor.repeat_interleave(2)[::2])) == before
        bits = tensor.view(torch.uint8)
        places = {flip % (8 * len(bits)) for flip in flips}
        for place in places:
            bits[place // 8] ^= 1 << place % 8
        assert int(checksum(tensor)) != before


def test_a_checksum_tells_numbers_that_changed_places() -> None:
    tensor = torch.arange(3 * 2**20, dtype=torch.float32)
    moved = tensor.clone()
    moved[[5, 2_000_000]] = tensor[[2_000_000, 5]]
    found = [int(checksum(one)) for one in (tensor, moved, tensor.flip(0), tensor.roll(1))]
    assert len(set(found)) == 4


def flipping(world: World, made: RunConfig, run: Path, text: str) -> str:
    if text:
        faults.arm(text, world.rank)
    return train_run(world, made, run)


def test_a_run_ends_at_the_next_check_and_a_clean_one_does_not(
    dataset: Path, tmp_path: Path
) -> None:
    made = config(dataset, "zero.stage=0", "guard.check_every=2", "eval.samples=1")
    assert run_ranks(2, flipping, made, tmp_path / "clean", "") == ["complete"] * 2
    assert read_events(tmp_path / "clean", "replicas differ") == []
    with pytest.raises(RankFailure, match=r"ReplicasDiffer: step 6: the ranks \[0, 1\] differ in"):
        run_ranks(2, flipping, made, tmp_path / "flipped", "optimizer:5:1:bitflip")
    (event,) = read_events(tmp_path / "flipped", "replicas differ")
    assert event["step"] == 6


def changed_while_computing(
    world: World, dataset: Path, folder: Path, cases: list[tuple[bool, tuple[str, ...]]]
) -> list[str]:
    """How runs end in whose step CHANGED a weight of rank 1 is another before the forward pass: by
    a bit, or by so much that the loss is no number.
    """
    loss_sum = PretrainTask.loss_sum
    steps_begun, is_much = 0, False

    def changing(task: Any, module: torch.nn.Module, batch: Any) -> torch.Tensor:
        nonlocal steps_begun
        steps_begun += torch.is_grad_enabled()
        if torch.is_grad_enabled() and steps_begun == CHANGED and world.rank == 1:
            weight = next(module.parameters()).detach()
            if is_much:
                weight.fill_(torch.nan)
            else:
                flip_one_bit(weight)
        return loss_sum(task, module, batch)

    ended = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTask, "loss_sum", changing)
        for number, (is_much, overrides) in enumerate(cases):  # noqa: B007
            steps_begun = 0
            made = config(dataset, "eval.samples=1", "checkpoint.every=0", "steps=5", *overrides)
            try:
                ended.append(train_run(world, made, folder / str(number)))
            except ReplicasDiffer as error:
                ended.append(str(error))
    return ended


CHANGED = 4


def test_weights_are_compared_while_the_step_that_used_them_is_not_taken(
    dataset: Path, tmp_path: Path
) -> None:
    checks = f"guard.check_every={CHANGED}"
    cases = [
        (False, ("zero.stage=1", checks)),
        (False, ("zero.stage=2", checks)),
        (False, ("zero.stage=3", checks)),
        # What makes a loss no number is no mere skip, at whichever step.
        (True, ("zero.stage=1",)),
    ]
    for ended in run_ranks(2, changed_while_computing, dataset, tmp_path, cases):
        for text, case in zip(ended, cases, strict=True):
            assert text.startswith(f"step {CHANGED}: the ranks [0, 1] differ in embed"), case
    rows = [read_metrics(tmp_path / str(number))[-1]["step"] for number in range(len(cases))]
    assert rows == [CHANGED - 1] * len(cases), "nothing was updated with it"


def test_what_differs_is_not_saved_and_a_resume_is_clean(dataset: Path, tmp_path: Path) -> None:
    made = config(dataset, "zero.stage=0", "guard.check_every=4", "eval.samples=1")
    assert run_ranks(2, train_run, made, tmp_path / "clean") == ["complete"] * 2
    # Saved every 3 steps; the next check by itself would be behind that.
    with pytest.raises(RankFailure, match=r"ReplicasDiffer: step 3: the ranks \[0, 1\] differ in"):
        run_ranks(2, flipping, made, tmp_path / "flipped", "optimizer:2:1:bitflip")
    assert committed(tmp_path / "flipped") == []
    assert run_ranks(2, train_run, made, tmp_path / "flipped") == ["complete"] * 2
    assert losses(tmp_path / "flipped") == losses(tmp_path / "clean")


def alone(world: World, run: Path) -> str:
    engine, _ = make_engine(JobConfig(precision="fp32"), world, size=2, micro_batch=2)
    flip_one_bit(next(iter(engine.module.parameters())))
    return alarm(engine, world, run)


def test_one_rank_has_nothing_to_compare_with(tmp_path: Path) -> None:
    assert run_ranks(1, alone, tmp_path) == [""]
