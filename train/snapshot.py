"""What a rank owns of the state, at one moment: copied to host memory, from where it is written.

The copy is made in another thread, beside the forward and backward passes of the next step: they
read the weights and change nothing of what is saved. The update waits until it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from train.engine import Engine
from train.room import Share, share
from train.slices import Range
from train.world import World
from train.zero_state import Flat

Parts = dict[str, list[torch.Tensor]]
"""Flat fp32 pieces of the live state, by kind."""
Arrays = dict[str, list[np.ndarray]]
"""The same in host memory, to be written."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""A piece, and its room in a buffer."""


class Snapshots:
    """Copies one state after the other, into buffers that every save fills again."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def begin(self, parts: Parts, *, copied: bool) -> Callable[[], Arrays]:
        """Make room for a copy of the parts as they are now; what makes it is returned, for any
        thread. Until it has, nothing may change the parts. Not `copied`, and on a CPU, the arrays
        are the parts themselves, for as long as somebody uses them.

        RuntimeError when there is no room.
        """
        device = next((part.device for kind in parts.values() for part in kind), None)
        if device is None or (device.type == "cpu" and not copied):
            return lambda: {key: [part.numpy() for part in kind] for key, kind in parts.items()}
        pairs = [pair for key, kind in parts.items() for pair in self._pairs(key, kind)]
        buffers = {key: self._buffers[key] for key in parts}
        copy = partial(_copy, pairs)
        if device.type == "cuda":
            # The GPU may be behind: the state is what it will be at this place of its queue.
            reached = torch.cuda.current_stream(device).record_event()
            # One for all saves: a new one might be among those that collectives use.
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            copy = partial(_copy_from_gpu, pairs, self._stream, reached)

        def make() -> Arrays:
            copy()
            return {key: [buffer.numpy()] for key, buffer in buffers.items()}

        return make

    def _pairs(self, key: str, parts: list[torch.Tensor]) -> Iterator[Pair]:
        size = sum(map(len, parts))
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) != size:
            # Pinned memory takes a copy from a GPU several times as fast.
            pinned = parts[0].is_cuda
            buffer = self._buffers[key] = torch.empty(size, dtype=torch.float32, pin_memory=pinned)
        end = 0
        for part in parts:
            begin, end = end, end + len(part)
            yield part, buffer[begin:end]


def _copy(pairs: Sequence[Pair]) -> None:
    for part, room in pairs:
        # Torch would copy with as many threads as the training beside it.
        np.copyto(room.numpy(), part.numpy())


def _copy_from_gpu(
    pairs: Sequence[Pair], stream: torch.cuda.Stream, reached: torch.cuda.Event
) -> None:
    # A new thread is at the first GPU, and to leave a stream would take memory there.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        stream.wait_event(reached)
        for part, room in pairs:
            room.copy_(part, non_blocking=True)
    stream.synchronize()


def owned(flats: Sequence[Flat]) -> tuple[Parts, dict[str, list[Range]]]:
    """What this rank owns, by kind, as views of the live state; and the ranges that they are."""
    parts: Parts = {}
    for flat in flats:
        for key, tensor in flat.tensors().items():
            for part in flat.owned:
                parts.setdefault(key, []).append(tensor.narrow(0, part.offset, part.length))
    return parts, _ranges(flats)


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
