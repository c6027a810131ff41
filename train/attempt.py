"""One attempt of a run: from its directory to an outcome. Pretraining and fine-tuning differ only
in their `Work`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.durable import StorageError
from data.phases import RunPhase
from train import run as run_directory
from train.build import build_engine, settle
from train.checkpoint import Checkpoint, CheckpointError, committed, completed_steps
from train.config import JobConfig
from train.device import machine
from train.engine import DTYPES, Engine
from train.guard import Guard
from train.job import Job, Task
from train.loop import train
from train.metrics import Metrics, ProgressLine, View, matmul_flops_per_second, wandb_views
from train.optim import STATE_KEYS
from train.ownership import Ownership, RunInUse, own
from train.pace import Pace
from train.progress import at
from train.promise import promise
from train.restore import mend
from train.rollback import leave_spikes, rollbacks_of
from train.room import tight
from train.run import Outcome
from train.saver import Saver, checkpoint_shares
from train.state import load_newest
from train.step import tell_mirrored
from train.stop import STOP_FILE, StopRequest
from train.timing import Timing
from train.watch import Watch
from train.world import RankError, World, slurm_deadline, slurm_job

log = logging.getLogger(__name__)


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


def run_attempt(world: World, run: Path, work: Work, *, stop_at: int | None = None) -> Outcome:
    """Collective. Start or resume the run and train it to its end, to `stop_at`, or to a requested
    stop.
    """
    done = 0
    settle(work.config.train, world.device)
    _check_same_everywhere(world, work)
    with world.together("opening the run"):
        if world.is_main:
            run_directory.open_run(
                run,
                work.config,
                work.identity,
                allow_change=work.allow_change,
            )
            if work.tokenizer is not None:
                run_directory.copy_tokenizer(work.tokenizer, run)
            leave_spikes(run)
            done = completed_steps(run)
            _check_history(run)
    done = world.broadcast(done)
    if stop_at is not None and done >= stop_at and stop_at < work.steps:
        log.info(
            "%s stands at step %d, which is not before --stop-at %d; to go on, leave --stop-at "
            "out or name a later step",
            run,
            done,
            stop_at,
        )
        return _end_at_once(world, run, work, "stopped", done)
    # Steps that are all there may still lack the validation that follows them.
    is_complete = done >= work.steps and run_directory.is_complete(run, work.steps)
    is_complete = world.broadcast(is_complete)
    if not is_complete and world.broadcast((run / STOP_FILE).exists()):
        log.info("%s asks this run to stand still; to go on, remove it", run / STOP_FILE)
        return _end_at_once(world, run, work, "stopped", done)
    if is_complete:
        log.info("%s is complete: %d of %d steps", run, done, work.steps)
        return _end_at_once(world, run, work, "complete", done)
    stop = StopRequest()
    stop.listen()
    if world.is_main:
        stop.watch(run, slurm_deadline())
    owner: Ownership | None = None
    with world.together("recording the attempt"):
        if world.is_main:
            owner = _begin(world, run, work, done)
            if work.phase is not None:
                run_directory.record_phase(run, work.config, work.identity, work.phase)
    attempt = world.broadcast(owner and owner.number)
    watch = Watch(
        run,
        attempt=attempt,
        rank=world.rank,
        num_ranks=world.size,
        stall_seconds=work.config.stall_seconds,
        reading=work.task.reading,
    )
    try:
        at("build")
        outcome, step = _train(world, run, work, stop, stop_at, attempt, owner)
    except BaseException as error:
        if world.is_main:
            reason = f"{type(error).__name__}: {error}"
            # Storage that refuses this row most likely is the error.
            with suppress(StorageError):
                run_directory.end_attempt(run, attempt, outcome="failed", step=None, reason=reason)
        raise
    finally:
        watch.close()
        if owner is not None:
            owner.release()
    reason = stop.reason or ("--stop-at" if outcome == "stopped" else "")
    with world.together("recording the end of the attempt"):
        if world.is_main:
            run_directory.end_attempt(run, attempt, outcome=outcome, step=step, reason=reason)
    if outcome == "stopped":
        how = " without --stop-at" if reason == "--stop-at" else ""
        log.info(
            "%s is saved at step %d (%s); the same command%s goes on from there",
            run,
            step,
            reason,
            how,
        )
    else:
        log.info("%s is complete: %d of %d steps", run, step, work.steps)
    return outcome


def _train(
    world: World,
    run: Path,
    work: Work,
    stop: StopRequest,
    stop_at: int | None,
    attempt: int,
    owner: Ownership | None,
) -> tuple[Outcome, int]:
    """Collective. From the newest checkpoint to the outcome and the last completed step."""
    engine = build_engine(
        work.module(),
        work.config,
        world,
        micro_batch=work.micro_batch,
        accumulation=work.accumulation,
    )
    with world.together("looking for checkpoints"):
        at("load")
    mirror = work.config.checkpoint.mirror
    saved = load_newest(engine, world, run, mend=lambda step: mend(world, run, mirror, step))
    if saved is not None:
        _check_data(saved, work)
    first_step = 1 if saved is None else saved.step + 1
    _warn_of_little_room(engine, world, run, work)
    log.info(
        "attempt %d starts %s", attempt, f"from step {saved.step}" if saved else "from nothing"
    )
    with world.together("opening the metrics"):
        metrics = _open_metrics(world, run, work, first_step)
    job = Job(
        task=work.task,
        engine=engine,
        world=world,
        config=work.config,
        run=run,
        metrics=metrics,
        saver=Saver(engine, world, run, config=work.config.checkpoint, owner=owner),
        timing=Timing(world.device),
        pace=Pace(work.config.checkpoint.every, world, run, first_step=first_step),
        steps=work.steps,
        accumulation=work.accumulation,
        attempt=attempt,
        first_step=first_step,
        tokens=0 if saved is None else saved.state["tokens"],
        flops_per_token=work.flops_per_token,
        peak_flops=_peak_flops(world, work),
        stop_at=stop_at,
        stop=stop,
        resumed_from=None if saved is None else saved.step,
        quarantined=None if saved is None else saved.state.get("quarantined"),
        identity=work.identity,
        guard=Guard(
            work.config.guard,
            None if saved is None else saved.state.get("guard"),
            rollbacks=world.broadcast(rollbacks_of(run) if world.is_main else None),
        ),
    )
    try:
        ended = train(job)
        if stop.reason is None:
            # Whoever asks for a stop has no time; what is not copied then, a later commit makes up.
            job.saver.finish_mirror()
        tell_mirrored(job)
        return ended
    finally:
        job.saver.close()
        metrics.close()


def _begin(world: World, run: Path, work: Work, done: int) -> Ownership:
    """Claim the run and record the attempt. RunInUse when another one has it, or had it since the
    run was found to stand at step `done`.
    """
    owner = own(run, slurm_job=slurm_job())
    changed = run_directory.begin_attempt(
        run,
        owner.number,
        world_size=world.size,
        resumed_from=done or None,
        config=work.config,
        machine=machine(world.device),
        slurm_job=slurm_job(),
    )
    if changed:
        log.info("changed since the attempt before: %s", "; ".join(changed))
    if done:
        log.info("%s", promise(work.config.train, changed, device=world.device.type))
    try:
        _check_still_at(run, done)
    except RunInUse as error:
        run_directory.end_attempt(run, owner.number, outcome="failed", step=None, reason=str(error))
        owner.release()
        raise
    return owner


def _open_metrics(world: World, run: Path, work: Work, first_step: int) -> Metrics:
    views: list[View] = []
    if world.is_main:
        line = ProgressLine(steps=work.steps, first_step=first_step, unit=work.task.unit)
        settings = work.config.model_dump(mode="json")
        views = [line, *wandb_views(run, work.config.log, settings)]
    return Metrics(run, enabled=world.is_main, views=views)


def _end_at_once(world: World, run: Path, work: Work, outcome: Outcome, step: int) -> Outcome:
    if world.is_main:
        try:
            owner = _begin(world, run, work, step)
            run_directory.end_attempt(
                run, owner.number, outcome=outcome, step=step, reason="nothing to do"
            )
            owner.release()
        except (StorageError, RunInUse) as error:
            log.info("this attempt is not recorded: %s", error.__cause__ or error)
    return outcome


def _check_same_everywhere(world: World, work: Work) -> None:
    """Collective. RankError when a rank has opened other data than rank 0: a copy that is older, or
    a URL that was replaced in between.
    """
    for rank, found in enumerate(world.gather(work.identity)):
        differing = [key for key in found if found[key] != work.identity.get(key)]
        if differing:
            key = differing[0]
            raise RankError(
                f"ranks {world.rank} and {rank} do not see the same data: {key} is "
                f"{work.identity.get(key)!r} on one and {found[key]!r} on the other; give every "
                "node the same dataset",
                1,
            )


def _check_still_at(run: Path, done: int) -> None:
    """RunInUse when the run went on between the look at it and its possession: what was planned,
    such as the step of a new phase, no longer fits.
    """
    now = completed_steps(run)
    if now != done:
        raise RunInUse(
            f"{run} went on from step {done} to {now} while this attempt waited for it; run the "
            "same command again"
        )


def _check_history(run: Path) -> None:
    """CheckpointError when the run has completed steps and lost every checkpoint of them."""
    recorded = max((row.get("step") or 0 for row in run_directory.attempts(run)), default=0)
    if recorded and not committed(run):
        raise CheckpointError(
            f"{run} recorded step {recorded}, but {run / 'checkpoints'} holds no committed "
            "checkpoint: its manifests were removed. Put them back, or train again from step 0 "
            "with another --run"
        )


def _check_data(saved: Checkpoint, work: Work) -> None:
    found, expected = saved.state["data"], work.task.data_state(saved.step)
    work.task.check_data_state(found)
    there, here = found.get("consumed_samples"), expected.get("consumed_samples")
    if there != here:
        raise CheckpointError(
            f"{saved.folder} stands at sample {there}, but its step {saved.step} ends at {here}; "
            "going on would repeat or skip samples"
        )


def _warn_of_little_room(engine: Engine, world: World, run: Path, work: Work) -> None:
    shares = checkpoint_shares(engine, world, to_come=STATE_KEYS)
    warning = tight(run, work.config.checkpoint.keep, shares) if world.is_main else None
    if warning is not None:
        log.warning("%s", warning)


def _peak_flops(world: World, work: Work) -> float:
    if not work.flops_per_token:
        return 0.0
    rate = matmul_flops_per_second(world.device, DTYPES[work.config.precision])
    return float(world.sum(torch.tensor(rate, dtype=torch.float64)))
