"""The engine that a config asks for, on a machine told how much its numbers may wander."""

from __future__ import annotations

import torch

from train.config import JobConfig
from train.engine import DeepSpeedEngine, Engine
from train.exact import ExactEngine
from train.settings import TrainConfig
from train.world import World


def build_engine(
    module: torch.nn.Module,
    config: JobConfig,
    world: World,
    *,
    micro_batch: int,
    accumulation: int,
) -> Engine:
    """Collective. An engine around a module, for so many sequences per forward pass and so many
    forward passes per step. `settle` comes first.
    """
    if config.train.reproducible == "across_world_sizes":
        assert micro_batch == config.micro_batch, "the config holds it fixed"
        return ExactEngine(module, config, world, accumulation=accumulation)
    return DeepSpeedEngine(
        module, config, world, micro_batch=micro_batch, accumulation=accumulation
    )


def settle(train: TrainConfig, device: torch.device) -> None:
    """Choose kernels that repeat themselves, where a config asks for it; of this process, for good.

    A kernel that has no such form raises torch's RuntimeError, which names it. `join_world` has set
    what the libraries below torch read from the environment.
    """
    if not train.repeats:
        return
    torch.use_deterministic_algorithms(True)
    # Clearing every new tensor finds reads of what was never written; it changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if device.type == "cpu" and train.reproducible == "across_world_sizes":
        # How a sum is cut depends on the threads, and they on how many ranks share a machine.
        torch.set_num_threads(1)
