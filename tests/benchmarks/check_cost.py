"""What the search for silent corruption costs (train/replicas.py), as a share of the training.

Two ranks, the job of train_speed: 10.65 M parameters and 4,096 tokens a step, which is little: the
check reads what the ranks hold alike, whatever a step trains on, so larger batches make the share
smaller. Steps and checks are interleaved, and medians are reported, of the slower rank, in wall
time: both wait for the other rank.

    .venv/bin/python -m tests.benchmarks.check_cost
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks.bars import Bar, judge
from tests.benchmarks.train_speed import build, step
from tests.ranks import run_ranks
from train.config import Precision
from train.replicas import check_replicas
from train.settings import GuardConfig
from train.world import World

RANKS, ROUNDS, TRIES = 2, 5, 5
CASES: list[tuple[int, Precision]] = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
MOST = 0.005


def measure(world: World, run: Path) -> list[tuple[float, float, int]]:
    """Median seconds of a step and of a check, and the bytes that it reads, of each case."""
    torch.set_num_threads(1)
    found = []
    for stage, precision in CASES:
        engine = build(precision, world, stage=stage)
        step(engine, world)
        check_replicas(engine, world, run, step=0, attempt=1)
        steps, checks = [], []
        for _ in range(ROUNDS):
            steps.append(_timed(world, partial(step, engine, world)))
            check = partial(check_replicas, engine, world, run, step=1, attempt=1)
            checks += [_timed(world, check) for _ in range(TRIES)]
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in engine.replicas())
        found.append((statistics.median(steps), statistics.median(checks), size))
    return found


def _timed(world: World, work: Callable[[], None]) -> float:
    world.barrier()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Print the figures; exit code 1 names a bar that is missed."""
    every = GuardConfig().check_every
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        ranks = run_ranks(RANKS, measure, Path(name), timeout=900)
    bars = []
    for number, (stage, precision) in enumerate(CASES):
        seconds, check, size = (max(row[number][i] for row in ranks) for i in range(3))
        share = check / (every * seconds)
        figures = (
            f"step {1e3 * seconds:7.1f} ms, check {1e3 * check:6.2f} ms of {size / 1e6:5.1f} MB"
        )
        print(
            f"ZeRO-{stage} {precision}: {figures}, every {every} steps: {share:.4%} of the training"
        )
        bars.append(Bar(f"check of ZeRO-{stage}, share of the training", share, below=MOST))
    sys.exit(judge(bars))


if __name__ == "__main__":
    main()
