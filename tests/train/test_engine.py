"""DeepSpeed at every stage and world size takes the step that plain torch takes."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.toy import Toy, loss_sum, make_engine, micro_batches, run_steps
from train.config import ConfigError, JobConfig
from train.engine import check_precision
from train.plain import PlainEngine
from train.settings import OptimConfig
from train.world import World
from train.zero_state import PRIVATE

SIZE = 12
Rows = list[tuple[float, float]]


def job(precision: str, stage: int, threshold: int = 100_000) -> JobConfig:
    return JobConfig.model_validate(
        {
            "precision": precision,
            "zero": {"stage": stage, "persistence_threshold": threshold},
            "optim": {"clip_norm": 0.5},
        }
    )


def plain_rows(world: World, precision: str, micro_batch: int) -> Rows:
    engine, accumulation = make_engine(
        job(precision, 1), world, size=SIZE, micro_batch=micro_batch, plain=True
    )
    return run_steps(
        engine, world, range(1, 7), size=SIZE, micro_batch=micro_batch, accumulation=accumulation
    )


def all_stages(world: World) -> dict[str, Rows]:
    """Rows of every stage, precision and accumulation of this world; and of PlainEngine where it
    can run.
    """
    found: dict[str, Rows] = {}
    for micro_batch in (SIZE // world.size if SIZE % world.size == 0 else 3, 2):
        for precision, stage in [("fp32", s) for s in range(4)] + [("bf16", s) for s in (1, 2, 3)]:
            engine, accumulation = make_engine(
                job(precision, stage, 0), world, size=SIZE, micro_batch=micro_batch
            )
            found[f"{precision} z{stage} b{micro_batch}"] = run_steps(
                engine,
                world,
                range(1, 7),
                size=SIZE,
                micro_batch=micro_batch,
                accumulation=accumulation,
            )
        if world.size == 1:
            for precision in ("fp32", "bf16"):
                found[f"plain {precision} b{micro_batch}"] = plain_rows(
                    world, precision, micro_batch
                )
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Rows]:
    return run_ranks(1, all_stages)[0]  # type: ignore[no-any-return]


# fp32: the only freedom is the order of additions in the reduction, 1e-6 relative per step.
# bf16: weights are rounded to 8 bits of mantissa (4e-3), and another order of additions can flip a
# rounding.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_stage_equals_plain_torch(reference: dict[str, Rows], num_ranks: int) -> None:
    found = reference if num_ranks == 1 else run_ranks(num_ranks, all_stages)[0]
    assert len(found) >= 14
    for name, rows in found.items():
        precision = "fp32" if "fp32" in name else "bf16"
        expected = reference[f"plain {precision} b{SIZE}"]
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, rel=TOLERANCE[precision]), name
        assert rows[-1][0] < rows[0][0] - 0.1, f"{name} does not learn"


def test_one_sgd_step_is_w_minus_lr_times_gradient(world_of_one: World) -> None:
    """The definition: gradient of the mean loss over valid targets, however the batch is cut."""
    module = Toy().double()
    engine = PlainEngine(
        module,
        job("fp32", 1).model_copy(update={"optim": OptimConfig(clip_norm=0.0)}),
        world_of_one,
        make_optimizer=lambda module, _: torch.optim.SGD(module.parameters(), lr=1.0),
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def exact(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = module(batch["x"])
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["y"].flatten(), reduction="sum"
        )

    whole = next(micro_batches(1, SIZE, world_of_one, micro_batch=SIZE, accumulation=1))
    num_valid = int((whole["y"] != -100).sum())
    for part in micro_batches(1, SIZE, world_of_one, micro_batch=5, accumulation=3):
        engine.forward_backward(part, num_valid=num_valid, loss_sum=exact)
    engine.step(lr=0.1)

    other = Toy().double()
    (exact(other, whole) / num_valid).backward()
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None
        updated = before[name] - 0.1 * parameter.grad
        found = dict(module.named_parameters())[name]
        # float64, so only the order of 60 additions differs.
        torch.testing.assert_close(found.detach(), updated, rtol=1e-12, atol=1e-14)


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision='fp16' is refused on a CPU"):
        check_precision("fp16", torch.device("cpu"))


def missing_attributes(world: World) -> list[str]:
    """Of DeepSpeed's optimizers, after a forward pass of each; and of the module whose stand-in
    keeps engines from loading torch's compiler.
    """
    missing = []
    for precision, stage in (("bf16", 1), ("fp32", 1), ("fp32", 3)):
        engine, _ = make_engine(job(precision, stage), world, size=2, micro_batch=2)
        optimizer = engine.engine.optimizer  # type: ignore[attr-defined]
        kind = type(optimizer).__name__
        missing += [f"{kind}.{name}" for name in PRIVATE[kind] if not hasattr(optimizer, name)]
        batch = next(micro_batches(1, 2, world, micro_batch=2, accumulation=1))
        assert loss_sum(engine.module, batch) > 0
    if "torch._inductor.compile_fx" in sys.modules:
        missing.append("compiler.compile")
    return missing


def test_deepspeed_still_has_the_attributes_that_checkpoints_read() -> None:
    # In a process of its own: DeepSpeed keeps the groups of the first world that it meets.
    assert run_ranks(1, missing_attributes) == [[]], "this DeepSpeed release lost them"
