"""What a sample of a source holds: a run of its tokens, or the parts of documents of a plan.

Both kinds number their samples in the order of the text and place them by the same geometry
(data/order.py), so the order of training knows no difference. Concat: T tokens, cut every seq_len
inside blocks. BestFit: N samples of a plan stand for N * seq_len + 1 tokens, and a block for as
many samples as it holds seq_len tokens, so windows keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.manifest import Manifest, read_manifest
from data.order import Geometry, Ints, slots_of, window_ends
from data.packing import Parts
from data.places import Place
from data.plans import PlanReader, read_plan
from data.tokens import TokenSource


class Samples(Protocol):
    """The samples of one source of one split, for one seq_len. An offset is what `locate` gives."""

    @property
    def tokens(self) -> TokenSource:
        """What they are cut from."""

    @property
    def geometry(self) -> Geometry:
        """Where they lie."""

    @property
    def num_targets(self) -> int:
        """Targets of an epoch."""

    def at(self, seq_len: int) -> Samples:
        """The same source in samples of another length."""

    def read_rows(
        self,
        offsets: Sequence[int],
        rows: NDArray[np.uint32],
        places: Sequence[int],
        damaged: dict[int, str] | None = None,
    ) -> None:
        """Row places[i] becomes the seq_len + 1 tokens of the sample at offsets[i]. With `damaged`,
        one that touches damage is zeros, and entered there by its place.
        """

    def parts(self, offset: int) -> Parts:
        """The runs of tokens that make up a sample, starts counted in tokens of the source."""

    def slots_of(self, start: int, stop: int) -> Ints:
        """The samples, counted in the order of the text, that hold some of tokens [start, stop)."""

    def window_ends(self, epoch: int, *, seed: int, source: str) -> Ints:
        """After how many samples of an epoch the tokens that were read are the same ones in samples
        of every length; the last of these is the end of the epoch.
        """


@dataclass(frozen=True)
class Concat:
    """Samples that are cut from the tokens wherever they end."""

    tokens: TokenSource
    geometry: Geometry

    @property
    def num_targets(self) -> int:
        """Every place of every sample."""
        return self.geometry.num_samples * self.geometry.seq_len

    def at(self, seq_len: int) -> Concat:
        """Cut at other places."""
        return replace(self, geometry=replace(self.geometry, seq_len=seq_len))

    def read_rows(
        self,
        offsets: Sequence[int],
        rows: NDArray[np.uint32],
        places: Sequence[int],
        damaged: dict[int, str] | None = None,
    ) -> None:
        """DataError when the tokens are damaged and nobody keeps account."""
        self.tokens.read_rows(offsets, rows, places, damaged)

    def parts(self, offset: int) -> Parts:
        """One."""
        return Parts(np.array([offset]), np.array([self.geometry.seq_len + 1]))

    def slots_of(self, start: int, stop: int) -> Ints:
        """By arithmetic."""
        return slots_of(start, stop, self.geometry)

    def window_ends(self, epoch: int, *, seed: int, source: str) -> Ints:
        """Those of the windows of the order, but for what blocks of each length cannot fill."""
        return window_ends(self.geometry, seed=seed, source=source, epoch=epoch)


class BestFit:
    """Samples of a plan that `headrace data pack` has made. DataUsageError when there is none."""

    def __init__(
        self, tokens: TokenSource, place: Place, manifest: Manifest, split: str, seq_len: int
    ) -> None:
        self.tokens = tokens
        self._place = place
        self._split = split
        plan = read_plan(place, manifest, seq_len)
        self._plan = PlanReader(plan, manifest, split, tokens.name)
        num_samples = self._plan.num_samples
        block = manifest.block_tokens // seq_len * seq_len
        self.geometry = Geometry(num_samples * seq_len + 1 if num_samples else 0, block, seq_len)

    @property
    def num_targets(self) -> int:
        """Every token but the first of each document."""
        return self._plan.num_targets

    def at(self, seq_len: int) -> BestFit:
        """By another plan."""
        if seq_len == self.geometry.seq_len:
            return self
        # Not kept: the list of a large dataset's shards would go to every loader process.
        manifest = read_manifest(self._place)
        return BestFit(self.tokens, self._place, manifest, self._split, seq_len)

    def read_rows(
        self,
        offsets: Sequence[int],
        rows: NDArray[np.uint32],
        places: Sequence[int],
        damaged: dict[int, str] | None = None,
    ) -> None:
        """What no part fills is zeros. DataError when the plan is damaged, or tokens are and nobody
        keeps account.
        """
        for offset, place in zip(offsets, places, strict=True):
            found: dict[int, str] | None = None if damaged is None else {}
            parts, end = self.parts(offset), 0
            for start, size in zip(parts.starts.tolist(), parts.lens.tolist(), strict=True):
                begin, end = end, end + size
                self.tokens.read_rows([start], rows[place : place + 1, begin:end], [0], found)
            rows[place, end:] = 0
            if damaged is not None and found:
                rows[place], damaged[place] = 0, found[0]

    def parts(self, offset: int) -> Parts:
        """Those of the plan."""
        return self._plan.parts(offset // self.geometry.seq_len)

    def slots_of(self, start: int, stop: int) -> Ints:
        """By a search through the plan of the shards that hold the range."""
        return self._plan.samples_of(start, stop)

    def window_ends(self, epoch: int, *, seed: int, source: str) -> Ints:
        """Only that of the epoch: the plan of another length has other documents together."""
        return np.array([self.geometry.num_samples], dtype=np.int64)
