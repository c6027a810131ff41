"""What an attempt trains: all that pretraining and fine-tuning differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.phases import RunPhase
from train.config import JobConfig
from train.job import Task


@dataclass(frozen=True)
class Work:
    """What an attempt trains, with every value resolved."""

    config: JobConfig
    task: Task
    module: Callable[[], torch.nn.Module]
    """Makes the module with its initial weights."""
    steps: int
    micro_batch: int
    accumulation: int
    tokenizer: Path | None = None
    """File or folder that is kept with the run, so that export needs nothing else."""
    flops_per_token: float = 0.0
    identity: dict[str, Any] = field(default_factory=dict)
    """What the run was started with, such as the hashes of data and tokenizer; it must stay."""
    phase: RunPhase | None = None
    """What the run goes on with, where runs have phases."""
    allow_change: tuple[str, ...] = ()
    """Keys that differ from the run's on purpose."""
