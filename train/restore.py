"""From the mirror back into the run: what the run has lost, before a resume looks for it.

Every rank copies its share of the files, rank 0 the manifest when all are there, so that a copy
that is cut does not exist and is begun again.
"""

from __future__ import annotations

import logging
from pathlib import Path

from train import checkpoint
from train.checkpoint import CheckpointError, completed_steps
from train.mirror import Mirror
from train.ownership import check_idle
from train.rollback import is_left, rollbacks_of
from train.world import RankError, World

log = logging.getLogger(__name__)


def restore_newer(world: World, run: Path, location: str) -> None:
    """Collective. When the mirror has a checkpoint that is newer than those of the run, or the run
    has none, copy the newest whole one back; nothing happens without a mirror. RankError when it
    cannot be looked into and the run has none.
    """
    if not location:
        return
    steps: list[int] = []
    with world.together(f"looking into the mirror {location}"):
        if world.is_main:
            done = completed_steps(run)
            mirror = Mirror(location, run)
            try:
                steps = [step for step in mirror.steps() if step > done]
            except CheckpointError as error:
                if not done:
                    # To begin anew would be to give up what may lie there.
                    raise
                log.warning("%s; going on without it", error)
            else:
                mirror.check_same_run()
            if steps:
                # A run that lives has what it needs.
                check_idle(run)
                if not (run / "config.json").exists():
                    mirror.run_files_back()
    for step in world.broadcast(steps):
        try:
            if restore(world, run, location, step):
                return
        except RankError as error:
            if world.is_main:
                log.warning("the copy of step %d in the mirror is not usable: %s", step, error)


def restore(world: World, run: Path, location: str, step: int) -> bool:
    """Collective. Copy one checkpoint back; False when it is of a history that was left, RankError
    when the copy is not whole, of which nothing stays.
    """
    mirror = Mirror(location, run)
    is_wanted = False
    with world.together(f"opening the copy of step {step} in {mirror.location}"):
        saved = mirror.open(step)
        mirror.check_sizes(saved)
        is_wanted = not is_left(saved, rollbacks_of(run))
    if not world.broadcast(is_wanted):
        return False
    try:
        with world.together(f"making room for step {step} of the mirror"):
            # Files of one that is damaged are replaced one by one: it becomes no worse.
            if world.is_main and step not in checkpoint.committed(run):
                checkpoint.begin(run, step)
        names = [entry["name"] for entry in saved.manifest["files"]]
        with world.together(f"copying step {step} back from {mirror.location}"):
            mirror.copy_back(saved, names[world.rank :: world.size])
        with world.together(f"committing step {step} of the mirror"):
            if world.is_main:
                mirror.commit_back(saved)
    except RankError:
        if world.is_main:
            checkpoint.discard(run, step)
        raise
    if world.is_main:
        log.info("step %d is copied back from the mirror %s", step, mirror.location)
    return True


def mend(world: World, run: Path, location: str, step: int) -> bool:
    """Collective. Whether a damaged checkpoint of the run was put right by its copy."""
    has_copy = False
    with world.together(f"looking into the mirror {location}"):
        if world.is_main and location:
            has_copy = step in Mirror(location, run).steps()
    return bool(world.broadcast(has_copy)) and restore(world, run, location, step)
