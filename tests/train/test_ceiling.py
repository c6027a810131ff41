"""The ceiling is measured with the products of training; a CPU that is slow in bf16 is told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.attempt
from tests.ranks import run_ranks
from tests.train.test_pretrain import config
from tests.train.test_storage import warnings_of_a_run
from train.ceiling import SLOW, bf16_share, matmul_flops_per_second
from train.config import RunConfig
from train.world import World

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""As a CPU without instructions for bf16 computes."""
SHARE = "import torch, train.ceiling as c; print(c.bf16_share(torch.device('cpu')))"
CPU = torch.device("cpu")


def test_the_matmul_rate_is_a_rate() -> None:
    rate = matmul_flops_per_second(CPU, torch.float32, seconds=0.05, size=128)
    assert 1e8 < rate < 1e13


def test_the_ceiling_is_of_all_the_products_that_training_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layouts: set[tuple[bool, ...]] = set()
    mm = torch.mm

    def seen(*operands: torch.Tensor) -> torch.Tensor:
        layouts.add(tuple(operand.is_contiguous() for operand in operands))
        return mm(*operands)

    monkeypatch.setattr(torch, "mm", seen)
    matmul_flops_per_second(CPU, torch.bfloat16, seconds=0.01, size=16)
    assert layouts == {(True, False), (True, True), (False, True)}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86's")
def test_a_cpu_without_bf16_instructions_is_recognised() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARE], env=os.environ | AVX2, capture_output=True, check=True
    )
    assert 0 < float(done.stdout) < SLOW


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no instructions for bf16"
)
def test_a_cpu_with_bf16_instructions_is_recognised() -> None:
    assert bf16_share(CPU) > SLOW


def on_slow_cpu(world: World, made: RunConfig, run: Path, share: float) -> list[str]:
    """Train where bf16 has this share of the fp32 rate; what was said of it."""
    train.attempt.bf16_share = lambda device: share  # type: ignore[attr-defined]
    return [line for line in warnings_of_a_run(world, made, run) if "bf16" in line]


@pytest.mark.parametrize(
    ("precision", "share", "is_told"),
    [("bf16", 0.04, True), ("bf16", 0.9, False), ("fp32", 0.04, False)],
)
def test_training_says_when_another_precision_is_faster(
    dataset: Path, tmp_path: Path, precision: str, share: float, is_told: bool
) -> None:
    made = config(dataset, "steps=1", f"precision={precision}")
    advice = "this CPU multiplies bf16 at 0.04 of its fp32 rate: precision=fp32 trains faster"
    told, silent = run_ranks(2, on_slow_cpu, made, tmp_path, share)
    assert (told, silent) == ([advice] if is_told else [], [])
