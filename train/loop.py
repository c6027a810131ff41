"""The training loop: one paragraph, shared by pretraining and fine-tuning.

A step is a pure function of the weights and the samples [first, last): the loop advances the data
position only after the optimizer step, so a checkpoint never counts a sample that was fetched but
not trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from data.config import DataError
from model.loss import IGNORED
from train.config import JobConfig
from train.engine import Batch, Engine, StepStats
from train.metrics import Metrics, Row
from train.ownership import Ownership
from train.run import Outcome
from train.schedule import learning_rate
from train.state import save_checkpoint
from train.stop import StopRequest
from train.world import World

log = logging.getLogger(__name__)


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

    def loss_sum(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Sum of the losses of the valid targets of a micro-batch, fp32 scalar."""

    def validate(self, module: torch.nn.Module, world: World) -> dict[str, float]:
        """Collective. Metrics on held-out data, at least `val_loss`; empty where there is none."""

    def data_state(self, step: int) -> dict[str, Any]:
        """Position and identity of the data after this step; goes into checkpoints."""

    def check_data_state(self, state: dict[str, Any]) -> None:
        """DataError when a checkpoint's data is not this data."""


class NonFiniteLoss(ValueError):
    """The loss or the gradient is NaN or infinite; nothing of the step is saved."""

    exit_code = 1


@dataclass
class Job:
    """Everything that the loop works with, on one rank."""

    task: Task
    engine: Engine
    world: World
    config: JobConfig
    run: Path
    metrics: Metrics
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
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What every checkpoint of the run carries, such as the hashes of data and tokenizer."""
    owner: Ownership | None = None
    """Rank 0's claim to the run; without it nothing is committed."""


def train(job: Job) -> tuple[Outcome, int]:
    """Collective. Train to the end or to a planned stop; returns ("complete" or "stopped", last
    completed step).
    """
    job.engine.module.train()
    _say_when_nothing_is_saved(job)
    batches = job.task.micro_batches(
        job.first_step, job.steps, rank=job.world.rank, num_ranks=job.world.size
    )
    if job.first_step == 1:
        validate(job, step=0)
    for step in range(job.first_step, job.steps + 1):
        started = time.perf_counter()
        _seed(job.config.seed, step, job.world.rank)
        found: Iterator[Batch] = itertools.islice(batches, job.accumulation)
        num_valid = job.task.num_valid(step)
        if num_valid is None:
            found, num_valid = _counted(job, step, found)
        done = [_micro_step(job, batch, num_valid) for batch in found]
        lr = learning_rate(
            step,
            steps=job.steps,
            warmup_steps=job.config.schedule.warmup_steps,
            optim=job.config.optim,
        )
        stats = job.engine.step(lr)
        stop = _record(
            job, step, lr=lr, stats=stats, done=done, num_valid=num_valid, started=started
        )
        if _due(job.config.eval.every, step) or step == job.steps:
            validate(job, step=step)
        if _due(job.config.checkpoint.every, step) or step == job.steps or stop:
            save(job, step)
        if stop and step < job.steps:
            return "stopped", step
    return "complete", job.steps


def validate(job: Job, *, step: int) -> None:
    """Collective. Write a validation row."""
    job.engine.module.eval()
    with torch.no_grad():
        found = job.task.validate(job.engine.module, job.world)
    job.engine.module.train()
    if found:
        job.metrics.write({"step": step, "attempt": job.attempt, "tokens": job.tokens, **found})


def save(job: Job, step: int) -> None:
    """Collective. Commit a checkpoint of this step."""
    state = {
        "step": step,
        "tokens": job.tokens,
        **_quarantine(job),
        "attempt": job.attempt,
        "data": job.task.data_state(step),
        **job.identity,
    }
    with job.world.together("writing metrics.jsonl"):
        # No checkpoint is ahead of the rows that lead to it.
        job.metrics.sync()
    save_checkpoint(
        job.engine,
        job.world,
        job.run,
        step=step,
        state=state,
        keep=job.config.checkpoint.keep,
        owner=job.owner,
    )


def _counted(job: Job, step: int, batches: Iterator[Batch]) -> tuple[Iterator[Batch], int]:
    """Collective. The step's micro-batches, all of them read, and their targets over all ranks.

    Costs one reduction of 8 bytes between the hosts, and memory for the step's token ids.
    """
    found = list(batches)
    own = sum(int((batch["labels"] != IGNORED).sum()) for batch in found)
    num_valid = int(job.world.sum(torch.tensor(own)))
    if num_valid == 0:
        raise DataError(
            f"step {step}: samples {list(job.task.samples(step))} hold no target; every document "
            "in them is empty, or every one touches damage. Look at them: headrace data inspect "
            "DATASET "
            f"--step {step} --run {job.run}"
        )
    return iter(found), num_valid


def _micro_step(job: Job, batch: Batch, num_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a micro-batch, and its hash with its count of quarantined samples."""
    if "quarantined" in batch:
        job.quarantined = job.quarantined or 0
    counts = [batch.pop("data_hash"), batch.pop("quarantined", torch.tensor(0))]
    loss = job.engine.forward_backward(batch, num_valid=num_valid, loss_sum=job.task.loss_sum)
    return loss, torch.stack(counts)


def _quarantine(job: Job) -> dict[str, int]:
    """The cumulative count, for a row or a checkpoint; nothing where nobody counts."""
    return {} if job.quarantined is None else {"quarantined": job.quarantined}


def _record(
    job: Job,
    step: int,
    *,
    lr: float,
    stats: StepStats,
    done: list[tuple[torch.Tensor, torch.Tensor]],
    num_valid: int,
    started: float,
) -> bool:
    """Write the row of a step; returns whether the ranks agreed to stop after it."""
    asked = job.stop.reason is not None or (job.stop_at is not None and step >= job.stop_at)
    # All ranks stop to save, and there learn why rank 0 could not write the row before.
    asked = asked or job.metrics.failure is not None
    loss_sum = job.world.sum(torch.stack([loss for loss, _ in done]).double().sum())
    own = torch.stack([counts for _, counts in done]).sum(dim=0)
    counts = job.world.sum(torch.cat([own, torch.tensor([int(asked)])]))
    loss = float(loss_sum) / num_valid
    if not (math.isfinite(loss) and math.isfinite(stats.grad_norm)):
        raise NonFiniteLoss(
            f"step {step}: loss {loss}, gradient norm {stats.grad_norm}; nothing of this step is "
            "saved, and the same command goes on from the last checkpoint. If it fails here again, "
            "lower optim.lr in a new --run, or look at the samples: headrace data inspect DATASET "
            f"--step {step} --run {job.run}"
        )
    job.tokens += num_valid
    if job.quarantined is not None:
        job.quarantined += int(counts[1])
    seconds = time.perf_counter() - started
    rate = num_valid / seconds
    row: Row = {
        "step": step,
        "loss": loss,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "tokens": job.tokens,
        "samples": list(job.task.samples(step)),
        "data_hash": f"{int(counts[0]) % 2**64:016x}",
        **_quarantine(job),
        "attempt": job.attempt,
        "tokens_per_second": rate,
        "step_seconds": seconds,
        "eta_seconds": (job.steps - step) * seconds,
    }
    if job.peak_flops:
        row["mfu"] = rate * job.flops_per_token / job.peak_flops
    if job.resumed_from is not None and step == job.first_step:
        row["resumed_from"] = job.resumed_from
    job.metrics.write(row)
    return bool(counts[2] > 0)


def _say_when_nothing_is_saved(job: Job) -> None:
    every = job.config.checkpoint.every
    first_save = job.steps if every == 0 else -(-job.first_step // every) * every
    if min(first_save, job.stop_at or job.steps) >= job.steps:
        log.info("no checkpoint before the last step: checkpoint.every=%d", every)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _seed(seed: int, step: int, rank: int) -> None:
    # Dropout draws from (seed, step, rank): a resumed step needs no saved generator.
    key = hashlib.blake2b(f"dropout/{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)
