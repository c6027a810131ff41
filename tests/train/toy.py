"""A small module with everything that sharding can get wrong: a tied matrix, vectors, odd sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from train.config import JobConfig
from train.engine import Batch, DeepSpeedEngine, Engine
from train.plain import PlainEngine
from train.saver import Saver
from train.settings import CheckpointConfig
from train.world import World

VOCAB, WIDTH, LENGTH = 31, 12, 6


class Toy(nn.Module):
    """Predicts the next of LENGTH symbols; the head is the embedding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)
        self.narrow = nn.Linear(3 * WIDTH, WIDTH)
        with torch.no_grad():
            self.embedding.weight.mul_(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(x)
        hidden = hidden + self.narrow(torch.relu(self.wide(self.norm(hidden))))
        return hidden @ self.embedding.weight.T


def loss_sum(module: nn.Module, batch: Batch) -> torch.Tensor:
    logits = module(batch["x"]).float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["y"].flatten(), ignore_index=-100, reduction="sum"
    )


def global_batch(step: int, size: int) -> Batch:
    """A learnable sequence: the next symbol is 3 * symbol + 1; some targets are masked."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, VOCAB, (size, LENGTH), generator=generator)
    y = (3 * x + 1) % VOCAB
    y[torch.rand(y.shape, generator=generator) < 0.2] = -100
    return {"x": x, "y": y}


def micro_batches(
    step: int, size: int, world: World, *, micro_batch: int, accumulation: int
) -> Iterator[Batch]:
    """This rank's share of a global batch, dummies where it does not divide."""
    whole = global_batch(step, size)
    for micro in range(accumulation):
        first = (micro * world.size + world.rank) * micro_batch
        part = {key: value[first : first + micro_batch] for key, value in whole.items()}
        missing = micro_batch - len(part["x"])
        yield {
            "x": torch.cat([part["x"], torch.zeros(missing, LENGTH, dtype=torch.int64)]),
            "y": torch.cat([part["y"], torch.full((missing, LENGTH), -100)]),
        }


def make_engine(
    config: JobConfig,
    world: World,
    *,
    size: int,
    micro_batch: int,
    plain: bool = False,
    seed: int = 0,
) -> tuple[Engine, int]:
    """An engine around a Toy, and its accumulation for a global batch of `size`."""
    accumulation = -(-size // (world.size * micro_batch))
    if plain:
        return PlainEngine(Toy(seed), config, world), accumulation
    return (
        DeepSpeedEngine(
            Toy(seed), config, world, micro_batch=micro_batch, accumulation=accumulation
        ),
        accumulation,
    )


def run_steps(
    engine: Engine, world: World, steps: range, *, size: int, micro_batch: int, accumulation: int
) -> list[tuple[float, float]]:
    """(mean loss over the global batch, gradient norm) of each step."""
    rows = []
    for step in steps:
        num_valid = int((global_batch(step, size)["y"] != -100).sum())
        batches = micro_batches(
            step, size, world, micro_batch=micro_batch, accumulation=accumulation
        )
        total = torch.zeros((), dtype=torch.float64)
        for batch in itertools.islice(batches, accumulation):
            total += engine.forward_backward(batch, num_valid=num_valid, loss_sum=loss_sum).double()
        stats = engine.step(lr=0.01)
        rows.append((float(world.sum(total)) / num_valid, stats.grad_norm))
    return rows


def save(engine: Engine, world: World, run: Path, step: int) -> None:
    """Commit a checkpoint."""
    saver = Saver(engine, world, run, config=CheckpointConfig(background=False))
    saver.save(step, {})
