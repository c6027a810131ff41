"""What a rank owns of the state, at one moment: copied to host memory, from where it is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from train.engine import Engine
from train.room import Share, share
from train.slices import Range
from train.world import World
from train.zero_state import Flat


class Snapshot:
    """Copies into buffers that every save fills again."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(
        self, flats: Sequence[Flat], *, copied: bool
    ) -> tuple[dict[str, list[np.ndarray]], dict[str, list[Range]]]:
        """What this rank owns, by kind: flat fp32 values, and the ranges that they are. Not
        `copied`, and on a CPU, the values are the state itself: training has to wait for who uses
        them.
        """
        pieces: dict[str, list[torch.Tensor]] = {}
        for flat in flats:
            for key, tensor in flat.tensors().items():
                for part in flat.owned:
                    pieces.setdefault(key, []).append(tensor.narrow(0, part.offset, part.length))
        found = {}
        for key, parts in pieces.items():
            if copied or parts[0].is_cuda:
                found[key] = [self._copied(key, parts)]
            else:
                found[key] = [part.numpy() for part in parts]
        return found, _ranges(flats)

    def _copied(self, key: str, parts: list[torch.Tensor]) -> np.ndarray:
        size = sum(map(len, parts))
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) != size:
            # Pinned memory takes a copy from a GPU several times as fast.
            pinned = parts[0].is_cuda
            buffer = self._buffers[key] = torch.empty(size, dtype=torch.float32, pin_memory=pinned)
        end = 0
        for part in parts:
            begin, end = end, end + len(part)
            buffer[begin:end].copy_(part)
        return buffer.numpy()


def checkpoint_shares(engine: Engine, world: World, *, to_come: Sequence[str] = ()) -> list[Share]:
    """Collective. What each rank adds to a checkpoint of this engine as it is now, or will be once
    it has the optimizer state `to_come`.
    """
    ranges = _ranges(engine.flats(), to_come=to_come)
    return world.gather(share(world.rank, ranges, engine.inventory))


def _ranges(flats: Sequence[Flat], *, to_come: Sequence[str] = ()) -> dict[str, list[Range]]:
    found: dict[str, list[Range]] = {}
    for flat in flats:
        for key in {**flat.tensors(), **dict.fromkeys(to_come)}:
            for part in flat.owned:
                found.setdefault(key, []).append((part.name, part.start, part.length))
    return found
