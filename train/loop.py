"""The training loop: one paragraph, shared by pretraining and fine-tuning.

A step is a pure function of the weights and the samples [first, last): the loop advances the data
position only after the optimizer step, so a checkpoint never counts a sample that was fetched but
not trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from train.engine import Batch
from train.job import Job
from train.passes import can_repeat
from train.progress import at, starting
from train.replicas import check_replicas
from train.restore import mend
from train.rollback import roll_back
from train.run import Outcome
from train.schedule import due
from train.step import quarantine, take_step

log = logging.getLogger(__name__)


def train(job: Job) -> tuple[Outcome, int]:
    """Collective. Train to the end or to a planned stop; returns ("complete" or "stopped", last
    completed step).
    """
    starting("first step")
    job.engine.module.train()
    _say_when_nothing_is_saved(job)
    if job.config.guard.repeat_every > 0 and not can_repeat(job):
        log.info("no step is computed twice: a GPU repeats itself with train.deterministic=true")
    if _lacks_validation(job) and not validate(job, step=job.first_step - 1):
        return "stopped", job.first_step - 1
    step, batches = job.first_step, _batches(job, job.first_step)
    while step <= job.steps:
        decision, agreed = take_step(job, step, batches)
        if decision == "roll back":
            step = _roll_back(job) + 1
            batches = _batches(job, step)
            continue
        if agreed.is_written:
            job.saver.commit()
        if job.pace.is_due(step) or step == job.steps or agreed.stop or agreed.save:
            save(job, step)
        # A run that has all its steps needs no --stop-at.
        stop = agreed.stop and step < job.steps
        if step == job.steps or (due(job.config.eval.every, step) and not stop):
            stop = not validate(job, step=step)
        if stop:
            if job.pace.last_step < step:
                save(job, step)
            job.saver.finish()
            return "stopped", step
        step += 1
    job.saver.finish()
    return "complete", job.steps


def validate(job: Job, *, step: int) -> bool:
    """Collective. Write a validation row; False when it gave way to a stop, without one: whoever
    resumes validates again. A save in flight is committed as soon as it is written: it need not
    wait for the end.
    """
    gave_way = False

    def is_over() -> bool:
        nonlocal gave_way
        at("evaluate", step)
        job.stop.look(job.pace.lead_seconds)
        flags = [int(job.stop.reason is not None), int(job.saver.is_written)]
        num_asking, num_written = job.world.sum(torch.tensor(flags)).tolist()
        if num_written == job.world.size:
            job.saver.commit()
        gave_way = bool(num_asking > 0)
        return gave_way

    job.engine.module.eval()
    with torch.no_grad():
        found = job.task.validate(job.engine.module, job.world, is_over=is_over)
    job.engine.module.train()
    if found:
        job.metrics.write({"step": step, "attempt": job.attempt, "tokens": job.tokens, **found})
    return not gave_way


def save(job: Job, step: int) -> None:
    """Collective. Begin a checkpoint of this step. ReplicasDiffer instead, when what the ranks hold
    alike differs: a resume from it would make them equal, and wrong.
    """
    if job.config.guard.check_every > 0:
        check_replicas(job.engine, job.world, job.run, step=step, attempt=job.attempt)
    state = {
        "step": step,
        "tokens": job.tokens,
        **quarantine(job),
        "attempt": job.attempt,
        "data": job.task.data_state(step),
        "guard": job.guard.state(),
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
    if 0 < step < job.steps and not due(job.config.eval.every, step):
        return False
    return bool(job.world.broadcast(job.world.is_main and not job.metrics.has_validation(step)))


def _say_when_nothing_is_saved(job: Job) -> None:
    every = job.config.checkpoint.every
    if every == "auto" or job.first_step > job.steps:
        return
    first_save = job.steps if every == 0 else -(-job.first_step // every) * every
    if min(first_save, job.stop_at or job.steps) >= job.steps:
        log.info("no checkpoint before the last step: checkpoint.every=%d", every)


def _batches(job: Job, first_step: int) -> Iterator[Batch]:
    """This rank's micro-batches from a step on."""
    return job.task.micro_batches(
        first_step, job.steps, rank=job.world.rank, num_ranks=job.world.size
    )


def _roll_back(job: Job) -> int:
    """Collective. Be as at the last checkpoint before the spike; returns its step."""
    job.saver.finish()
    spike = job.guard.spike
    saved = roll_back(
        job.engine,
        job.world,
        job.run,
        job.guard,
        attempt=job.attempt,
        samples=(job.task.samples(spike[0])[0], job.task.samples(spike[-1])[1]),
        check=job.saver.check_owner,
        mend=lambda step: mend(job.world, job.run, job.config.checkpoint.mirror, step),
    )
    job.tokens = saved.state["tokens"]
    job.quarantined = saved.state.get("quarantined")
    job.pace.went_back(saved.step)
    return saved.step
