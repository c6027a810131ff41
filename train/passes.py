"""The forward and backward passes of a step: what is read for it, drawn, and computed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from data.config import DataError
from model.loss import IGNORED
from train import faults
from train.device import flip_bit
from train.engine import Batch
from train.job import Job
from train.progress import at
from train.repeat import Passes, twice
from train.schedule import due


def read(job: Job, step: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """This rank's micro-batches of a step."""
    for _ in range(job.accumulation):
        with job.timing.measuring("data"):
            at("data", step)
            batch = next(batches)
        yield batch


def counted(job: Job, step: int, batches: Iterator[Batch]) -> tuple[Iterator[Batch], int]:
    """Collective. The step's micro-batches, all of them read, and their targets over all ranks.

    Costs one reduction of 8 bytes between the hosts, and memory for the step's token ids.
    """
    found = list(batches)
    own = sum(int((batch["labels"] != IGNORED).sum()) for batch in found)
    num_valid = int(job.world.sum(torch.tensor(own)))
    if num_valid == 0:
        first, last = job.task.samples(step)
        raise DataError(
            f"step {step}: samples [{first}, {last}) hold no target; every document in them is "
            "empty, or every one touches damage: restore what the log names. Look at them: "
            f"headrace data inspect --step {step} --run {job.run}"
        )
    return iter(found), num_valid


def is_made_twice(job: Job, step: int) -> bool:
    """Whether the step is computed twice: kernels that do not repeat themselves would differ."""
    return can_repeat(job) and due(job.config.guard.repeat_every, step) and not job.is_replay


def can_repeat(job: Job) -> bool:
    """Whether the kernels of this device give the same bits twice."""
    return job.world.device.type == "cpu" or job.config.train.repeats


def take_counts(job: Job, batch: Batch) -> torch.Tensor:
    """Remove what a micro-batch carries besides its samples: its hash, its quarantined samples."""
    if "quarantined" in batch:
        job.quarantined = job.quarantined or 0
    return torch.stack([batch.pop("data_hash"), batch.pop("quarantined", torch.tensor(0))])


def compute(job: Job, step: int, batches: Iterator[Batch], num_valid: int) -> tuple[Passes, float]:
    """Collective. The loss of every micro-batch, its gradient added, with what `take_counts` took
    from it; and the seconds that a first time took, where the step is made twice. RepeatDiffers
    where the two differ. That costs memory for the step's token ids.
    """
    if not is_made_twice(job, step):
        return _passes(job, step, batches, num_valid), 0.0
    found = list(batches)

    def first() -> Passes:
        # Of copies: `take_counts` takes from what it is given.
        return _passes(job, step, map(dict, found), num_valid, is_timed=False)

    def again() -> Passes:
        return _passes(job, step, iter(found), num_valid)

    return twice(job.engine, job.world, job.run, first, again, step=step, attempt=job.attempt)


def _passes(
    job: Job, step: int, batches: Iterator[Batch], num_valid: int, *, is_timed: bool = True
) -> Passes:
    return [
        _micro_step(job, step, micro, batch, num_valid, is_timed=is_timed)
        for micro, batch in enumerate(batches)
    ]


def _micro_step(
    job: Job, step: int, micro: int, batch: Batch, num_valid: int, *, is_timed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a micro-batch, and its hash with its count of quarantined samples."""
    counts = take_counts(job, batch)
    _seed(job.config.seed, step, micro * job.world.size + job.world.rank)

    def loss_sum(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with job.timing.measuring("compute") if is_timed else nullcontext():
            at("forward", step)
            loss = job.task.loss_sum(module, batch)
        at("backward", step)
        if faults.hits("backward", step, "bitflip"):
            loss.register_hook(_flipped)  # type: ignore[no-untyped-call]
        return loss * math.nan if faults.hits("forward", step, "nan") else loss

    return job.engine.forward_backward(batch, num_valid=num_valid, loss_sum=loss_sum), counts


def _flipped(gradient: torch.Tensor) -> torch.Tensor:
    changed = gradient.clone()
    flip_bit(changed)
    return changed


def _seed(seed: int, step: int, place: int) -> None:
    # Dropout draws from the place of a micro-batch in the global batch: a resumed step needs no
    # saved generator, and whichever rank computes it drops the same.
    key = hashlib.blake2b(f"dropout/{seed}/{step}/{place}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)
