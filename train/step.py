"""One optimizer step, or a skipped one: computed, judged before anything is touched, and its row.

What the ranks must agree on travels in the two small sums that they make anyway, the loss and the
hash of the samples; the gradient norm is global by itself. A step that only one rank finds bad is
bad on all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch

from data.durable import StorageError
from train import faults
from train.device import flip_bit
from train.engine import Batch
from train.events import GIVE_UP, SKIP, STARTED, record
from train.guard import Decision, NonFiniteLoss, Verdict
from train.job import Agreed, Job
from train.metrics import Row
from train.passes import compute, counted, read, take_counts
from train.progress import at, start_seconds
from train.replicas import check_replicas
from train.schedule import due, learning_rate
from train.timing import TIMED_STEPS

log = logging.getLogger(__name__)


def take_step(job: Job, step: int, batches: Iterator[Batch]) -> tuple[Decision, Agreed]:
    """Collective. One optimizer step, or a skipped one, and its row; returns what became of it, and
    what the ranks agreed on.
    """
    started = time.perf_counter()
    found = read(job, step, batches)
    lr = learning_rate(
        step,
        steps=job.steps,
        warmup_steps=job.config.schedule.warmup_steps,
        optim=job.config.optim,
    )
    if listed := job.guard.lists(step):
        agreed = _agreed(job, step, [take_counts(job, batch) for batch in found])
        _record(job, step, lr=lr, agreed=agreed, started=started, skipped=listed)
        return "skip", agreed
    num_valid = job.task.num_valid(step)
    if num_valid is None:
        found, num_valid = counted(job, step, found)
    done, repeat_seconds = compute(job, step, found, num_valid)
    started += repeat_seconds
    at("reduce", step)
    loss_sum = job.world.sum(torch.stack([loss for loss, _ in done]).double().sum())
    loss, norm = float(loss_sum) / num_valid, job.engine.grad_norm()
    verdict = job.guard.judge(loss, norm)
    agreed = _agreed(job, step, [counts for _, counts in done], verdict)
    _check(job, step, agreed)
    decision = job.guard.settle(
        step, loss=loss, grad_norm=norm, is_bad=agreed.is_bad, is_high=agreed.is_high
    )
    reason = verdict.reason or "another rank found it bad"
    if decision == "give up":
        with suppress(StorageError):
            _record_untaken(job, GIVE_UP, step, loss=loss, norm=norm, reason=reason)
        job.saver.finish()
        raise NonFiniteLoss(_giving_up(job, step, reason))
    # That is time of the save, and not of the step.
    started += job.saver.wait_for_copy()
    at("optimizer", step)
    if faults.hits("optimizer", step, "bitflip"):
        flip_bit(job.engine.flats()[0].master.detach())
    if decision == "step":
        job.engine.step(lr)
        job.tokens += num_valid
    else:
        job.engine.skip()
        _tell_skip(job, step, loss=loss, norm=norm, reason=reason)
    numbers = {
        "loss": loss,
        "grad_norm": norm,
        "num_valid": num_valid,
        "repeat_seconds": repeat_seconds,
    }
    skipped = "" if decision == "step" else reason
    _record(job, step, lr=lr, agreed=agreed, started=started, skipped=skipped, numbers=numbers)
    return decision, agreed


def quarantine(job: Job) -> dict[str, int]:
    """The cumulative count, for a row or a checkpoint; nothing where nobody counts."""
    return {} if job.quarantined is None else {"quarantined": job.quarantined}


def _agreed(
    job: Job, step: int, counts: list[torch.Tensor], verdict: Verdict | None = None
) -> Agreed:
    """Collective. Whoever finds a step bad, or wants to stop, speaks for all."""
    job.stop.look(job.pace.lead_seconds)
    asked = job.stop.reason is not None or (job.stop_at is not None and step >= job.stop_at)
    # All ranks stop to save, and there learn why rank 0 could not write the row before.
    asked = asked or job.metrics.failure is not None
    flags = [asked, job.stop.save, job.saver.is_written]
    flags += [verdict.is_bad, verdict.is_high] if verdict else [False, False]
    own = torch.stack(counts).sum(dim=0)
    found = job.world.sum(torch.cat([own, torch.tensor(flags, dtype=own.dtype)])).tolist()
    return Agreed(
        data_hash=f"{found[0] % 2**64:016x}",
        quarantined=found[1],
        stop=found[2] > 0,
        save=found[3] > 0,
        is_written=found[4] == job.world.size,
        is_bad=found[5] > 0,
        is_high=found[6] > 0,
    )


def _check(job: Job, step: int, agreed: Agreed) -> None:
    """Collective. ReplicasDiffer where the weights that this step has computed with differ.

    Before the update: at ZeRO 1 and 2 it rebuilds them, and what a flipped bit has done to the
    gradient all ranks then have alike. A step out of the ordinary is looked at in any case.
    """
    every = job.config.guard.check_every
    is_odd = every > 0 and (agreed.is_bad or agreed.is_high)
    if (is_odd or due(every, step)) and not job.is_replay:
        check_replicas(job.engine, job.world, job.run, step=step, attempt=job.attempt)


def _record(
    job: Job,
    step: int,
    *,
    lr: float,
    agreed: Agreed,
    started: float,
    skipped: str,
    numbers: Mapping[str, float] | None = None,
) -> None:
    """Write the row of a step. That of a skipped one says why and has no loss, which would be none
    of the run's.
    """
    if job.quarantined is not None:
        job.quarantined += agreed.quarantined
    seconds = time.perf_counter() - started
    row: Row = {"step": step}
    if skipped or numbers is None:
        row |= {"skipped": True, "reason": skipped, "lr": lr}
    else:
        row |= {"loss": numbers["loss"], "lr": lr, "grad_norm": numbers["grad_norm"]}
    row |= {
        "tokens": job.tokens,
        "samples": list(job.task.samples(step)),
        "data_hash": agreed.data_hash,
        **quarantine(job),
        "attempt": job.attempt,
    }
    if not skipped and numbers is not None:
        rate = numbers["num_valid"] / seconds
        row |= {"tokens_per_second": rate, "step_seconds": seconds}
        row["eta_seconds"] = (job.steps - step) * seconds
        if job.peak_flops:
            row["mfu"] = rate * job.flops_per_token / job.peak_flops
    if job.resumed_from is not None and step == job.first_step:
        row["resumed_from"] = job.resumed_from
    repeat_seconds = numbers["repeat_seconds"] if numbers else 0.0
    if repeat_seconds:
        row["repeat_seconds"] = repeat_seconds
    own_seconds = job.timing.take()
    if step % TIMED_STEPS == 0:
        row |= job.timing.compared(own_seconds, job.world, step_seconds=seconds)
    job.pace.measured(seconds + repeat_seconds, job.saver.committed)
    row |= _saved(job) | tell_mirrored(job)
    job.metrics.write(row)
    if step == job.first_step and job.world.is_main and not job.is_replay:
        # The log of a start that storage refuses is no reason to end the run.
        with suppress(StorageError):
            record(job.run, STARTED, attempt=job.attempt, step=step, seconds=start_seconds())


def tell_mirrored(job: Job) -> Row:
    """What has become of copies in the mirror since the last call, for a row; failures are events,
    too. On rank 0; nothing elsewhere.
    """
    row: Row = {}
    while job.saver.mirror is not None and job.saver.mirror.results:
        copied = job.saver.mirror.results.popleft()
        if not copied.problem:
            row |= {"mirror_step": copied.step, "mirror_seconds": copied.seconds}
            continue
        row |= {"mirror_failed_step": copied.step}
        fields = {"attempt": job.attempt, "step": copied.step, "reason": copied.problem}
        # The log has it; storage that refuses this row refuses the next metrics, and ends the run.
        with suppress(StorageError):
            record(job.run, "mirror failed", **fields)
    return row


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


def _tell_skip(job: Job, step: int, *, loss: float, norm: float, reason: str) -> None:
    """Collective. Record that the guard left a step out."""
    if job.world.is_main and not job.is_replay:
        log.warning("step %d is skipped: %s", step, reason)
    with job.world.together("recording a skipped step"):
        _record_untaken(job, SKIP, step, loss=loss, norm=norm, reason=reason)


def _record_untaken(
    job: Job, kind: str, step: int, *, loss: float, norm: float, reason: str
) -> None:
    """An event with the numbers of a step that the guard did not let pass."""
    if job.world.is_main and not job.is_replay:
        samples = list(job.task.samples(step))
        numbers = {"loss": loss, "grad_norm": norm, "reason": reason}
        record(job.run, kind, attempt=job.attempt, step=step, samples=samples, **numbers)


def _giving_up(job: Job, step: int, reason: str) -> str:
    before = job.guard.skipped[:-1]
    skipped = f" after steps {before} were skipped" if before else ""
    return (
        f"step {step}: {reason}{skipped}; nothing of this step is saved, and the same command goes "
        "on from the last checkpoint. If it fails here again, lower optim.lr in a new --run, or "
        f"look at the samples: headrace data inspect DATASET --step {step} --run {job.run}"
    )
