"""What only a GPU can show, through real commands; `pytest -m gpu` runs it where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.test_pretrain import RECIPE, losses
from train.checkpoint import committed, step_folder
from train.metrics import read_metrics
from train.replicas import checksum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def pretrain(
    tmp_path: Path, dataset: Path, run: str, *arguments: str, hide_gpu: bool = False
) -> int:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    # The other tests' ranks are told to stay on the CPU.
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "launcher", "pretrain", str(recipe), f"data={dataset}"]
    command += ["--run", str(tmp_path / run), *arguments]
    return subprocess.run(command, env=environment, timeout=300).returncode


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_goes_on_where_it_stood(dataset: Path, tmp_path: Path, stage: int) -> None:
    layout = ("precision=bf16", f"zero.stage={stage}")
    assert pretrain(tmp_path, dataset, "whole", *layout) == 0
    assert pretrain(tmp_path, dataset, "parts", *layout, "--stop-at", "4") == 3
    assert pretrain(tmp_path, dataset, "parts", *layout) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [row[:3] for row in parts] == [row[:3] for row in whole]
    # The embedding's gradient is summed by atomic additions, whose order is not fixed.
    for row, wanted in zip(parts, whole, strict=True):
        assert row[3:] == pytest.approx(wanted[3:], rel=1e-3)


@pytest.mark.parametrize(
    "layout",
    [
        ("zero.stage=0",),
        ("zero.stage=1", "precision=bf16"),
        ("zero.stage=2", "precision=bf16", "model.activation_checkpointing=true"),
        ("zero.stage=3", "precision=bf16", "data.boundaries=attention"),
        ("zero.stage=0", "micro_batch=4", "train.reproducible=across_world_sizes"),
    ],
)
def test_deterministic_kernels_resume_and_repeat_to_the_bit(
    dataset: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    layout += ("train.deterministic=true",)
    assert pretrain(tmp_path, dataset, "whole", *layout) == 0
    assert pretrain(tmp_path, dataset, "parts", *layout, "--stop-at", "4") == 3
    assert pretrain(tmp_path, dataset, "parts", *layout) == 0
    assert pretrain(tmp_path, dataset, "twice", *layout, "guard.repeat_every=1") == 0
    assert all(row["repeat_seconds"] > 0 for row in read_metrics(tmp_path / "twice") if "lr" in row)
    for run in ("parts", "twice"):
        assert losses(tmp_path / run) == losses(tmp_path / "whole")
        assert state_of(tmp_path / run) == state_of(tmp_path / "whole")


def state_of(run: Path) -> dict[str, bytes]:
    """Every byte of the newest checkpoint's weights and moments."""
    folder = step_folder(run, committed(run)[0])
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_gpu_trains_what_a_cpu_trains(dataset: Path, tmp_path: Path) -> None:
    assert pretrain(tmp_path, dataset, "gpu") == 0
    assert pretrain(tmp_path, dataset, "cpu", hide_gpu=True) == 0
    gpu, cpu = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert [row[:3] for row in gpu] == [row[:3] for row in cpu]
    # fp32 on both, up to the order of sums; matrix products in TF32 would be off by 1e-3.
    assert [row[3] for row in gpu] == pytest.approx([row[3] for row in cpu], rel=2e-4)


def test_a_rank_stays_on_the_cores_near_its_gpu() -> None:
    program = (
        "import os, torch; from train.affinity import stay_near; "
        "near = stay_near(torch.device('cuda', 0)); assert near == os.sched_getaffinity(0), near"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_gpu_computes_the_checksum_that_a_cpu_does() -> None:
    tensor = torch.randn(5 * 2**22 + 3, generator=torch.Generator().manual_seed(1))
    for one in (tensor, tensor.bfloat16(), tensor[1:].half()):
        assert int(checksum(one.cuda())) == int(checksum(one))
