"""What the training loop works with: a task, and all that a rank has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from train.config import JobConfig
from train.engine import Batch, Engine
from train.guard import Guard
from train.metrics import Metrics
from train.pace import Pace
from train.saver import Saver
from train.stop import StopRequest
from train.timing import Timing
from train.world import World


class Task(Protocol):
    """What is trained on, and what its loss is. Steps count from 1; samples from 0."""

    unit: str
    """What a target is called on the progress line."""

    def num_valid(self, step: int) -> int | None:
        """Targets of this step over all ranks, known without asking them; None when only the
        batches tell.
        """

    def samples(self, step: int) -> tuple[int, int]:
        """Global sample indices [first, last) of this step."""

    def micro_batches(
        self, first_step: int, last_step: int, *, rank: int, num_ranks: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches of the steps first_step .. last_step, each with its
        `data_hash`.
        """

    def reading(self, step: int) -> str:
        """What is read for this step, and from where."""

    def loss_sum(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Sum of the losses of the valid targets of a micro-batch, fp32 scalar."""

    def validate(
        self, module: torch.nn.Module, world: World, *, is_over: Callable[[], bool]
    ) -> dict[str, float]:
        """Collective. Metrics on held-out data, at least `val_loss`; empty where there is none, and
        when `is_over`, which is asked before every batch and is collective, too.
        """

    def data_state(self, step: int) -> dict[str, Any]:
        """Position and identity of the data after this step; goes into checkpoints."""

    def check_data_state(self, state: dict[str, Any]) -> None:
        """DataError when a checkpoint's data is not this data."""


@dataclass
class Job:
    """Everything that the loop works with, on one rank."""

    task: Task
    engine: Engine
    world: World
    config: JobConfig
    run: Path
    metrics: Metrics
    saver: Saver
    pace: Pace
    timing: Timing
    guard: Guard
    """Decides which steps are taken."""
    steps: int
    accumulation: int
    attempt: int
    first_step: int
    tokens: int
    """Targets trained on before first_step."""
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    """Measured FLOP/s of all ranks together; 0 leaves MFU out."""
    stop_at: int | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    resumed_from: int | None = None
    quarantined: int | None = None
    """Samples before first_step that touched damage and trained nothing; None: nobody counted."""
    told_save: int | None = None
    """The step whose save stands in the metrics."""
    is_replay: bool = False
    """Steps that were taken before are computed again: no event is recorded."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What every checkpoint of the run carries, such as the hashes of data and tokenizer."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know together of a step, before it is taken."""

    data_hash: str
    quarantined: int
    stop: bool
    save: bool
    is_written: bool
    """Whether the checkpoint in flight is on disk everywhere."""
    is_bad: bool
    """Whether a rank finds that the step must not be taken."""
    is_high: bool
    """Whether a rank finds its loss out of bounds."""
