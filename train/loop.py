"""The training loop: one paragraph, shared by pretraining and fine-tuning.

A step is a pure function of the weights and the samples [first, last): the loop advances the data
position only after the optimizer step, so a checkpoint never counts a sample that was fetched but
not trained on.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator

import torch

from data.config import DataError
from model.loss import IGNORED
from train import faults
from train.device import flip_bit
from train.engine import Batch, StepStats
from train.job import Agreed, Job, NonFiniteLoss
from train.metrics import Row
from train.progress import at
from train.run import Outcome
from train.schedule import learning_rate
from train.timing import TIMED_STEPS, compared

log = logging.getLogger(__name__)


def train(job: Job) -> tuple[Outcome, int]:
    """Collective. Train to the end or to a planned stop; returns ("complete" or "stopped", last
    completed step).
    """
    job.engine.module.train()
    _say_when_nothing_is_saved(job)
    batches = job.task.micro_batches(
        job.first_step, job.steps, rank=job.world.rank, num_ranks=job.world.size
    )
    if _lacks_validation(job) and not validate(job, step=job.first_step - 1):
        return "stopped", job.first_step - 1
    for step in range(job.first_step, job.steps + 1):
        started = time.perf_counter()
        _seed(job.config.seed, step, job.world.rank)
        found = _read(job, step, batches)
        num_valid = job.task.num_valid(step)
        if num_valid is None:
            found, num_valid = _counted(job, step, found)
        done = [_micro_step(job, step, batch, num_valid) for batch in found]
        lr = learning_rate(
            step,
            steps=job.steps,
            warmup_steps=job.config.schedule.warmup_steps,
            optim=job.config.optim,
        )
        stats = _update(job, step, lr)
        agreed = _record(
            job, step, lr=lr, stats=stats, done=done, num_valid=num_valid, started=started
        )
        if agreed.is_written:
            job.saver.commit()
        if job.pace.is_due(step) or step == job.steps or agreed.stop or agreed.save:
            save(job, step)
        stop = agreed.stop
        if step == job.steps or (_due(job.config.eval.every, step) and not stop):
            stop = not validate(job, step=step)
        if stop and step < job.steps:
            if job.pace.last_step < step:
                save(job, step)
            job.saver.finish()
            return "stopped", step
    job.saver.finish()
    return "complete", job.steps


def validate(job: Job, *, step: int) -> bool:
    """Collective. Write a validation row; False when it gave way to a stop, without one: whoever
    resumes validates again.
    """
    gave_way = False

    def is_over() -> bool:
        nonlocal gave_way
        at("evaluate", step)
        # Nobody would come back for the last one.
        asked = job.stop.reason is not None and step < job.steps
        gave_way = bool(job.world.sum(torch.tensor(int(asked))) > 0)
        return gave_way

    job.engine.module.eval()
    with torch.no_grad():
        found = job.task.validate(job.engine.module, job.world, is_over=is_over)
    job.engine.module.train()
    if found:
        job.metrics.write({"step": step, "attempt": job.attempt, "tokens": job.tokens, **found})
    return not gave_way


def save(job: Job, step: int) -> None:
    """Collective. Begin a checkpoint of this step."""
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
    job.saver.save(step, state)
    job.pace.begun(step)
    job.stop.saved()


def _lacks_validation(job: Job) -> bool:
    """Collective. Whether an earlier attempt was to validate before the first step, and did not."""
    step = job.first_step - 1
    if step and not _due(job.config.eval.every, step):
        return False
    return bool(job.world.broadcast(job.world.is_main and not job.metrics.has_validation(step)))


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


def _read(job: Job, step: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    for _ in range(job.accumulation):
        with job.timing.measuring("data"):
            at("data", step)
            batch = next(batches)
        yield batch


def _micro_step(
    job: Job, step: int, batch: Batch, num_valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a micro-batch, and its hash with its count of quarantined samples."""
    if "quarantined" in batch:
        job.quarantined = job.quarantined or 0
    counts = [batch.pop("data_hash"), batch.pop("quarantined", torch.tensor(0))]

    def loss_sum(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with job.timing.measuring("compute"):
            at("forward", step)
            loss = job.task.loss_sum(module, batch)
        at("backward", step)
        return loss * math.nan if faults.hits("forward", step, "nan") else loss

    loss = job.engine.forward_backward(batch, num_valid=num_valid, loss_sum=loss_sum)
    return loss, torch.stack(counts)


def _update(job: Job, step: int, lr: float) -> StepStats:
    at("optimizer", step)
    if faults.hits("optimizer", step, "bitflip"):
        flip_bit(job.engine.flats()[0].master.detach())
    return job.engine.step(lr)


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
) -> Agreed:
    """Write the row of a step; returns what the ranks agreed on after it."""
    at("reduce", step)
    job.stop.look(job.pace.lead_seconds)
    asked = job.stop.reason is not None or (job.stop_at is not None and step >= job.stop_at)
    # All ranks stop to save, and there learn why rank 0 could not write the row before.
    asked = asked or job.metrics.failure is not None
    loss_sum = job.world.sum(torch.stack([loss for loss, _ in done]).double().sum())
    own = torch.stack([counts for _, counts in done]).sum(dim=0)
    flags = torch.tensor([asked, job.stop.save, job.saver.is_written], dtype=own.dtype)
    counts = job.world.sum(torch.cat([own, flags]))
    loss = float(loss_sum) / num_valid
    if not (math.isfinite(loss) and math.isfinite(stats.grad_norm)):
        job.saver.finish()
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
    own_seconds = job.timing.take()
    if step % TIMED_STEPS == 0:
        row |= compared(own_seconds, job.world, step_seconds=seconds)
    job.pace.measured(seconds, job.saver.committed)
    row |= _saved(job)
    job.metrics.write(row)
    return Agreed(
        stop=bool(counts[2] > 0),
        save=bool(counts[3] > 0),
        is_written=int(counts[4]) == job.world.size,
    )


def _saved(job: Job) -> Row:
    """What the last save has cost, once."""
    timing = job.saver.committed
    if timing is None or timing.step == job.told_save:
        return {}
    job.told_save = timing.step
    return {
        "checkpoint_step": timing.step,
        "checkpoint_stall_seconds": timing.stall_seconds,
        "checkpoint_write_seconds": timing.write_seconds,
        "checkpoint_lag_seconds": timing.lag_seconds,
    }


def _say_when_nothing_is_saved(job: Job) -> None:
    every = job.config.checkpoint.every
    if every == "auto":
        return
    first_save = job.steps if every == 0 else -(-job.first_step // every) * every
    if min(first_save, job.stop_at or job.steps) >= job.steps:
        log.info("no checkpoint before the last step: checkpoint.every=%d", every)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _seed(seed: int, step: int, rank: int) -> None:
    # Dropout draws from (seed, step, rank): a resumed step needs no saved generator.
    key = hashlib.blake2b(f"dropout/{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)
