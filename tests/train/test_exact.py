"""`train.reproducible = "across_world_sizes"`: the same bits at any number of ranks, and the same
run through changes of it.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.test_pretrain import config, losses, train_many
from tests.train.toy import Toy, global_batch, loss_sum, micro_batches, run_steps
from train.build import settle
from train.checkpoint import open_checkpoint
from train.config import ConfigError, JobConfig, RunConfig
from train.exact import FRACTION_BITS, ExactEngine
from train.metrics import read_metrics
from train.plain import PlainEngine
from train.run import open_run
from train.settings import TrainConfig
from train.world import World

SIZE, MICRO = 12, 1
ASKED = ("train.reproducible=across_world_sizes", "zero.stage=0", "micro_batch=2")


def job(precision: str = "fp32") -> JobConfig:
    return JobConfig.model_validate(
        {
            "precision": precision,
            "micro_batch": MICRO,
            "zero": {"stage": 0},
            "train": {"reproducible": "across_world_sizes"},
            "optim": {"clip_norm": 0.5},
        }
    )


def toy_engine(world: World, precision: str = "fp32") -> tuple[ExactEngine, int]:
    settle(job(precision).train, world.device)
    accumulation = SIZE // MICRO // world.size
    return ExactEngine(Toy(), job(precision), world, accumulation=accumulation), accumulation


def toy_numbers(world: World) -> dict[str, Any]:
    """Rows and final state, as bytes, of six steps in both precisions."""
    found: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        engine, accumulation = toy_engine(world, precision)
        rows = run_steps(
            engine, world, range(1, 7), size=SIZE, micro_batch=MICRO, accumulation=accumulation
        )
        state = [
            (key, t.detach().float().numpy().tobytes())
            for flat in engine.flats()
            for key, t in flat.tensors().items()
        ]
        found[precision] = rows, state
    return found


@pytest.fixture(scope="module")
def on_one_rank() -> dict[str, Any]:
    return run_ranks(1, toy_numbers)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_world_comes_to_the_same_bits(on_one_rank: dict[str, Any], num_ranks: int) -> None:
    for found in run_ranks(num_ranks, toy_numbers):
        assert found == on_one_rank
    rows, _ = on_one_rank["fp32"]
    assert rows[-1][0] < rows[0][0] - 0.1, "it learns"


def beside_plain(world: World) -> list[list[tuple[float, float]]]:
    engine, accumulation = toy_engine(world)
    layout = {"size": SIZE, "micro_batch": MICRO, "accumulation": accumulation}
    both = (engine, PlainEngine(Toy(), job(), world))
    return [run_steps(one, world, range(1, 7), **layout) for one in both]


def test_the_sum_is_the_gradient() -> None:
    ((rows, expected),) = run_ranks(1, beside_plain)
    # Each term is rounded to 2^-44, against 2^-24 of the sum in fp32.
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=2e-6)


def bad_terms(world: World) -> list[tuple[float, float]]:
    """Norms of a step in which rank 1 has one bad micro-batch, and of the step after it."""
    found = []
    for spoil in (math.nan, math.inf, 2.0**60):
        engine, accumulation = toy_engine(world)
        num_valid = int((global_batch(1, SIZE)["y"] != -100).sum())
        norms = []
        for step in (1, 2):
            batches = micro_batches(step, SIZE, world, micro_batch=MICRO, accumulation=accumulation)
            for micro, batch in enumerate(itertools.islice(batches, accumulation)):
                is_bad = (step, micro, world.rank) == (1, 0, 1)
                factor = spoil if is_bad else 1.0
                engine.forward_backward(
                    batch,
                    num_valid=num_valid,
                    loss_sum=lambda m, b, factor=factor: loss_sum(m, b) * factor,
                )
            norms.append(engine.grad_norm())
            engine.skip()
        found.append((norms[0], norms[1]))
    return found


def test_a_bad_term_on_one_rank_is_bad_on_all_and_gone_after_the_skip() -> None:
    for found in run_ranks(2, bad_terms):
        for norm, after in found:
            assert norm == math.inf
            assert 0 < after < 100
    assert 2.0 ** (62 - FRACTION_BITS) < 2.0**60, "a term that does not fit"


def reproducible(dataset: Path, *more: str) -> RunConfig:
    sizes = ("batch_tokens=512", "steps=6", "eval.every=3", "eval.samples=6")
    return config(dataset, *sizes, *ASKED, *more)


def everything(run: Path) -> tuple[list[Any], dict[tuple[str, str], bytes]]:
    saved = open_checkpoint(run)
    rows = [(r["step"], r["val_loss"]) for r in read_metrics(run) if "val_loss" in r]
    return [*losses(run), *rows], {
        (n, k): saved.read(n, k).tobytes() for n in saved.parameters for k in saved.keys
    }


def runs(dataset: Path, folder: Path, num_ranks: int) -> list[tuple[RunConfig, Path, int | None]]:
    return [
        (reproducible(dataset), folder / f"fp32-{num_ranks}", None),
        (reproducible(dataset, "precision=bf16"), folder / f"bf16-{num_ranks}", None),
        (config(dataset, "batch_tokens=512", "steps=6", "zero.stage=0", "micro_batch=2"),
         folder / f"deepspeed-{num_ranks}", None),
    ]  # fmt: skip


def test_runs_are_the_same_at_any_number_of_ranks_and_through_changes_of_it(
    dataset: Path, tmp_path: Path
) -> None:
    for num_ranks in (1, 2, 4):
        run_ranks(num_ranks, train_many, runs(dataset, tmp_path, num_ranks))
    for num_ranks, stop_at in ((2, 2), (4, 4), (1, None)):
        walk = [(reproducible(dataset), tmp_path / "walk", stop_at)]
        run_ranks(num_ranks, train_many, walk)
    expected = everything(tmp_path / "fp32-1")
    assert expected[0][5][3] < expected[0][0][3] - 0.1, "it learns"
    for name in ("fp32-2", "fp32-4", "walk"):
        assert everything(tmp_path / name) == expected, name
    for num_ranks in (2, 4):
        assert everything(tmp_path / f"bf16-{num_ranks}") == everything(tmp_path / "bf16-1")
    # What the promise is for: without it the last digits follow the number of ranks.
    assert everything(tmp_path / "deepspeed-1") != everything(tmp_path / "deepspeed-2")


def test_the_micro_batch_of_a_reproducible_run_stays(dataset: Path, tmp_path: Path) -> None:
    open_run(tmp_path / "run", reproducible(dataset), {})
    open_run(tmp_path / "run", reproducible(dataset, "checkpoint.every=1"), {})
    with pytest.raises(ConfigError, match=r"micro_batch: 2 in the run, 1 now"):
        open_run(tmp_path / "run", reproducible(dataset, "micro_batch=1"), {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("zero.stage=1",), r"with zero\.stage=1 is refused: .* write zero\.stage=0"),
        (("micro_batch=0",), r"needs the same sequences .* write micro_batch=N"),
        (("deepspeed.prescale_gradients=true",), r"\[deepspeed\] holds prescale_gradients"),
    ],
)
def test_what_cannot_keep_the_promise_is_refused(
    dataset: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"train\.reproducible='across_world_sizes' .*{message}"):
        reproducible(dataset, *overrides)


def chosen_kernels(world: World) -> tuple[bool, bool, int]:
    before = torch.are_deterministic_algorithms_enabled()
    settle(TrainConfig(deterministic=True), world.device)
    after = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    settle(TrainConfig(reproducible="across_world_sizes"), world.device)
    return before, after, torch.get_num_threads()


def test_kernels_that_repeat_themselves_are_chosen_where_asked_for() -> None:
    assert run_ranks(1, chosen_kernels) == [(False, True, 1)]
