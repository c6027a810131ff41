"""Between a live engine and a checkpoint: slices out, slices in, at any ZeRO stage and world size.

Every rank writes only what it owns and reads only what it holds; nothing is gathered. A load first
reads and verifies everything into host memory, then all ranks agree, and only then is the engine
touched.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import checkpoint
from train.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from train.engine import Engine
from train.ownership import Ownership
from train.slices import Range, SliceReader, write_slices
from train.world import RankError, World
from train.zero_state import Flat

log = logging.getLogger(__name__)


def save_checkpoint(
    engine: Engine,
    world: World,
    run: Path,
    *,
    step: int,
    state: dict[str, Any],
    keep: int,
    owner: Ownership | None = None,
) -> None:
    """Collective. Commit a checkpoint of this step, then remove all but the newest `keep`.

    RankError on every rank when one of them cannot write, what it wrote is removed again; and when
    `owner` (rank 0's) has lost the run to a later attempt, whose files are left alone.
    """
    try:
        _save(engine, world, run, step=step, state=state, keep=keep, owner=owner)
    except RankError:
        # Whoever has taken the run over may be writing the same step.
        if world.is_main and not (owner is not None and owner.is_lost):
            checkpoint.discard(run, step)
        raise


def _save(
    engine: Engine,
    world: World,
    run: Path,
    *,
    step: int,
    state: dict[str, Any],
    keep: int,
    owner: Ownership | None,
) -> None:
    check = owner.check if owner is not None else lambda: None
    with world.together(f"making room for the checkpoint of step {step}"):
        if world.is_main:
            check()
            checkpoint.begin(run, step)
    flats = engine.flats()
    entry: dict[str, Any] = {}
    with world.together(f"writing the checkpoint of step {step}"):
        entry = write_slices(checkpoint.step_folder(run, step), world.rank, *_owned(flats))
    rows = world.gather((entry, _shapes(flats), _scalars(flats)))
    with world.together(f"committing the checkpoint of step {step}"):
        if world.is_main:
            checkpoint.commit(
                checkpoint.step_folder(run, step),
                step=step,
                parameters={name: shape for _, shapes, _ in rows for name, shape in shapes.items()},
                scalars=_one_value([scalars for _, _, scalars in rows]),
                state=state,
                files=[entry for entry, _, _ in rows],
                check=check,
            )
            # A later owner's checkpoints are none of a history that was left.
            check()
            checkpoint.prune(run, keep, newest=step)


def load_checkpoint(engine: Engine, world: World, saved: Checkpoint) -> None:
    """Collective. Replace weights and optimizer state by those of `saved`; on failure the engine is
    as it was.
    """
    flats = engine.flats()
    names = {
        name: shape for shapes in world.gather(_shapes(flats)) for name, shape in shapes.items()
    }
    loaded: list[dict[str, np.ndarray]] = []
    with world.together(f"reading {saved.folder}"):
        _check_parameters(saved, names)
        reader = SliceReader(saved.folder, saved.manifest["files"])
        loaded = [_read(flat, reader, saved.keys) for flat in flats]
    with torch.no_grad():
        for flat, arrays in zip(flats, loaded, strict=True):
            flat.prepare([key for key in arrays if key != "param"], saved.scalars)
            tensors = flat.tensors()
            for key, array in arrays.items():
                position = 0
                for fragment in flat.fragments:
                    target = tensors[key].narrow(0, fragment.offset, fragment.length)
                    target.copy_(torch.from_numpy(array[position : position + fragment.length]))
                    position += fragment.length
    engine.refresh()


def load_newest(engine: Engine, world: World, run: Path) -> Checkpoint | None:
    """Collective. Load the newest checkpoint that verifies; each one passed over is reported once,
    with its reason.

    Returns None when the run has no checkpoint at all; raises CheckpointError when it has some and
    none is usable, because starting again from nothing would throw away the run.
    """
    steps = world.broadcast(checkpoint.committed(run) if world.is_main else None)
    reasons = []
    for step in steps:
        try:
            with world.together(f"opening the checkpoint of step {step}"):
                saved = open_checkpoint(run, step)
            load_checkpoint(engine, world, saved)
        except RankError as failure:
            reasons.append(f"step {step}: {failure}")
            continue
        for reason in reasons if world.is_main else ():
            log.warning("checkpoint not usable, going on from step %d: %s", saved.step, reason)
        return saved
    if reasons:
        raise CheckpointError(
            f"no checkpoint of {run} is usable:\n  "
            + "\n  ".join(reasons)
            + "\nstart a new run with another --run, "
            f"or remove {run / 'checkpoints'} to train this one again from step 0"
        )
    return None


def _owned(flats: list[Flat]) -> tuple[dict[str, np.ndarray], dict[str, list[Range]]]:
    pieces: dict[str, list[torch.Tensor]] = {}
    ranges: dict[str, list[Range]] = {}
    for flat in flats:
        for key, tensor in flat.tensors().items():
            for part in flat.owned:
                pieces.setdefault(key, []).append(tensor.narrow(0, part.offset, part.length))
                ranges.setdefault(key, []).append((part.name, part.start, part.length))
    arrays = {key: torch.cat(parts).float().cpu().numpy() for key, parts in pieces.items()}
    return arrays, ranges


def _read(flat: Flat, reader: SliceReader, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays = {}
    for key in keys:
        stored = [reader.has(part.name, key) for part in flat.fragments]
        if not any(stored):
            continue
        parts = [reader.read(part.name, key, part.start, part.length) for part in flat.fragments]
        arrays[key] = np.concatenate(parts)
    return arrays


def _shapes(flats: list[Flat]) -> dict[str, tuple[int, ...]]:
    return {part.name: part.shape for flat in flats for part in flat.fragments}


def _scalars(flats: list[Flat]) -> list[dict[str, float]]:
    # A partition that is all padding has no parameter and may lag behind.
    return [flat.scalars() for flat in flats if flat.fragments]


def _one_value(rows: list[list[dict[str, float]]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for scalars in (item for row in rows for item in row):
        for key, value in scalars.items():
            if found.setdefault(key, value) != value:
                raise CheckpointError(
                    f"optimizer state {key!r} differs between partitions: {found[key]} and {value}"
                )
    return found


def _check_parameters(saved: Checkpoint, names: dict[str, tuple[int, ...]]) -> None:
    stored = saved.parameters
    for name in sorted(stored.keys() | names.keys()):
        there, here = stored.get(name), names.get(name)
        if there != here:
            raise CheckpointError(
                f"{saved.folder} is of another model: {name!r} has shape {there or 'none'} there, "
                f"{here or 'none'} here"
            )
