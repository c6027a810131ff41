"""A step can be judged before it is taken, and a step that is not taken leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.toy import global_batch, loss_sum, make_engine, micro_batches
from train.config import JobConfig
from train.engine import Batch, Engine
from train.world import World

SIZE = 12
Bits = dict[str, Any]
CASES = [("fp32", stage) for stage in range(4)] + [("bf16", stage) for stage in (1, 2, 3)]


def job(precision: str, stage: int, threshold: int) -> JobConfig:
    return JobConfig.model_validate(
        {
            "precision": precision,
            "zero": {"stage": stage, "persistence_threshold": threshold},
            "optim": {"clip_norm": 0.5},
        }
    )


def poisoned(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return loss_sum(module, batch) * math.nan


def backward(engine: Engine, world: World, step: int, accumulation: int, bad_rank: int) -> None:
    """Every micro-batch of a step; the loss is NaN in the second one of `bad_rank`."""
    num_valid = int((global_batch(step, SIZE)["y"] != -100).sum())
    parts = micro_batches(step, SIZE, world, micro_batch=2, accumulation=accumulation)
    for micro, batch in enumerate(parts):
        bad = micro == 1 and world.rank == bad_rank
        engine.forward_backward(batch, num_valid=num_valid, loss_sum=poisoned if bad else loss_sum)


def bits(engine: Engine) -> Bits:
    """Copies of everything that a skipped step must leave alone."""
    found: Bits = {"low": [p.detach().clone() for p in engine.module.parameters()]}
    for index, flat in enumerate(engine.flats()):
        for key, tensor in flat.tensors().items():
            found[f"{index} {key}"] = tensor.clone()
        found[f"{index} scalars"] = flat.scalars()
    return found


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return all(equal(one, other) for one, other in zip(left, right, strict=True))
    return torch.equal(left, right) if torch.is_tensor(left) else bool(left == right)


def skips(world: World, plain: bool = False) -> dict[str, list[str]]:
    """What is wrong in each case; steps 2 (NaN on the last rank) and 4 (good) are skipped, and
    another engine never sees them.
    """
    found = {}
    for precision, stage in [("fp32", 1), ("bf16", 1)] if plain else CASES:
        for threshold in (0, 100_000) if stage == 3 else (0,):
            config = job(precision, stage, threshold)
            name = f"{precision} z{stage} t{threshold}"
            found[name] = compare(config, world, plain)
    return found


def compare(config: JobConfig, world: World, plain: bool) -> list[str]:
    wrong = []
    skipping, accumulation = make_engine(config, world, size=SIZE, micro_batch=2, plain=plain)
    other, _ = make_engine(config, world, size=SIZE, micro_batch=2, plain=plain)
    for step in range(1, 7):
        bad = step == 2
        backward(skipping, world, step, accumulation, world.size - 1 if bad else -1)
        norm = skipping.grad_norm()
        if step in (2, 4):
            before = bits(skipping)
            if math.isfinite(norm) == bad:
                wrong.append(f"step {step}: norm {norm}")
            skipping.skip()
            if not equal(before, bits(skipping)):
                wrong.append(f"step {step} left a trace")
            continue
        backward(other, world, step, accumulation, -1)
        stats, expected = skipping.step(0.01), other.step(0.01)
        if not stats.grad_norm == norm == expected.grad_norm:
            wrong.append(f"step {step}: {norm}, {stats.grad_norm}, {expected.grad_norm}")
        if not equal(bits(skipping), bits(other)):
            wrong.append(f"step {step} differs")
    return wrong


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_skipped_step_leaves_no_trace(num_ranks: int) -> None:
    for found in run_ranks(num_ranks, skips):
        assert len(found) == 9
        assert not any(found.values()), found


def test_a_step_that_plain_torch_skips_leaves_no_trace() -> None:
    (found,) = run_ranks(1, skips, True)
    assert len(found) == 2
    assert not any(found.values()), found
