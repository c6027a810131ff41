"""One attempt of a run: from its directory to an outcome. Pretraining and fine-tuning differ only
in their `Work`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data.durable import StorageError
from train import run as run_directory
from train.build import build_engine, settle
from train.ceiling import SLOW, bf16_share, matmul_flops_per_second
from train.checkpoint import Checkpoint, CheckpointError
from train.engine import DTYPES, Engine
from train.guard import Guard
from train.job import Job
from train.loop import train
from train.metrics import Metrics, ProgressLine, View, wandb_views
from train.opening import claim, end_at_once, look_at, nothing_to_do, tell_promise
from train.optim import STATE_KEYS
from train.ownership import Ownership
from train.pace import Pace
from train.progress import at
from train.restore import mend
from train.rollback import rollbacks_of
from train.room import tight
from train.run import Outcome
from train.saver import Saver
from train.snapshot import checkpoint_shares
from train.state import load_newest
from train.step import tell_mirrored
from train.stop import StopRequest, how_to_go_on
from train.timing import Timing
from train.watch import Watch
from train.work import Work
from train.world import World, cause_of, slurm_deadline

log = logging.getLogger(__name__)


def run_attempt(world: World, run: Path, work: Work, *, stop_at: int | None = None) -> Outcome:
    """Collective. Start or resume the run and train it to its end, to `stop_at`, or to a requested
    stop.
    """
    settle(work.config.train, world.device)
    done = look_at(world, run, work)
    outcome = nothing_to_do(world, run, work, stop_at=stop_at, done=done)
    if outcome is not None:
        return end_at_once(world, run, work, outcome, done)
    stop = StopRequest()
    stop.listen()
    if world.is_main:
        stop.watch(run, slurm_deadline())
    owner: Ownership | None = None
    with world.together("recording the attempt"):
        if world.is_main:
            owner = claim(world, run, work, done)
    attempt = world.broadcast(owner and owner.number)
    with _recorded(world, run, attempt, owner), _watched(world, run, work, attempt):
        at("build")
        outcome, step = _train(world, run, work, stop, stop_at, attempt, owner)
    # A signal may have reached one rank alone.
    asked = next(filter(None, world.gather(stop.reason)), None)
    reason = asked or ("--stop-at" if outcome == "stopped" else "")
    with world.together("recording the end of the attempt"):
        if world.is_main:
            run_directory.end_attempt(run, attempt, outcome=outcome, step=step, reason=reason)
    if outcome == "stopped":
        log.info("%s is saved at step %d (%s); %s", run, step, reason, how_to_go_on(run, reason))
    else:
        log.info("%s is complete: %d of %d steps", run, step, work.steps)
    return outcome


@contextmanager
def _recorded(world: World, run: Path, attempt: int, owner: Ownership | None) -> Iterator[None]:
    """Around the training: an attempt that fails says why, and none stays the owner."""
    try:
        yield
    except BaseException as error:
        if world.is_main:
            reason = cause_of(error)
            # Storage that refuses this row most likely is the error.
            with suppress(StorageError):
                run_directory.end_attempt(run, attempt, outcome="failed", step=None, reason=reason)
        raise
    finally:
        if owner is not None:
            owner.release()


@contextmanager
def _watched(world: World, run: Path, work: Work, attempt: int) -> Iterator[None]:
    """Collective. Around the training: a rank that stands still ends it."""
    watch = Watch(
        run,
        attempt=attempt,
        rank=world.rank,
        hosts=world.gather(world.host),
        stall_seconds=work.config.stall_seconds,
        reading=work.task.reading,
    )
    try:
        yield
    finally:
        watch.close()


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
        tell_promise(world, run, work, attempt, saved)
    first_step = 1 if saved is None else saved.step + 1
    _warn_of_little_room(engine, world, run, work)
    _warn_of_slow_precision(world, work)
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
        job.saver.finish_mirror(
            is_stopped=lambda: stop.reason is not None,
            # The watch ends a run that takes twice as long.
            patience=work.config.stall_seconds / 2,
        )
        tell_mirrored(job)
        return ended
    finally:
        job.saver.close()
        metrics.close()


def _open_metrics(world: World, run: Path, work: Work, first_step: int) -> Metrics:
    views: list[View] = []
    if world.is_main:
        line = ProgressLine(steps=work.steps, first_step=first_step, unit=work.task.unit)
        settings = work.config.model_dump(mode="json")
        views = [line, *wandb_views(run, work.config.log, settings)]
    return Metrics(run, enabled=world.is_main, views=views)


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


def _warn_of_slow_precision(world: World, work: Work) -> None:
    is_cpu = world.device.type == "cpu"
    if is_cpu and work.config.precision == "bf16" and world.is_main:
        share = bf16_share(world.device)
        if share < SLOW:
            log.warning(
                "this CPU multiplies bf16 at %.2f of its fp32 rate: precision=fp32 trains faster",
                share,
            )


def _peak_flops(world: World, work: Work) -> float:
    if not work.flops_per_token:
        return 0.0
    rate = matmul_flops_per_second(world.device, DTYPES[work.config.precision])
    return float(world.sum(torch.tensor(rate, dtype=torch.float64)))
