"""What the search for silent corruption costs (train/replicas.py, train/repeat.py), as a share of
the training.

Two ranks, the job of train_speed: 10.65 M parameters and 4,096 tokens a step, which is little: the
check reads what the ranks hold alike, whatever a step trains on, so larger batches make its share
smaller. A step that is computed twice takes about twice as long; its hashes weigh the more, the
smaller it is. Before a check the passes are made, so that there is a gradient to look at. All are
interleaved, and medians are reported, of the slower rank, in wall time: both wait for the other
rank.

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
from typing import Any

import torch

from tests.benchmarks.bars import Bar, judge
from tests.benchmarks.train_speed import build, forward_backward, random_batch
from tests.ranks import run_ranks
from train.config import Precision
from train.engine import Engine
from train.repeat import Passes, twice
from train.replicas import check_replicas
from train.settings import GuardConfig
from train.world import World

RANKS, ROUNDS, TRIES = 2, 5, 5
CASES: list[tuple[int, Precision]] = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
MOST = 0.005


def measure(world: World, run: Path) -> list[tuple[float, float, float, int]]:
    """Median seconds of a step, of a check, and of what a step takes more that is computed twice,
    and the bytes that a check reads, of each case.
    """
    torch.set_num_threads(1)
    found = []
    for stage, precision in CASES:
        engine = build(precision, world, stage=stage)
        batch = random_batch()

        def passes(engine: Engine = engine, batch: Any = batch) -> Passes:
            return [(forward_backward(engine, world, batch), torch.zeros(2))]

        once, checks, more = [], [], []
        for number in range(1 + ROUNDS):
            computed = _timed(world, passes)
            engine.grad_norm()
            check = partial(check_replicas, engine, world, run, step=1, attempt=1)
            checks += [_timed(world, check) for _ in range(TRIES)]
            size = sum(tensor.numel() * tensor.element_size() for _, tensor in engine.replicas())
            updated = _timed(world, partial(engine.step, 1e-3))
            repeat = partial(twice, engine, world, run, passes, passes, step=1, attempt=1)
            repeated = _timed(world, repeat)
            engine.step(1e-3)
            if number:
                once.append(computed + updated)
                more.append(repeated - computed)
        found.append((*map(statistics.median, (once, checks[TRIES:], more)), size))
    return found


def _timed(world: World, work: Callable[[], object]) -> float:
    world.barrier()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Print the figures; exit code 1 names a bar that is missed."""
    config = GuardConfig()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        ranks = run_ranks(RANKS, measure, Path(name), timeout=900)
    bars = []
    for number, (stage, precision) in enumerate(CASES):
        seconds, check, more, size = (max(row[number][i] for row in ranks) for i in range(4))
        shares = check / (config.check_every * seconds), more / (config.repeat_every * seconds)
        print(
            f"ZeRO-{stage} {precision}: step {1e3 * seconds:7.1f} ms, check {1e3 * check:6.2f} ms "
            f"of {size / 1e6:5.1f} MB, every {config.check_every} steps: {shares[0]:.4%} of the "
            f"training; computed twice {1e3 * more:7.1f} ms more, every {config.repeat_every}: "
            f"{shares[1]:.4%}"
        )
        bars.append(Bar(f"both of ZeRO-{stage}, share of the training", sum(shares), below=MOST))
    sys.exit(judge(bars))


if __name__ == "__main__":
    main()
