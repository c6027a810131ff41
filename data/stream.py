"""A dataset split, or several mixed, as an endless, permuted stream of samples.

Sample i depends on the dataset, the seed and i alone: phase and mixture choose the source, the
order the place in it, the reader brings the tokens. So the state of a run's data is the number
of consumed samples, and whoever holds the dataset can recompute what any step was trained on.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.config import DataError, DataUsageError, Packing
from data.mixture import Mixture
from data.order import Ints, samples_at
from data.order import locate as place
from data.packing import Parts
from data.phases import Phases, first_phase
from data.sources import Data, Datasets, Source, check_continues, open_datasets
from data.tokens import Document


@dataclass(frozen=True)
class Placement:
    """Where a sample comes from."""

    sample: int
    source: str
    epoch: int
    shard: str
    """SPLIT/SOURCE/FILE, relative to the dataset."""
    chunk: str
    token_offset: int
    """Of the first token, counted from the start of the shard."""
    documents: tuple[Document, ...]
    """The documents, whole or in part, that make up the sample's seq_len + 1 tokens; where they
    are fewer, padding does the rest."""


class SampleStream:
    """Samples of a split, seq_len + 1 tokens each: seq_len inputs and, one further, their targets.

    DataUsageError when the dataset cannot give one such sample, or lacks the plan for `packing`.
    Opened datasets bring their own packing.
    """

    def __init__(
        self,
        data: Data | Datasets,
        *,
        seq_len: int,
        seed: int,
        split: str = "train",
        shuffle: bool = True,
        phases: Phases | None = None,
        packing: Packing = "concat",
    ) -> None:
        datasets = (
            data
            if isinstance(data, Datasets)
            else open_datasets(data, seq_len=seq_len, split=split, packing=packing)
        )
        self.packing = datasets.packing
        self.seq_len = seq_len
        self.vocab_size = datasets.vocab_size
        self.fingerprint = datasets.fingerprint
        self.tokenizer_sha256 = datasets.tokenizer_sha256
        self.bos = datasets.bos
        """Whether every document begins with BOS."""
        self._eos_id = datasets.special_ids.get("eos")
        self.seed = seed
        self._shuffle = shuffle
        self.sources = {source.name: source for source in datasets.sources}
        self._lengths = {seq_len: self}
        self.told: set[str] = set()
        """Damage that this process has warned of."""
        fingerprints = datasets.fingerprints()
        if phases is None:
            phases = Phases([first_phase(1, datasets.slots(), fingerprints, seq_len=seq_len)])
        self.mixture = Mixture(phases.mixture())
        self._fingerprints = {name: phases.fingerprints[name] for name in self.mixture.names}
        check_continues(self._fingerprints, datasets.sources)

    def at(self, seq_len: int) -> SampleStream:
        """The stream whose samples have another length: that of other phases of the same run."""
        if seq_len not in self._lengths:
            other = copy(self)
            other.seq_len = seq_len
            # Only those that were ever read so: others need no plan of that length.
            names = self.mixture.read_in(seq_len) & self.sources.keys()
            other.sources = {name: self.sources[name].at(seq_len) for name in names}
            self._lengths[seq_len] = other
        return self._lengths[seq_len]

    def of(self, sample: int) -> SampleStream:
        """The stream that has a sample: with the length of its phase."""
        return self.at(self._length(int(self.mixture.phases_of(np.array([sample]))[0])))

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples of one pass over every source."""
        return sum(source.geometry.num_samples for source in self.sources.values())

    @property
    def eos_id(self) -> int:
        """The id that ends every document. DataUsageError where the dataset has none."""
        if self._eos_id is None:
            raise DataUsageError(
                "the dataset's manifest names no end-of-text id, so nobody can tell where its "
                "documents end; write data.boundaries=ignore"
            )
        return self._eos_id

    def tokens(self, sample: int) -> NDArray[np.uint32]:
        """The tokens of a sample, uint32 [seq_len + 1]. DataError when they are damaged."""
        rows: NDArray[np.uint32] = self.batch(np.array([sample], dtype=np.int64))[0]
        return rows

    def batch(self, samples: Ints, damaged: dict[int, str] | None = None) -> NDArray[np.uint32]:
        """The tokens of several samples, uint32 [len(samples), seq_len + 1]; as `read`."""
        sources, _, offsets = self.locate(samples)
        return self.read(sources, offsets, damaged)

    def read(
        self, sources: Ints, offsets: Ints, damaged: dict[int, str] | None = None
    ) -> NDArray[np.uint32]:
        """The tokens of samples that `locate` has found, uint32 [len(sources), seq_len + 1].

        DataError for a sample that touches damage; with `damaged` it is zeros and entered there,
        by its place, with what is damaged.
        """
        rows = np.empty((len(sources), self.seq_len + 1), dtype=np.uint32)
        for number in set(sources.tolist()):
            chosen = np.flatnonzero(sources == number)
            samples, starts = self.source(number).samples, offsets[chosen].tolist()
            samples.read_rows(starts, rows, chosen.tolist(), damaged)
        return rows

    def parts(self, sources: Ints, offsets: Ints) -> list[Parts]:
        """The runs of tokens that samples which `locate` has found are made of."""
        places = zip(sources.tolist(), offsets.tolist(), strict=True)
        return [self.source(number).samples.parts(offset) for number, offset in places]

    def placement(self, sample: int) -> Placement:
        """Where a sample comes from."""
        sources, epochs, offsets = self.locate(np.array([sample], dtype=np.int64))
        source = self.source(int(sources[0]))
        parts = source.samples.parts(int(offsets[0]))
        runs = list(zip(parts.starts.tolist(), parts.lens.tolist(), strict=True))
        shard, chunk, token_offset = source.tokens.place(runs[0][0])
        return Placement(
            sample=sample,
            source=source.name,
            epoch=int(epochs[0]),
            shard=shard,
            chunk=chunk,
            token_offset=token_offset,
            documents=tuple(
                document
                for start, size in runs
                for document in source.tokens.documents(start, start + size)
            ),
        )

    def documents(self, sample: int) -> tuple[Document, ...]:
        """The documents, whole or in part, that make up a sample."""
        return self.placement(sample).documents

    def samples_of(self, source: int, start: int, stop: int, epoch: int) -> list[int]:
        """The samples that hold some of tokens [start, stop) of a source in one of its epochs; a
        sample that no phase comes to is left out.
        """
        found: list[int] = []
        for seq_len in set(self.mixture.seq_lens):
            samples = self.at(seq_len or self.seq_len).source(source).samples
            indices = samples_at(
                samples.slots_of(start, stop),
                samples.geometry,
                epoch=epoch,
                seed=self.seed,
                source=self.mixture.names[source],
                shuffle=self._shuffle,
            )
            found += self.mixture.samples_of(source, indices, seq_len=seq_len).tolist()
        return sorted(found)

    def epochs(self, num_samples: int) -> dict[str, float]:
        """Passes over each source that the first `num_samples` samples make."""
        counts, units = self.mixture.counts(num_samples), self.mixture.units(num_samples)
        return {
            name: counts[name] / self.at(units.get(name) or self.seq_len).size_of(name)
            for name in self.sources
            if name in counts
        }

    def size_of(self, name: str) -> int:
        """Samples of an epoch of a source."""
        return self.sources[name].geometry.num_samples

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """What a checkpoint says of its data, as plain values; of phases that have not begun it
        says nothing.
        """
        reached = max(consumed_samples, 1)
        phases = [
            {"seq_len": self._length(number), **phase}
            for number, phase in enumerate(self.mixture.state())
            if phase["start"] < reached
        ]
        names = sorted({name for phase in phases for name in phase["slots"]})
        return {
            "consumed_samples": consumed_samples,
            "seed": self.seed,
            "packing": self.packing,
            "phases": phases,
            "fingerprints": {name: self._fingerprints[name] for name in names},
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """DataError when a checkpoint was trained on other data, or in another order."""
        own = self.state(state.get("consumed_samples", 0))
        for name, mine in own.items():
            if name not in state:
                raise DataError(f"the checkpoint's data state has no {name!r}; it is incomplete")
            if name != "consumed_samples" and state[name] != mine:
                raise DataError(
                    f"the checkpoint was trained with {_WHAT[name]} {state[name]}, this run has "
                    f"{mine}; going on would repeat or skip samples. {_CURE[name]}"
                )

    def source(self, number: int) -> Source:
        """A source by its number in the mixture. DataUsageError when its dataset is not named."""
        name = self.mixture.names[number]
        if name not in self.sources:
            raise DataUsageError(
                f"source {name!r} was read in an earlier phase of this run, and its dataset is "
                "not named; name it again to look at those steps"
            )
        return self.sources[name]

    def locate(self, samples: Ints) -> tuple[Ints, Ints, Ints]:
        """Number of the source in the mixture, epoch and token offset of each sample."""
        assert self._has(samples), "samples of this length; those of others are in `at`"
        sources, indices = self.mixture.locate(samples)
        epochs, offsets = np.empty_like(samples), np.empty_like(samples)
        for k in np.unique(sources).tolist():
            chosen = sources == k
            epochs[chosen], offsets[chosen] = place(
                indices[chosen],
                self.source(k).geometry,
                seed=self.seed,
                source=self.mixture.names[k],
                shuffle=self._shuffle,
            )
        return sources, epochs, offsets

    def _length(self, phase: int) -> int:
        return self.mixture.seq_lens[phase] or self.seq_len

    def _has(self, samples: Ints) -> bool:
        phases = np.unique(self.mixture.phases_of(samples)).tolist()
        return all(self._length(phase) == self.seq_len for phase in phases)


def sample_hash(sample: int, tokens: NDArray[np.uint32]) -> int:
    """xxh3_64 over the sample index as <u8 and then its seq_len + 1 token ids as <u4."""
    digest = xxhash.xxh3_64(sample.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(tokens, dtype="<u4").data)
    return digest.intdigest()


_WHAT = {
    "seed": "seed",
    "packing": "packing",
    "phases": "seq_len and mixture",
    "fingerprints": "data of fingerprint",
}
_CURE = {
    "seed": "Continue with the old seed, or start a new run directory",
    "packing": "Continue with the old data.packing, or start a new run directory",
    "phases": "Continue with the old seq_len, or start a new run directory",
    "fingerprints": "Name the dataset that the run began with, or start a new run directory",
}
