"""Which documents repeat an earlier one, for input of any size and any number of workers.

Every part leaves its signatures, and its band keys in sorted order. Keys are resolved range by
range: a range holds every document whose keys lie there, whatever its part, so ranges need nothing
of each other and a process holds about 2^18 keys at once. In a group of equal keys the first
document is compared with all others; those that differ from it form a group again. The links that
were found join documents to clusters, and the first document of a cluster, in the order of the
input, stays: documents are numbered as they come, so nothing depends on workers or interruptions.
Clusters are joined in a file of labels, 8 bytes per document, mapped piece by piece.
Cost: near about 1 s per 100,000 documents; the files of all jobs are opened once per range. Memory:
a range; documents with one key in common are in one range, however many they are (16 bytes each).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.durable import writing
from data.jobs import Job
from data.minhash import METHODS
from data.sealed_arrays import SealedArray, save

Kind = Literal["exact", "near"]
RANGE_KEYS = 2**18
_BLOCK = 2**15
_KEY_BITS = 64
_READ = 2**20


Signed = tuple[NDArray[Any], NDArray[np.uint64]]
"""Of each document: its signature, and its keys."""


def sign(kind: Kind, texts: Sequence[str]) -> Signed:
    """What is compared of documents."""
    signatures = METHODS[kind].sign(texts)
    return signatures, METHODS[kind].bands(signatures)


def write_signatures(folder: Path, number: int, kind: Kind, signed: Sequence[Signed]) -> None:
    """Leave what is compared of the documents of a job, given piece by piece."""
    pieces = signed or [sign(kind, [])]
    keys = np.concatenate([bands for _, bands in pieces])
    rows = np.repeat(np.arange(len(keys), dtype=np.uint32), keys.shape[1])
    order = np.argsort(keys, axis=None, kind="stable")
    save(_file(folder, number, "signatures"), np.concatenate([found for found, _ in pieces]))
    save(_file(folder, number, "keys"), keys.reshape(-1)[order])
    save(_file(folder, number, "rows"), rows[order])


@dataclass(frozen=True)
class RangeJob(Job):
    """The keys from `number` to `number + 1` of `2^bits` equal ranges, in all jobs of cleaning."""

    signed: Path
    """Where the signatures are."""
    kind: Kind
    bits: int
    offsets: tuple[int, ...]
    """Number of the first document of each job, and of all documents."""

    @property
    def result(self) -> Path:
        return self.folder / f"links-{self.bits}-{self.number:06d}.npy"

    def run(self) -> None:
        """Find the pairs (earlier, later) of documents that are alike and have a key in common."""
        keys, ids = _keys_of(self)
        links = _links(keys, ids, lambda left, right: _alike(self, left, right))
        save(self.result, np.unique(links, axis=0))


def range_jobs(
    folder: Path,
    signed: Path,
    kind: Kind,
    num_documents: Sequence[int],
    range_keys: int = RANGE_KEYS,
) -> list[RangeJob]:
    """Every range of keys once; how many there are depends on the documents alone."""
    offsets = tuple(np.cumsum([0, *num_documents]).tolist())
    bands = sign(kind, [""])[1].shape[1]
    bits = max(0, offsets[-1] * bands // range_keys).bit_length()
    return [RangeJob(folder, n, 1, signed, kind, bits, offsets) for n in range(1 << bits)]


def join_clusters(
    labels: Path, num_documents: int, links: Iterable[NDArray[np.int64]], block: int = _BLOCK
) -> None:
    """Write the file of labels: of each document the number of the first one of its cluster, or of
    another one of it that comes before; the first has its own.
    """
    with writing(labels), labels.open("wb") as file:
        for start in range(0, num_documents, _READ):
            np.arange(start, min(num_documents, start + _READ), dtype=np.int64).tofile(file)
    for found in links:
        for start in range(0, len(found), block):
            # Mapped anew for each block, so that what was touched does not add up.
            label = np.memmap(labels, np.int64, "r+")
            _join(label, *found[start : start + block].T)


def repeated_rows(labels: Path, num_documents: Sequence[int]) -> Iterator[NDArray[np.int64]]:
    """For each job the documents, counted in it, that repeat an earlier one of any job."""
    with labels.open("rb") as file:
        start = 0
        for count in num_documents:
            label = np.fromfile(file, np.int64, count)
            yield np.flatnonzero(label != np.arange(start, start + count))
            start += count


def _join(label: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Union-find, all links at once: labels only ever point to earlier documents."""
    ids = np.concatenate([left, right])
    while True:
        first = _first(label, ids)
        # Paths become short where they are walked.
        label[ids] = first
        low, high = np.sort(first.reshape(2, -1), axis=0)
        differ = low != high
        if not differ.any():
            return
        np.minimum.at(label, high[differ], low[differ])


def _first(label: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The label that is its own, from each document on."""
    while True:
        further = label[ids]
        if np.array_equal(further, ids):
            return ids
        ids = further


def _keys_of(job: RangeJob) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Keys in the range with their documents, sorted by key, then document."""
    width = 1 << (_KEY_BITS - job.bits)
    first, last = job.number * width, (job.number + 1) * width - 1
    keys, ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for number, offset in enumerate(job.offsets[:-1]):
        if offset == job.offsets[number + 1]:
            continue
        of_part = SealedArray(_file(job.signed, number, "keys"))
        start, stop = of_part.range_of(first, last)
        rows = SealedArray(_file(job.signed, number, "rows"))
        keys.append(of_part.rows(start, stop))
        ids.append(rows.rows(start, stop).astype(np.int64) + offset)
    every_key, every_id = np.concatenate(keys), np.concatenate(ids)
    order = np.lexsort((every_id, every_key))
    return every_key[order], every_id[order]


Alike = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]


def _links(keys: NDArray[np.uint64], ids: NDArray[np.int64], alike: Alike) -> NDArray[np.int64]:
    """Compare all of a group with its first; who differs from it forms a group with its equals."""
    links = [np.zeros((0, 2), np.int64)]
    while len(ids) > 1:
        later = np.r_[False, keys[1:] == keys[:-1]]
        firsts = np.maximum.accumulate(np.where(later, 0, np.arange(len(ids))))[later]
        pairs = np.stack([ids[firsts], ids[later]], axis=1)
        blocks = [pairs[start : start + _BLOCK] for start in range(0, len(pairs), _BLOCK)]
        same = np.concatenate([np.zeros(0, bool), *(alike(b[:, 0], b[:, 1]) for b in blocks)])
        links.append(pairs[same])
        keys, ids = keys[later][~same], ids[later][~same]
    return np.concatenate(links)


def _alike(job: RangeJob, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
    shared = (_signatures(job, left) == _signatures(job, right)).mean(axis=1)
    found: NDArray[np.bool_] = (shared >= METHODS[job.kind].min_shared) | (left == right)
    return found


def _signatures(job: RangeJob, ids: NDArray[np.int64]) -> NDArray[Any]:
    """The signatures of documents, read part by part."""
    order = np.argsort(ids, kind="stable")
    offsets = np.array(job.offsets)
    cuts = np.searchsorted(ids[order], offsets)
    blocks = []
    for number in np.flatnonzero(np.diff(cuts)).tolist():
        stored = SealedArray(_file(job.signed, number, "signatures"))
        of_job = ids[order[cuts[number] : cuts[number + 1]]]
        blocks.append(stored.take(of_job - offsets[number]))
    sorted_rows = np.concatenate(blocks)
    rows = np.empty_like(sorted_rows)
    rows[order] = sorted_rows
    return rows


def _file(folder: Path, number: int, name: str) -> Path:
    return folder / f"{number:06d}.{name}.npy"
