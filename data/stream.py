"""A dataset split, or several mixed, as an endless, permuted stream of samples.

Sample i depends on the dataset, the seed and i alone: phase and mixture choose the source, the
order the place in it, the reader brings the tokens. So the state of a run's data is the number
of consumed samples, and whoever holds the dataset can recompute what any step was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.config import DataError, DataUsageError
from data.mixture import Mixture
from data.order import Ints, where
from data.order import locate as place
from data.phases import Phases, first_phase
from data.sources import Data, Datasets, Source, check_continues, open_datasets
from data.tokens import Document

PACKING = "concat"


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
    """The documents, whole or in part, that make up the sample's seq_len + 1 tokens."""


class SampleStream:
    """Samples of a split, seq_len + 1 tokens each: seq_len inputs and, one further, their targets.

    DataUsageError when the dataset cannot give one such sample.
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
    ) -> None:
        datasets = (
            data
            if isinstance(data, Datasets)
            else open_datasets(data, seq_len=seq_len, split=split)
        )
        self.seq_len = seq_len
        self.vocab_size = datasets.vocab_size
        self.fingerprint = datasets.fingerprint
        self.tokenizer_sha256 = datasets.tokenizer_sha256
        self.bos = datasets.bos
        """Whether every document begins with BOS."""
        self._eos_id = datasets.eos_id
        self.seed = seed
        self._shuffle = shuffle
        self.sources = {source.name: source for source in datasets.sources}
        geometries = [source.geometry for source in datasets.sources]
        self.told: set[str] = set()
        """Damage that this process has warned of."""
        self.num_samples_per_epoch = sum(geometry.num_samples for geometry in geometries)
        fingerprints = datasets.fingerprints()
        if phases is None:
            phases = Phases([first_phase(1, datasets.slots(), fingerprints)])
        self.mixture = Mixture(phases.mixture())
        self._fingerprints = {name: phases.fingerprints[name] for name in self.mixture.names}
        check_continues(self._fingerprints, fingerprints)

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
            tokens, starts = self.source(number).tokens, offsets[chosen].tolist()
            tokens.read_rows(starts, rows, chosen.tolist(), damaged)
        return rows

    def placement(self, sample: int) -> Placement:
        """Where a sample comes from."""
        sources, epochs, offsets = self.locate(np.array([sample], dtype=np.int64))
        source, offset = self.source(int(sources[0])), int(offsets[0])
        shard, chunk, token_offset = source.tokens.place(offset)
        return Placement(
            sample=sample,
            source=source.name,
            epoch=int(epochs[0]),
            shard=shard,
            chunk=chunk,
            token_offset=token_offset,
            documents=tuple(source.tokens.documents(offset, offset + self.seq_len + 1)),
        )

    def documents(self, sample: int) -> tuple[Document, ...]:
        """The documents, whole or in part, that make up a sample."""
        return self.placement(sample).documents

    def samples_of(self, source: int, start: int, stop: int, epoch: int) -> list[int]:
        """The samples that hold some of tokens [start, stop) of a source in one of its epochs; a
        sample that no phase comes to is left out.
        """
        indices = where(
            start,
            stop,
            self.source(source).geometry,
            epoch=epoch,
            seed=self.seed,
            source=self.mixture.names[source],
            shuffle=self._shuffle,
        )
        found: list[int] = self.mixture.samples_of(source, indices).tolist()
        return found

    def epochs(self, num_samples: int) -> dict[str, float]:
        """Passes over each source that the first `num_samples` samples make."""
        counts = self.mixture.counts(num_samples)
        return {
            name: counts[name] / source.geometry.num_samples
            for name, source in self.sources.items()
            if name in counts
        }

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """What a checkpoint says of its data, as plain values; of phases that have not begun it
        says nothing.
        """
        reached = max(consumed_samples, 1)
        phases = [phase for phase in self.mixture.state() if phase["start"] < reached]
        names = sorted({name for phase in phases for name in phase["slots"]})
        return {
            "consumed_samples": consumed_samples,
            "seed": self.seed,
            "packing": PACKING,
            "phases": [{"seq_len": self.seq_len, **phase} for phase in phases],
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
    "packing": "Start a new run directory",
    "phases": "Continue with the old seq_len, or start a new run directory",
    "fingerprints": "Name the dataset that the run began with, or start a new run directory",
}
