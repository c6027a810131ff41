"""Whole runs, interrupted twice, against the same runs that nothing happened to: byte for byte.

Eight layouts by default and all of them in soak: ZeRO 0-3, one, two or four ranks, one or four
micro-batches per step, with and without loader processes, fp32 and bf16. Runs of one world share
their process group, so each engine also follows others in its process.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from data.stream import SampleStream
from tests.data.tiny import documents, write_dataset
from tests.ranks import run_ranks
from tests.train.test_pretrain import config, losses, train_many
from train.checkpoint import open_checkpoint
from train.config import RunConfig
from train.metrics import read_metrics

# Ranks, ZeRO stage, micro-batches per step, loader processes, precision.
Layout = tuple[int, int, int, int, str]
STEPS, WARMUP, SAMPLES = 8, 3, 16
DEFAULT: list[Layout] = [
    (1, 0, 4, 0, "fp32"),
    (1, 1, 1, 2, "bf16"),
    (1, 2, 4, 2, "fp32"),
    (1, 3, 1, 0, "bf16"),
    (2, 1, 4, 0, "fp32"),
    (2, 2, 1, 2, "bf16"),
    (2, 3, 4, 0, "fp32"),
    (2, 0, 1, 2, "fp32"),
]
EVERY: list[Layout] = [
    layout
    for layout in product((1, 2, 4), range(4), (1, 4), (0, 2), ("fp32", "bf16"))
    if (layout[1], layout[4]) != (0, "bf16")
]
STOPS = [(1, WARMUP), (2, 5), (WARMUP, 4), (5, 7), (4, 6), (1, 2), (6, 7), (3, 5)]
"""Where each is interrupted: at the end of the warm-up, and of the epoch (test below), too."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose epoch ends within a run."""
    folder = tmp_path_factory.mktemp("small")
    texts = {"train/main": documents(26, seed=1), "val/main": documents(9, seed=2)}
    write_dataset(folder, texts)
    return folder


def made(small: Path, layout: Layout) -> RunConfig:
    ranks, stage, accumulation, workers, precision = layout
    return config(
        small,
        f"batch_tokens={SAMPLES * 32}",
        f"steps={STEPS}",
        f"schedule.warmup_steps={WARMUP}",
        f"zero.stage={stage}",
        f"micro_batch={SAMPLES // ranks // accumulation}",
        f"data.num_workers={workers}",
        f"precision={precision}",
        "zero.persistence_threshold=0",
        "eval.every=2",
        "eval.samples=4",
    )


def everything(run: Path) -> tuple[list[Any], dict[tuple[str, str], bytes], dict[str, float]]:
    """Rows, and every byte of the last checkpoint."""
    saved = open_checkpoint(run)
    assert saved.step == STEPS
    validated = [(r["step"], r["val_loss"]) for r in read_metrics(run) if "val_loss" in r]
    bytes_of = {(n, k): saved.read(n, k).tobytes() for n in saved.parameters for k in saved.keys}
    return [*losses(run), *validated], bytes_of, saved.scalars


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        pytest.param(1, DEFAULT, id="1-eight"),
        pytest.param(2, DEFAULT, id="2-eight"),
        *(pytest.param(n, EVERY, id=f"{n}-all", marks=pytest.mark.slow) for n in (1, 2, 4)),
    ],
)
def test_two_interruptions_leave_no_trace(
    small: Path, tmp_path: Path, ranks: int, layouts: list[Layout]
) -> None:
    chosen = [layout for layout in layouts if layout[0] == ranks]
    assert chosen
    plain = [(made(small, layout), tmp_path / f"plain-{layout}", None) for layout in chosen]
    for part in range(3):
        jobs = [
            (made(small, layout), tmp_path / f"cut-{layout}", [*STOPS[i % 8], None][part])
            for i, layout in enumerate(chosen)
        ]
        expected = ["complete" if part == 2 else "stopped"] * len(jobs)
        if part == 0:
            # Nobody waits twice for loader processes to start.
            ended = run_ranks(ranks, train_many, plain + jobs, timeout=1800)
            assert ended == [["complete"] * len(plain) + expected] * ranks
            continue
        assert run_ranks(ranks, train_many, jobs, timeout=1800) == [expected] * ranks
    for (_, reference, _), (_, run, _) in zip(plain, jobs, strict=True):
        assert everything(run) == everything(reference), run.name


def test_an_interruption_stands_at_the_end_of_an_epoch(small: Path) -> None:
    epoch = SampleStream(small, seq_len=32, seed=3).num_samples_per_epoch
    cut = {step for pair in STOPS for step in pair}
    assert epoch // SAMPLES in cut and epoch // SAMPLES + 1 in cut, epoch / SAMPLES
    assert epoch % SAMPLES, "a step that has samples of both"
