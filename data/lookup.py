"""From a document to the samples and steps that train on it: the stream asked backwards.

A pure function of dataset, order and phases; no log of the run is needed. Cost: a few milliseconds
per epoch, whatever the size of the data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataUsageError
from data.phases import Phases
from data.places import is_at
from data.sources import Source
from data.stream import SampleStream

MAX_EPOCHS = 8
"""Epochs that are listed at most."""


@dataclass(frozen=True)
class Occurrence:
    """A sample that holds a part of the document."""

    epoch: int
    sample: int
    step: int | None
    """Of the run; None when the run ends before."""


@dataclass(frozen=True)
class Lookup:
    """Where a document is trained on."""

    source: str
    shard: str
    number: int
    first_token: int
    """Of the document, counted from the start of its source."""
    num_tokens: int
    id: str | None
    """What its input called it; None where the dataset keeps no ids."""
    occurrences: tuple[Occurrence, ...]
    """By epoch, and in the order of training."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def look_up(
    stream: SampleStream,
    phases: Phases,
    *,
    shard: str,
    number: int,
    steps: int,
    dataset: str | Path | None = None,
) -> Lookup:
    """The samples that hold some of document `number` of `shard` (SPLIT/SOURCE/FILE) in the epochs
    that a run of `steps` steps reaches, in one at least.

    DataUsageError when there is no such document, or several datasets have one.
    """
    source = _source(stream, shard, dataset)
    start, stop = source.tokens.document_range(shard, number)
    k = stream.mixture.names.index(source.name)
    total = phases.samples(steps)[1]
    epochs = int(np.ceil(stream.epochs(total)[source.name]))
    found = []
    for epoch in range(max(1, min(epochs, MAX_EPOCHS))):
        for sample in stream.samples_of(k, start, stop, epoch):
            step = phases.step_of(sample) if sample < total else None
            found.append(Occurrence(epoch, sample, step))
    [document] = source.tokens.documents(start, stop)
    return Lookup(source.name, shard, number, start, stop - start, document.id, tuple(found))


def _source(stream: SampleStream, shard: str, dataset: str | Path | None) -> Source:
    near = [
        source
        for source in stream.sources.values()
        if source.tokens.has_shard(shard) and (dataset is None or is_at(source.dataset, dataset))
    ]
    if not near:
        raise DataUsageError(
            f"no dataset of training has a shard {shard!r}; name it as `headrace data inspect "
            "--step N` shows it, such as train/main/shard-000000.tar:12"
        )
    if len(near) > 1:
        names = ", ".join(str(source.dataset) for source in near)
        raise DataUsageError(
            f"shard {shard!r} is in several datasets ({names}); name one of them as DATASET"
        )
    return near[0]
