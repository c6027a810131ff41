"""Which layouts of a run there are, which fit, and which of those is fastest.

A layout is micro_batch, zero.stage and model.activation_checkpointing. Micro-batches are the
smallest of every number of passes: a larger one would add dummies to as many passes. Not only the
divisors of a rank's share, which has no others than 1 and 43 where 24 ranks share 1,024 sequences:
4 passes of 11 are 13 % faster than 43 of 1. Stages are those that the run may take: bf16 has no
stage 0, and `across_world_sizes` has nothing else and a fixed micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from launcher.gpus import Gpu
from launcher.memory import Change, changed, memory_per_gpu, settings
from launcher.step_time import Layout, step_time
from train.config import RunConfig


@dataclass(frozen=True)
class Choice:
    """A layout on some nodes, and what it costs."""

    nodes: int
    ranks: int
    micro_batch: int
    accumulation: int
    stage: int
    activation_checkpointing: bool
    memory_bytes: float
    step_seconds: float

    def change(self) -> Change:
        """The keys that make a run take this layout."""
        return {
            "micro_batch": self.micro_batch,
            "zero.stage": self.stage,
            "model.activation_checkpointing": self.activation_checkpointing,
        }

    def overrides(self) -> list[str]:
        """The same as a command line takes it."""
        return settings(self.change())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overrides": self.overrides()}


def layout_of(config: RunConfig, *, nodes: int, gpus_per_node: int) -> Layout:
    """How a run lies on these GPUs."""
    micro_batch, accumulation = config.layout(config.batch_samples, num_ranks=nodes * gpus_per_node)
    return Layout(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        micro_batch=micro_batch,
        accumulation=accumulation,
        stage=config.zero.stage,
        precision=config.precision,
        is_masked=config.data.boundaries == "attention",
        overlap=config.deepspeed.get("zero_optimization", {}).get("overlap_comm"),
    )


def best_layout(config: RunConfig, *, nodes: int, gpus_per_node: int, gpu: Gpu) -> Choice | None:
    """The fastest that fits, of equally fast ones the smallest; None where none fits."""
    found = (
        _choice(changed(config, change), nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu)
        for change in _changes(config, nodes * gpus_per_node)
    )
    fitting = [choice for choice in found if choice.memory_bytes <= gpu.memory_bytes]
    return min(fitting, key=lambda choice: (choice.step_seconds, choice.memory_bytes), default=None)


def by_nodes(
    config: RunConfig, *, nodes: int, gpus_per_node: int, gpu: Gpu
) -> Iterator[tuple[int, Choice | None]]:
    """The best layout on 1, 2, 4, ... and on all `nodes`, as far as every rank has a sequence."""
    counts = {1 << power for power in range(nodes.bit_length())} | {nodes}
    for count in sorted(counts):
        if count * gpus_per_node <= config.batch_samples:
            yield count, best_layout(config, nodes=count, gpus_per_node=gpus_per_node, gpu=gpu)


def _choice(config: RunConfig, *, nodes: int, gpus_per_node: int, gpu: Gpu) -> Choice:
    layout = layout_of(config, nodes=nodes, gpus_per_node=gpus_per_node)
    return Choice(
        nodes=nodes,
        ranks=layout.ranks,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        stage=layout.stage,
        activation_checkpointing=config.model.activation_checkpointing,
        memory_bytes=memory_per_gpu(config, layout.ranks),
        step_seconds=step_time(config.model, config.seq_len, layout=layout, gpu=gpu).total,
    )


def _changes(config: RunConfig, ranks: int) -> Iterator[Change]:
    share = -(-config.batch_samples // ranks)
    sizes = sorted({-(-share // passes) for passes in range(1, share + 1)})
    stages = [1, 2, 3] if config.precision != "fp32" else [0, 1, 2, 3]
    if config.train.reproducible == "across_world_sizes":
        sizes, stages = [config.micro_batch], [0]
    for size in sizes:
        for stage in stages:
            for again in (False, True):
                yield {
                    "micro_batch": size,
                    "zero.stage": stage,
                    "model.activation_checkpointing": again,
                }
