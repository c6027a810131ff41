"""From the mirror back into the run: what the run has lost, before a resume looks for it.

Every rank copies its share of the files, rank 0 the manifest when all are there, so that a copy
that is cut does not exist and is begun again. Only a copy that reads as damaged is passed over. One
that cannot be read, or has no room here, may be whole: the first commit of a run that went on
without it would remove it, so the start fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from train import checkpoint
from train.checkpoint import Checkpoint, CheckpointError, completed_steps
from train.mirror import Mirror, MirrorError
from train.ownership import check_idle
from train.rollback import is_left, rollbacks_of
from train.waiting import wait_for_all
from train.world import RankError, World

log = logging.getLogger(__name__)


def restore_newer(world: World, run: Path, location: str) -> None:
    """Collective. When the mirror has a checkpoint that is newer than those of the run, or the run
    has none, copy the newest whole one back; nothing happens without a mirror.

    RankError when it cannot be looked into and the run has none; CheckpointError when the run has
    none and the copies are damaged; MirrorError as `restore`.
    """
    if not location:
        return
    done = 0
    steps: list[int] = []
    with world.together(f"looking into the mirror {location}"):
        if world.is_main:
            done = completed_steps(run)
            mirror = Mirror(location, run)
            try:
                mirror.check_same_run()
                steps = [step for step in mirror.steps() if step > done]
            except MirrorError as error:
                if not done:
                    # To begin anew would be to give up what may lie there.
                    raise
                log.warning("%s; going on without it", error)
            if steps:
                # A run that lives has what it needs.
                check_idle(run)
                if not (run / "config.json").exists():
                    mirror.run_files_back()
    done, steps = world.broadcast((done, steps))
    damaged = []
    for step in steps:
        try:
            if restore(world, run, location, step):
                return
        except CheckpointError as error:
            damaged.append(f"step {step}: {error}")
            if world.is_main:
                log.warning("the copy of step %d in the mirror is not usable: %s", step, error)
    if damaged and not done:
        raise CheckpointError(
            f"{run} has no usable checkpoint, and the mirror {location} no whole copy:\n  "
            + "\n  ".join(damaged)
            + "\nput a whole copy of one of them back, or train again from step 0 with another "
            "--run"
        )


def restore(world: World, run: Path, location: str, step: int) -> bool:
    """Collective. Copy one checkpoint back; False when it is of a history that was left. Nothing of
    it stays when that fails: CheckpointError on every rank when the copy is damaged, MirrorError
    when it may be whole.
    """
    mirror = Mirror(location, run)
    is_wanted = False
    try:
        with _together(world, f"opening the copy of step {step} in {mirror.location}"):
            saved = mirror.open(step)
            mirror.check_sizes(saved)
            is_wanted = not is_left(saved, rollbacks_of(run))
        if not world.broadcast(is_wanted):
            return False
        _copy_back(world, run, mirror, saved)
    except RankError as error:
        raise MirrorError(
            f"step {step} is in the mirror {mirror.location} and cannot be copied back: {error}. "
            "Mend that and run the same command again; with checkpoint.mirror= (no mirror) it goes "
            "on from an older checkpoint, if the run has one"
        ) from error
    if world.is_main:
        log.info("step %d is copied back from the mirror %s", step, mirror.location)
    return True


def mend(world: World, run: Path, location: str, step: int) -> bool:
    """Collective. Whether a damaged checkpoint of the run was put right by its copy. Errors are
    those of `restore`, and CheckpointError when nobody can tell whether there is one.
    """
    has_copy, problem = False, ""
    with world.together(f"looking into the mirror {location}"):
        if world.is_main and location:
            mirror = Mirror(location, run)
            try:
                mirror.check_same_run()
                has_copy = step in mirror.steps()
            except MirrorError as error:
                problem = str(error)
    has_copy, problem = world.broadcast((has_copy, problem))
    if problem:
        raise CheckpointError(problem)
    return has_copy and restore(world, run, location, step)


def _copy_back(world: World, run: Path, mirror: Mirror, saved: Checkpoint) -> None:
    step = saved.step
    try:
        with world.together(f"making room for step {step} of the mirror"):
            # Files of one that is damaged are replaced one by one: it becomes no worse.
            if world.is_main and step not in checkpoint.committed(run):
                checkpoint.begin(run, step)
        names = [entry["name"] for entry in saved.manifest["files"]]
        with _together(world, f"copying step {step} back from {mirror.location}"):
            _copy_beside(world, mirror, saved, names[world.rank :: world.size])
        with _together(world, f"committing step {step} of the mirror"):
            if world.is_main:
                mirror.commit_back(saved)
    except (RankError, CheckpointError):
        if world.is_main:
            checkpoint.discard(run, step)
        raise


def _copy_beside(world: World, mirror: Mirror, saved: Checkpoint, names: Sequence[str]) -> None:
    """Collective. `mirror.copy_back` from a thread: a file may take longer than ranks wait for each
    other, and some have fewer of them than others, or none.
    """
    with ThreadPoolExecutor(1, "restore") as pool:
        copied = pool.submit(mirror.copy_back, saved, names)
        wait_for_all(
            world,
            lambda: not copied.done(),
            place="mirror",
            step=saved.step,
            progress=lambda: mirror.went_on,
        )
    copied.result()


@contextmanager
def _together(world: World, what: str) -> Iterator[None]:
    """Collective. `world.together`, but for damage, which is a CheckpointError on every rank."""
    damage = ""
    with world.together(what):
        try:
            yield
        except CheckpointError as error:
            damage = str(error)
    for found in world.gather(damage):
        if found:
            raise CheckpointError(found)
