"""From a checkpoint into a live engine, at any ZeRO stage and world size; train/saver.py is the way
back.

Every rank reads only what it holds; nothing is gathered. A load first reads and verifies everything
into host memory, then all ranks agree, and only then is the engine touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from train import checkpoint
from train.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from train.choice import Choice, choose
from train.engine import Engine
from train.inventory import check_same
from train.slice_reader import SliceReader
from train.waiting import wait_for_all
from train.world import RankError, World
from train.zero_state import Flat

log = logging.getLogger(__name__)


def load_checkpoint(engine: Engine, world: World, saved: Checkpoint) -> None:
    """Collective. Replace weights and optimizer state by those of `saved`; on failure the engine is
    as it was.
    """
    flats = engine.flats()
    loaded: list[dict[str, np.ndarray]] = []
    with world.together(f"reading {saved.folder}"):
        # Before anybody reads: a rank that refuses would leave the others waiting for it there.
        check_same(saved.inventory, engine.inventory, str(saved.folder))
    with world.together(f"reading {saved.folder}"):
        loaded = _read_beside(world, flats, saved)
    with torch.no_grad():
        for flat, arrays in zip(flats, loaded, strict=True):
            # All padding: there the optimizer begins at its next step, as in a new run.
            scalars = saved.scalars if flat.fragments else {}
            flat.prepare([key for key in arrays if key != "param"], scalars)
            tensors = flat.tensors()
            for key, array in arrays.items():
                position = 0
                for fragment in flat.fragments:
                    target = tensors[key].narrow(0, fragment.offset, fragment.length)
                    target.copy_(torch.from_numpy(array[position : position + fragment.length]))
                    position += fragment.length
    engine.refresh()


def load_newest(
    engine: Engine, world: World, run: Path, *, mend: Callable[[int], bool] = lambda step: False
) -> Checkpoint | None:
    """Collective. Load the newest checkpoint that verifies; `mend` as in `load_first`.

    Returns None when the run has no checkpoint at all; raises CheckpointError when it has some and
    none is usable, because starting again from nothing would throw away the run.
    """
    steps = world.broadcast(checkpoint.committed(run) if world.is_main else None)
    return load_first(engine, world, run, steps, mend=mend).require()


def load_first(
    engine: Engine, world: World, run: Path, steps: Sequence[int], *, mend: Callable[[int], bool]
) -> Choice:
    """Collective. Load the first of these checkpoints that verifies; each one passed over is
    reported once, with its reason. The engine is as it was when there is none.

    `mend` is asked for one that does not, and says whether it put it right; its CheckpointError is
    one reason more.
    """

    def take(run: Path, step: int) -> Checkpoint:
        try:
            return _load(engine, world, run, step)
        except RankError as error:
            try:
                is_mended = mend(step)
            except CheckpointError as copy:
                told = f"{error}; the mirror is no help: {copy}"
                raise RankError(told, error.exit_code) from error
            if not is_mended:
                raise
            if world.is_main:
                log.warning("checkpoint mended from the mirror: %s", error)
        return _load(engine, world, run, step)

    choice = choose(run, steps, take=take, failures=RankError)
    for passed in choice.passed_over if world.is_main and choice.taken else ():
        step = choice.taken and choice.taken.step
        reason = f"step {passed.step}: {passed.reason}"
        log.warning("checkpoint not usable, going on from step %s: %s", step, reason)
    return choice


def _load(engine: Engine, world: World, run: Path, step: int) -> Checkpoint:
    """Collective. Load the checkpoint of a step, one and the same on all ranks."""
    with world.together(f"opening the checkpoint of step {step}"):
        saved = open_checkpoint(run, step)
    committed = world.broadcast(saved.manifest.get("time"))
    with world.together(f"opening the checkpoint of step {step}"):
        if saved.manifest.get("time") != committed:
            raise CheckpointError(
                f"{saved.folder / checkpoint.MANIFEST} is of another commit here than on rank "
                "0: this machine sees an older state of the file system; mount it again here"
            )
    load_checkpoint(engine, world, saved)
    return saved


def _read_beside(world: World, flats: list[Flat], saved: Checkpoint) -> list[dict[str, np.ndarray]]:
    """Collective. What `_read` returns, from a thread: a rank with a slow disk keeps the others
    waiting, and none of them is taken for one that stands still.
    """
    num_pieces = 0

    def goes_on() -> None:
        nonlocal num_pieces
        num_pieces += 1

    saved.reader.goes_on = goes_on
    with ThreadPoolExecutor(1, "load") as pool:
        read = pool.submit(_read, flats, saved.reader, saved.keys)
        wait_for_all(world, lambda: not read.done(), place="load", progress=lambda: num_pieces)
    return read.result()


def _read(
    flats: list[Flat], reader: SliceReader, keys: tuple[str, ...]
) -> list[dict[str, np.ndarray]]:
    """For each flat what is stored for it, by kind; its fragments one after the other."""
    kept = [
        (number, key)
        for number, flat in enumerate(flats)
        for key in keys
        if any(reader.has(part.name, key) for part in flat.fragments)
    ]
    parts = iter(
        reader.read_all(
            [
                (part.name, key, part.start, part.length)
                for number, key in kept
                for part in flats[number].fragments
            ]
        )
    )
    arrays: list[dict[str, np.ndarray]] = [{} for _ in flats]
    for number, key in kept:
        arrays[number][key] = np.concatenate([next(parts) for _ in flats[number].fragments])
    return arrays
