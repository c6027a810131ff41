"""How an attempt comes to its run: it looks, claims it, and only then writes to it.

Whoever is refused, or finds nothing to do, has changed nothing of a run that another one trains.
"""

from __future__ import annotations

import logging
from pathlib import Path

from data.durable import StorageError, remove_leftovers
from train import run as run_directory
from train.attempts import changes
from train.checkpoint import Checkpoint, CheckpointError, committed, completed_steps
from train.device import machine
from train.exclusion import exclusion_file
from train.ownership import FOLDER, Ownership, RunInUse, own
from train.promise import promise, skipped_too_late
from train.rollback import leave_spikes
from train.rows import ReplayUsageError, start_of
from train.run import Outcome
from train.stop import STOP_FILE
from train.work import Work
from train.world import RankError, World, slurm_job

log = logging.getLogger(__name__)


def look_at(world: World, run: Path, work: Work) -> int:
    """Collective. The step at which the run stands, which this work may go on from; nothing is
    written. RankError when it may not.
    """
    _check_same_everywhere(world, work)
    done = 0
    with world.together("opening the run"):
        if world.is_main:
            run_directory.check_run(run, work.config, work.identity, allow_change=work.allow_change)
            done = completed_steps(run)
            _check_history(run)
    found: int = world.broadcast(done)
    return found


def nothing_to_do(
    world: World, run: Path, work: Work, *, stop_at: int | None, done: int
) -> Outcome | None:
    """Collective. The outcome of an attempt that need not train: it stands where it is to stop, or
    is complete.
    """
    if stop_at is not None and done >= stop_at and stop_at < work.steps:
        log.info(
            "%s stands at step %d, which is not before --stop-at %d; to go on, leave --stop-at "
            "out or name a later step",
            run,
            done,
            stop_at,
        )
        return "stopped"
    # Steps that are all there may still lack the validation that follows them.
    is_complete = done >= work.steps and run_directory.is_complete(run, work.steps)
    is_complete = world.broadcast(is_complete)
    if not is_complete and world.broadcast((run / STOP_FILE).exists()):
        log.info("%s asks this run to stand still; to go on, remove it", run / STOP_FILE)
        return "stopped"
    if is_complete:
        log.info("%s is complete: %d of %d steps", run, done, work.steps)
        return "complete"
    return None


def claim(world: World, run: Path, work: Work, done: int) -> Ownership:
    """Own the run, record the attempt and make what it needs. RunInUse when another one has it, or
    had it since the run was found to stand at step `done`. One rank only.
    """
    owner = own(run, slurm_job=slurm_job())
    remove_leftovers(run, run / FOLDER, exclusion_file(run).parent)
    try:
        run_directory.open_run(run, work.config, work.identity, allow_change=work.allow_change)
        _record(world, run, work, owner.number, done)
    except (ValueError, OSError):
        owner.release()
        raise
    return owner


def _record(world: World, run: Path, work: Work, attempt: int, done: int) -> None:
    changed = run_directory.begin_attempt(
        run,
        attempt,
        world_size=world.size,
        resumed_from=done or None,
        config=work.config,
        machine=machine(world.device),
        slurm_job=slurm_job(),
    )
    if changed:
        log.info("changed since the attempt before: %s", "; ".join(changed))
    try:
        _check_still_at(run, done)
        if work.tokenizer is not None:
            run_directory.copy_tokenizer(work.tokenizer, run)
        leave_spikes(run)
        if work.phase is not None:
            run_directory.record_phase(run, work.config, work.identity, work.phase)
    except (ValueError, OSError) as error:
        run_directory.end_attempt(run, attempt, outcome="failed", step=None, reason=str(error))
        raise


def tell_promise(world: World, run: Path, work: Work, attempt: int, saved: Checkpoint) -> None:
    """Collective. Say what the numbers to come are, against those of a run that did not stop at the
    step of the checkpoint.
    """
    with world.together("comparing the attempt with the one that it goes on from"):
        if not world.is_main:
            return
        try:
            then, now = (start_of(run, {"attempt": n}) for n in (saved.state["attempt"], attempt))
        except (KeyError, ReplayUsageError) as error:
            log.warning("whether the run goes on to the last bit is not known: %s", error)
            return
        told = promise(work.config.train, changes(then, now), device=world.device.type)
        log.info("%s", told)
        before = then["config"]["guard"]["skip_steps"]
        if late := skipped_too_late(before, work.config.guard.skip_steps, step=saved.step):
            log.warning(
                "guard.skip_steps comes too late for steps %s: the run has taken them, or skipped "
                "them by itself, and goes on from step %d; to leave them out begin another --run "
                "with them",
                late,
                saved.step,
            )


def end_at_once(world: World, run: Path, work: Work, outcome: Outcome, done: int) -> Outcome:
    """Record an attempt that had nothing to do, where it can be recorded; its outcome."""
    if world.is_main:
        try:
            owner = claim(world, run, work, done)
            run_directory.end_attempt(
                run, owner.number, outcome=outcome, step=done, reason="nothing to do"
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
                f"ranks {world.rank} and {rank} do not see the same data or model: {key} is "
                f"{work.identity.get(key)!r} on one and {found[key]!r} on the other; give every "
                "node the same files",
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
    rows = run_directory.attempts(run)
    # Of an attempt that was killed, or copied before its end, only the start tells.
    recorded = max((row.get("step") or row.get("resumed_from") or 0 for row in rows), default=0)
    if recorded and not committed(run):
        raise CheckpointError(
            f"{run} recorded step {recorded}, but {run / 'checkpoints'} holds no committed "
            "checkpoint: its manifests were removed. Put them back, or train again from step 0 "
            "with another --run"
        )
