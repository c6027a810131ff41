"""Show what a training step was made of: its samples, their text, and the hash that proves it.

The answer needs the dataset and the run's seed, seq_len and batch size, nothing else; its
`data_hash` equals the one in the step's row of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataUsageError, OnDamage
from data.sources import Datasets, open_datasets
from data.stream import Placement, SampleStream, sample_hash


@dataclass(frozen=True)
class Piece:
    """One document's part of a sample."""

    shard: str
    number: int
    """Position of the document in its shard."""
    first_token: int
    """Where the part begins in the document; 0 when the sample holds its beginning."""
    num_tokens: int
    id: str | None
    """What its input called it (`headrace prepare --id-field`); None where no ids are kept."""
    text: str


@dataclass(frozen=True)
class InspectedSample:
    """A sample with its text."""

    sample: int
    source: str
    epoch: int
    shard: str
    chunk: str
    token_offset: int
    """Of the first token, counted from the start of the shard; -1 where damage hides it."""
    hash: str
    """As in `data_hash`, 16 hex digits."""
    pieces: tuple[Piece, ...]
    quarantined: str = ""
    """What is damaged, where a sample that touches it trains nothing; its tokens are zeros then."""


@dataclass(frozen=True)
class Inspection:
    """A step with its samples [first, last)."""

    dataset: str
    step: int
    first: int
    last: int
    seed: int
    seq_len: int
    data_hash: str
    samples: tuple[InspectedSample, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def inspect(
    dataset: Path,
    *,
    step: int,
    seed: int,
    seq_len: int,
    batch_samples: int,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Inspection:
    """The samples of a training step; steps count from 1, step N covers [(N-1)*G, N*G).

    `decode` turns ids into text; the dataset's own tokenizer does when it is not given. DataError
    when the data is damaged, DataUsageError for a step that cannot be.
    """
    if step < 1:
        raise DataUsageError(f"step {step} does not exist; steps count from 1")
    datasets = open_datasets(dataset, seq_len=seq_len)
    stream = SampleStream(datasets, seq_len=seq_len, seed=seed)
    if decode is None:
        decode = decoder(datasets)
    first, last = (step - 1) * batch_samples, step * batch_samples
    return inspect_samples(stream, step=step, first=first, last=last, decode=decode)


def inspect_samples(
    stream: SampleStream,
    *,
    step: int,
    first: int,
    last: int,
    decode: Callable[[Sequence[int]], str],
    on_damage: OnDamage = "fail",
) -> Inspection:
    """Samples [first, last), all or some of those of a step; with on_damage="quarantine" those that
    touch damage are said to.
    """
    total = 0
    samples = []
    for sample in range(first, last):
        damaged: dict[int, str] | None = {} if on_damage == "quarantine" else None
        tokens = stream.batch(np.array([sample], dtype=np.int64), damaged)[0]
        hashed = sample_hash(sample, tokens)
        total += hashed
        if damaged:
            samples.append(_quarantined(stream, sample, hashed, damaged[0]))
        else:
            samples.append(_inspected(stream.placement(sample), hashed, tokens.tolist(), decode))
    return Inspection(
        dataset=" ".join(sorted({str(source.dataset) for source in stream.sources.values()})),
        step=step,
        first=first,
        last=last,
        seed=stream.seed,
        seq_len=stream.seq_len,
        data_hash=f"{total % 2**64:016x}",
        samples=tuple(samples),
    )


def _quarantined(stream: SampleStream, sample: int, hashed: int, damage: str) -> InspectedSample:
    """What can be said without the damaged files."""
    sources, epochs, offsets = stream.locate(np.array([sample], dtype=np.int64))
    source = stream.source(int(sources[0]))
    return InspectedSample(
        sample=sample,
        source=source.name,
        epoch=int(epochs[0]),
        shard=source.tokens.shard_of(int(offsets[0])),
        chunk="",
        token_offset=-1,
        hash=f"{hashed:016x}",
        pieces=(),
        quarantined=damage,
    )


def _inspected(
    placement: Placement, hashed: int, ids: list[int], decode: Callable[[Sequence[int]], str]
) -> InspectedSample:
    pieces = []
    begin = 0
    for part in placement.documents:
        text = decode(ids[begin : begin + part.num_tokens])
        pieces.append(Piece(**vars(part), text=text))
        begin += part.num_tokens
    return InspectedSample(
        sample=placement.sample,
        source=placement.source,
        epoch=placement.epoch,
        shard=placement.shard,
        chunk=placement.chunk,
        token_offset=placement.token_offset,
        hash=f"{hashed:016x}",
        pieces=tuple(pieces),
    )


def decoder(datasets: Datasets) -> Callable[[Sequence[int]], str]:
    """From ids to text with the tokenizer of datasets. DataError when it is not the one."""
    from data.tokenizer import load_tokenizer
    from data.verify import tokenizer_of

    place, file = datasets.places[0]
    folder = tokenizer_of(place, file, datasets.tokenizer_sha256, datasets.special_ids)
    return load_tokenizer(folder).decode
