"""Checkpoints beside the training: a thread copies the state to host memory and writes the copy.

The next update waits for the copy alone. Whether every rank has written is agreed in the sum that
ends each step anyway; rank 0 then commits, and its thread removes what the config does not keep.
At most one save is in flight: the next one, and the end of the run, wait for it. What a writer
meets is raised on every rank, no later than that.
Memory: one more copy of what this rank writes, 12 bytes per parameter it owns with AdamW; none on a
CPU whose training waits for the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.durable import StorageError
from train import checkpoint, faults
from train.checkpoint import CheckpointError
from train.device import flip_bit
from train.engine import Engine
from train.guard import trouble_began
from train.mirror import Mirror
from train.mirror_thread import MirrorThread
from train.ownership import Ownership
from train.progress import at
from train.room import Share, check_room
from train.settings import CheckpointConfig
from train.slices import Range, write_slices
from train.snapshot import Arrays, Snapshots, checkpoint_shares, owned
from train.waiting import wait_for_all
from train.world import RankError, World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveCost:
    """What a save has cost."""

    step: int
    stall_seconds: float
    """That training stood still: for the beginning, the copy, the commit, and a save before it."""
    write_seconds: float
    """Until this rank's file was on disk."""
    lag_seconds: float
    """From the step to the commit."""


@dataclass
class _Pending:
    step: int
    state: dict[str, Any]
    scalars: list[dict[str, float]]
    copied: Future[Arrays]
    written: Future[tuple[dict[str, Any], float]]
    begun: float
    stall: float


class Saver:
    """Saves a run's checkpoints, one after the other."""

    def __init__(
        self,
        engine: Engine,
        world: World,
        run: Path,
        *,
        config: CheckpointConfig,
        owner: Ownership | None = None,
    ) -> None:
        self._engine = engine
        self._world = world
        self._run = run
        self._config = config
        self._owner = owner
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._snapshots = Snapshots()
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None
        self._rule = config.retention()
        self._num_pieces = 0
        self.mirror: MirrorThread | None = None
        """Rank 0's, where the config has a mirror."""
        if config.mirror and world.is_main:
            self.mirror = MirrorThread(Mirror(config.mirror, run, self.check_owner))
        self.committed: SaveCost | None = None
        """The last save that was committed."""

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write of the save in flight."""
        return self._pending is not None and self._pending.written.done()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Collective. Begin the checkpoint of this step, and wait for it where the config says so.
        Nothing may change the engine's state before `wait_for_copy`.

        RankError on every rank when one of them cannot write, what was written is removed again;
        and when `owner` (rank 0's) has lost the run to a later attempt, whose files are left alone.
        """
        begun = time.monotonic()
        self.finish()
        shares = checkpoint_shares(self._engine, self._world)
        total_bytes = sum(one.file_bytes for one in shares)
        with self._discarding(step):
            with self._world.together(f"making room for the checkpoint of step {step}"):
                if self._world.is_main:
                    self.check_owner()
                    # A save that was cut may have been of another step, and has taken room.
                    checkpoint.remove(checkpoint.uncommitted(self._run), goes_on=self._goes_on)
                    self._check_room(step, shares, state)
                    checkpoint.begin(self._run, step)
            flats = self._engine.flats()
            with self._world.together(f"copying the state of step {step}"):
                at("snapshot", step)
                parts, ranges = owned(flats)
                is_flipped = faults.hits("snapshot", step, "bitflip")
                is_copied = self._config.background or is_flipped
                copy = self._snapshots.begin(parts, copied=is_copied)
                if is_flipped:
                    copy = partial(_flipped, copy)
        # A partition that is all padding has no parameter and may lag behind. Read before the copy
        # begins: on a GPU they would queue behind it.
        scalars = [flat.scalars() for flat in flats if flat.fragments]
        copied = self._writer.submit(copy)
        self._pending = _Pending(
            step,
            state,
            scalars,
            copied=copied,
            written=self._writer.submit(self._write, step, copied, ranges, total_bytes),
            begun=begun,
            stall=time.monotonic() - begun,
        )
        if not self._config.background:
            self.finish()

    def wait_for_copy(self) -> float:
        """Until the save in flight has its copy of the state, which nothing may change before;
        returns the seconds. What the copying thread meets is raised at the commit.
        """
        if self._pending is None or self._pending.copied.done():
            return 0.0
        begun = time.monotonic()
        at("snapshot", self._pending.step)
        wait([self._pending.copied])
        seconds = time.monotonic() - begun
        self._pending.stall += seconds
        return seconds

    def finish(self) -> None:
        """Collective. Wait for the save in flight, if there is one, commit it, and see what it
        replaces removed.
        """
        if self._pending is not None:
            begun = time.monotonic()
            self._wait_for(self._pending.written, self._pending.step)
            self._pending.stall += time.monotonic() - begun
            self.commit()
        if self._removal is not None:
            removal, self._removal = self._removal, None
            self._wait_for(removal, self.committed.step if self.committed else 0)
            with self._world.together("removing checkpoints that are not kept"):
                removal.result()

    def _wait_for(self, done: Future[Any], step: int) -> None:
        wait_for_all(
            self._world,
            lambda: not done.done(),
            place="disk",
            step=step,
            progress=lambda: self._num_pieces,
        )

    def close(self) -> None:
        """Take no more; what is in flight is written to its end and stays uncommitted."""
        self._writer.shutdown(wait=False)

    def commit(self) -> None:
        """Collective. Commit the save in flight, which every rank has written, and take back what
        the config does not keep: rank 0's thread removes it.
        """
        pending, self._pending = self._pending, None
        assert pending is not None
        step, begun = pending.step, time.monotonic()
        entry: dict[str, Any] = {}
        seconds, retired = 0.0, list[Path]()
        with self._discarding(step):
            with self._world.together(f"writing the checkpoint of step {step}"):
                entry, seconds = pending.written.result()
            rows = self._world.gather((entry, pending.scalars))
            with self._world.together(f"committing the checkpoint of step {step}"):
                at("commit", step)
                if self._world.is_main:
                    checkpoint.commit(
                        checkpoint.step_folder(self._run, step),
                        step=step,
                        parameters=self._engine.inventory,
                        scalars=_one_value([scalars for _, scalars in rows]),
                        state=pending.state,
                        files=[entry for entry, _ in rows],
                        check=self.check_owner,
                    )
                    # A later owner's checkpoints are none of a history that was left.
                    self.check_owner()
                at("prune", step)
                if self._world.is_main:
                    retired = self._retire(step, pending.state.get("guard", {}))
        self._removal = self._writer.submit(self._remove, retired)
        now = time.monotonic()
        stall = pending.stall + now - begun
        self.committed = SaveCost(step, stall, seconds, now - pending.begun)

    @contextmanager
    def _discarding(self, step: int) -> Iterator[None]:
        try:
            yield
        except RankError:
            # Whoever has taken the run over may be writing the same step.
            is_lost = self._owner is not None and self._owner.is_lost
            if self._world.is_main and not is_lost:
                checkpoint.discard(self._run, step)
            raise

    def check_owner(self) -> None:
        """RunInUse when this attempt, by its rank 0, has lost the run to a later one."""
        if self._owner is not None:
            self._owner.check()

    def finish_mirror(self, *, is_stopped: Callable[[], bool], patience: float) -> None:
        """Collective. Wait until the last commit is in the mirror or could not be copied; no longer
        once a rank is to stop, or the mirror has taken nothing for `patience` seconds: what is not
        there then, a later commit makes up.
        """
        if not self._config.mirror:
            return
        mirror, step = self.mirror, self.committed.step if self.committed else 0
        if mirror is not None:
            mirror.end()
        is_copied = wait_for_all(
            self._world,
            lambda: mirror is not None and mirror.is_busy,
            place="mirror",
            step=step,
            progress=lambda: mirror.went_on if mirror is not None else 0.0,
            leave=lambda: is_stopped() or (mirror is not None and mirror.silent > patience),
        )
        if mirror is not None and not is_copied and mirror.is_busy:
            log.warning(
                "the checkpoint of step %d is not in the mirror %s yet (%s); the next commit makes "
                "up for it",
                step,
                mirror.location,
                "there is a stop" if is_stopped() else f"it took nothing for {mirror.silent:.0f} s",
            )

    def _retire(self, step: int, guard: dict[str, Any]) -> list[Path]:
        self._rule = replace(self._config.retention(), before=trouble_began(guard))
        in_use = [] if self.mirror is None else [self.mirror.offer(step, self._rule)]
        return checkpoint.retire(self._run, self._rule, newest=step, in_use=in_use)

    def _check_room(self, step: int, shares: list[Share], state: dict[str, Any]) -> None:
        try:
            check_room(self._run, step, shares, state)
        except StorageError:
            if self.mirror is None or self.committed is None:
                raise
            # One that stays for its copy in the mirror alone goes before a save fails.
            retired = checkpoint.retire(self._run, self._rule, newest=self.committed.step)
            self.mirror.give_up([int(folder.name.removeprefix("step-")) for folder in retired])
            checkpoint.remove(retired)
            check_room(self._run, step, shares, state)

    def _remove(self, folders: list[Path]) -> None:
        def goes_on() -> None:
            # A later owner may be writing one of these steps again.
            self.check_owner()
            self._goes_on()

        checkpoint.remove(folders, goes_on=goes_on)

    def _write(
        self,
        step: int,
        copied: Future[Arrays],
        ranges: dict[str, list[Range]],
        total_bytes: int,
    ) -> tuple[dict[str, Any], float]:
        arrays = copied.result()
        begun = time.monotonic()
        faults.point("write", step)
        folder = checkpoint.step_folder(self._run, step)
        entry = write_slices(
            folder,
            self._world.rank,
            arrays,
            ranges,
            total_bytes=total_bytes,
            goes_on=self._goes_on,
        )
        return entry, time.monotonic() - begun

    def _goes_on(self) -> None:
        self._num_pieces += 1


def _flipped(copy: Callable[[], Arrays]) -> Arrays:
    arrays = copy()
    flip_bit(torch.from_numpy(next(iter(arrays.values()))[0]))
    return arrays


def _one_value(rows: list[list[dict[str, float]]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for scalars in (item for row in rows for item in row):
        for key, value in scalars.items():
            if found.setdefault(key, value) != value:
                raise CheckpointError(
                    f"optimizer state {key!r} differs between partitions: {found[key]} and {value}"
                )
    return found
