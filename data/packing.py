"""Best-fit packing: which documents share a sample when none that would fit is cut.

A sample has seq_len + 1 places for tokens. A document that is longer is cut into parts that begin
seq_len tokens apart: they overlap by one, the last target of one is the first input of the next, so
every token but the first of each document is a target exactly once. The parts are put, longest
first, into the fullest sample that still has room (best-fit decreasing). Concatenation pads nothing
and cuts a large part of the documents; this cuts none that fits and pads what no part is short
enough for. Lengths are small integers, so the samples are kept by the room that is left: no
sorting, no search tree. Plans are made chunk by chunk, so the parts of a sample lie close together.
Cost: 2.6 s per million parts; memory: a few integers per part of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Parts:
    """Documents, whole or in part, each a run of tokens that one sample holds."""

    starts: Ints
    """First token of each, counted from the start of the first document."""
    lens: Ints

    @property
    def num_targets(self) -> int:
        """Tokens that follow another one of their part."""
        return int(self.lens.sum()) - len(self.lens)


@dataclass(frozen=True)
class PackedChunk:
    """The samples of a chunk; number n holds the parts firsts[n] ... firsts[n + 1] - 1."""

    firsts: Ints
    parts: Parts
    num_cut: int
    """Documents that are longer than a sample."""


def cut(lens: Sequence[int] | NDArray[np.integer], seq_len: int) -> Parts:
    """The parts of documents in their order. One of a single token has no target and no part."""
    lens = np.asarray(lens, dtype=np.int64)
    begins = np.cumsum(lens) - lens
    counts = np.maximum(-(-(lens - 1) // seq_len), 0)
    # The place of each part in its document.
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = places * seq_len
    left = np.repeat(lens, counts) - skipped
    return Parts(np.repeat(begins, counts) + skipped, np.minimum(left, seq_len + 1))


def best_fit(sizes: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Samples of at most `capacity` tokens that hold every part, by its number, once.

    The same sizes give the same samples. Within one, parts come longest first.
    """
    by_size: list[list[int]] = [[] for _ in range(capacity + 1)]
    for number, size in enumerate(np.asarray(sizes).tolist()):
        assert 0 < size <= capacity, "a part holds a token and fits"
        by_size[size].append(number)
    samples: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = _Rooms()
    for size in range(capacity, 0, -1):
        for part in by_size[size]:
            room = rooms.smallest(size)
            if room is None:
                samples.append([])
                sample, room = len(samples) - 1, capacity
            else:
                sample = by_room[room].pop()
                if not by_room[room]:
                    rooms.discard(room)
            samples[sample].append(part)
            left = room - size
            if left:
                by_room[left].append(sample)
                rooms.add(left)
    return samples


def pack(lens: Sequence[int] | NDArray[np.integer], seq_len: int) -> PackedChunk:
    """The samples of documents that lie one after another.

    Parts of a sample, and samples by their first parts, stand in the order of the text: whoever
    reads only the first samples gets the first documents, not the longest ones.
    """
    parts = cut(lens, seq_len)
    samples = sorted(sorted(sample) for sample in best_fit(parts.lens, seq_len + 1))
    order = np.array([part for sample in samples for part in sample], dtype=np.int64)
    firsts = np.cumsum([0, *map(len, samples)], dtype=np.int64)
    num_cut = int(np.count_nonzero(np.asarray(lens) > seq_len + 1))
    return PackedChunk(firsts, Parts(parts.starts[order], parts.lens[order]), num_cut)


class _Rooms:
    """A set of small numbers as the bits of one integer: the next one up costs one shift."""

    def __init__(self) -> None:
        self._bits = 0

    def add(self, room: int) -> None:
        self._bits |= 1 << room

    def discard(self, room: int) -> None:
        self._bits &= ~(1 << room)

    def smallest(self, at_least: int) -> int | None:
        """The smallest member that is not below `at_least`."""
        above = self._bits >> at_least
        return at_least + (above & -above).bit_length() - 1 if above else None
