"""A dataset split as an endless, permuted stream of samples.

Sample i depends on the dataset, the seed and i alone: phase and mixture choose the source, the
order the place in it, the reader brings the tokens. So the state of a run's data is the number
of consumed samples, and whoever holds the dataset can recompute what any step was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.config import DataError, DataUsageError
from data.manifest import read_manifest
from data.mixture import Mixture, Phase
from data.order import Geometry, Ints, locate
from data.tokens import Document, TokenSource

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
        dataset: str | Path,
        *,
        seq_len: int,
        seed: int,
        split: str = "train",
        shuffle: bool = True,
    ) -> None:
        folder = Path(dataset)
        manifest = read_manifest(folder)
        names = manifest.source_names(split)
        if not names:
            found = sorted({entry.split for entry in manifest.shards})
            raise DataUsageError(
                f"{folder} has no split {split!r}, only {', '.join(found)}; prepare it with "
                "`--val-fraction` above 0"
            )
        if seq_len > manifest.block_tokens:
            raise DataUsageError(
                f"seq_len={seq_len} is longer than a block of {folder}, which holds "
                f"{manifest.block_tokens} tokens; lower seq_len"
            )
        self.seq_len = seq_len
        self.vocab_size = manifest.vocab_size
        self.fingerprint = manifest.fingerprint
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.bos = bool(manifest.preparation.get("config", {}).get("bos", False))
        """Whether every document begins with BOS."""
        self._seed = seed
        self._shuffle = shuffle
        self._sources = [TokenSource(folder, manifest, split, name) for name in names]
        self._geometries = [
            Geometry(source.num_tokens, manifest.block_tokens, seq_len) for source in self._sources
        ]
        for source, geometry in zip(self._sources, self._geometries, strict=True):
            if geometry.num_samples == 0:
                raise DataUsageError(
                    f"{folder}: source {source.name!r} of split {split!r} holds "
                    f"{source.num_tokens} tokens, but one sample of seq_len={seq_len} needs "
                    f"{seq_len + 1}; lower seq_len or prepare more text"
                )
        self.num_samples_per_epoch = sum(geometry.num_samples for geometry in self._geometries)
        # Each source by its size, so that sources come to the end of their epochs together.
        sizes = {n: g.num_samples for n, g in zip(names, self._geometries, strict=True)}
        self._mixture = Mixture([Phase(0, sizes)])
        self._fingerprints = {name: manifest.source_fingerprint(split, name) for name in names}

    def tokens(self, sample: int) -> NDArray[np.uint32]:
        """The tokens of a sample, uint32 [seq_len + 1]. DataError when they are damaged."""
        rows: NDArray[np.uint32] = self.batch(np.array([sample], dtype=np.int64))[0]
        return rows

    def batch(self, samples: Ints) -> NDArray[np.uint32]:
        """The tokens of several samples, uint32 [len(samples), seq_len + 1]."""
        rows = np.empty((len(samples), self.seq_len + 1), dtype=np.uint32)
        sources, _, offsets = self._locate(samples)
        for row, source, offset in zip(rows, sources.tolist(), offsets.tolist(), strict=True):
            row[:] = self._sources[source].read(offset, offset + self.seq_len + 1)
        return rows

    def placement(self, sample: int) -> Placement:
        """Where a sample comes from."""
        sources, epochs, offsets = self._locate(np.array([sample], dtype=np.int64))
        source, offset = self._sources[int(sources[0])], int(offsets[0])
        shard, chunk, token_offset = source.place(offset)
        return Placement(
            sample=sample,
            source=source.name,
            epoch=int(epochs[0]),
            shard=shard,
            chunk=chunk,
            token_offset=token_offset,
            documents=tuple(source.documents(offset, offset + self.seq_len + 1)),
        )

    def documents(self, sample: int) -> tuple[Document, ...]:
        """The documents, whole or in part, that make up a sample."""
        return self.placement(sample).documents

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """What a checkpoint says of its data, as plain values."""
        return {
            "consumed_samples": consumed_samples,
            "seed": self._seed,
            "packing": PACKING,
            "phases": [{"seq_len": self.seq_len, **phase} for phase in self._mixture.state()],
            "fingerprints": self._fingerprints,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """DataError when a checkpoint was trained on other data, or in another order."""
        own = self.state(0)
        for name, mine in own.items():
            if name not in state:
                raise DataError(f"the checkpoint's data state has no {name!r}; it is incomplete")
            if name != "consumed_samples" and state[name] != mine:
                raise DataError(
                    f"the checkpoint was trained with {_WHAT[name]} {state[name]}, this run has "
                    f"{mine}; going on would repeat or skip samples. {_CURE[name]}"
                )

    def _locate(self, samples: Ints) -> tuple[Ints, Ints, Ints]:
        """Source index, epoch and token offset of each sample."""
        sources, indices = self._mixture.locate(samples)
        epochs, offsets = np.empty_like(samples), np.empty_like(samples)
        for k in np.unique(sources).tolist():
            chosen = sources == k
            epochs[chosen], offsets[chosen] = locate(
                indices[chosen],
                self._geometries[k],
                seed=self._seed,
                source=self._sources[k].name,
                shuffle=self._shuffle,
            )
        return sources, epochs, offsets


def sample_hash(sample: int, tokens: NDArray[np.uint32]) -> int:
    """xxh3_64 over the sample index as <u8 and then its seq_len + 1 token ids as <u4."""
    digest = xxhash.xxh3_64(sample.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
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
