"""Which documents repeat an earlier one, for input of any size and any number of workers.

Every part leaves its signatures, and its band keys in sorted order. Keys are resolved range by
range: a range holds every document whose keys lie there, whatever its part, so ranges need nothing
of each other and a process holds about 2^18 keys at once. In a group of equal keys the first
document is compared with all others; those that differ from it form a group again. The links that
were found join documents to clusters, and the first document of a cluster, in the order of the
input, stays. Its number is (part, row), so nothing depends on workers or on interruptions.
Cost: near about 1 s per 100,000 documents; all parts are opened once per range. Memory: a range,
and in the end 50 bytes for each link.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.durable import write_durably
from data.minhash import METHODS
from data.pool import Pool, Progress

Kind = Literal["exact", "near"]
RANGE_KEYS = 2**18
_BLOCK = 2**15
_KEY_BITS = 64


@dataclass(frozen=True)
class RangeJob:
    """The keys from `number` to `number + 1` of `2^bits` equal ranges, in all parts."""

    folder: Path
    kind: Kind
    number: int
    bits: int
    offsets: tuple[int, ...]
    """Number of the first document of each part, and of all documents."""


def write_signatures(folder: Path, number: int, kind: Kind, texts: Sequence[str]) -> None:
    """Leave what is compared of the documents of a part."""
    method = METHODS[kind]
    signatures = method.sign(texts)
    bands = method.bands(signatures)
    rows = np.repeat(np.arange(len(texts), dtype=np.uint32), bands.shape[1])
    keys = bands.reshape(-1)
    order = np.argsort(keys, kind="stable")
    save(_file(folder, number, "signatures"), signatures)
    save(_file(folder, number, "keys"), keys[order])
    save(_file(folder, number, "rows"), rows[order])


def repeated_rows(
    folder: Path,
    kind: Kind,
    num_documents: Sequence[int],
    pool: Pool,
    progress: Progress,
    range_keys: int = RANGE_KEYS,
) -> list[NDArray[np.int64]]:
    """For each part the documents, counted in it, that repeat an earlier one of any part."""
    offsets = np.cumsum([0, *num_documents])
    bands = METHODS[kind].bands(METHODS[kind].sign([""])).shape[1]
    bits = max(0, int(offsets[-1]) * bands // range_keys).bit_length()
    ends = tuple(offsets.tolist())
    jobs = (RangeJob(folder, kind, number, bits, ends) for number in range(1 << bits))
    links = [np.zeros((0, 2), np.int64)]
    for done, found in enumerate(pool.map(find_links, jobs), 1):
        links.append(found)
        progress("dedup", done, 1 << bits)
    repeated = _not_first(np.concatenate(links))
    cuts = np.searchsorted(repeated, offsets[1:-1])
    return [
        part - start for part, start in zip(np.split(repeated, cuts), offsets[:-1], strict=True)
    ]


def find_links(job: RangeJob) -> NDArray[np.int64]:
    """Pairs (earlier, later) of documents that are alike and have a key in the range in common;
    what an interrupted call has found is taken from its file."""
    path = job.folder / f"links-{job.bits}-{job.number:06d}.npy"
    if not path.exists():
        keys, ids = _keys_of(job)
        links = _links(keys, ids, lambda left, right: _alike(job, left, right))
        save(path, np.unique(links, axis=0))
    found: NDArray[np.int64] = np.load(path)
    return found


def _keys_of(job: RangeJob) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Keys in the range with their documents, sorted by key, then document."""
    width = 1 << (_KEY_BITS - job.bits)
    first, last = np.uint64(job.number * width), np.uint64((job.number + 1) * width - 1)
    keys, ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for number, offset in enumerate(job.offsets[:-1]):
        if offset == job.offsets[number + 1]:
            continue
        of_part = np.load(_file(job.folder, number, "keys"), mmap_mode="r")
        start = int(np.searchsorted(of_part, first))
        stop = int(np.searchsorted(of_part, last, side="right"))
        rows = np.load(_file(job.folder, number, "rows"), mmap_mode="r")
        keys.append(of_part[start:stop])
        ids.append(rows[start:stop].astype(np.int64) + offset)
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
        stored = np.load(_file(job.folder, number, "signatures"), mmap_mode="r")
        blocks.append(stored[ids[order[cuts[number] : cuts[number + 1]]] - offsets[number]])
    sorted_rows = np.concatenate(blocks)
    rows = np.empty_like(sorted_rows)
    rows[order] = sorted_rows
    return rows


def _not_first(links: NDArray[np.int64]) -> NDArray[np.int64]:
    """Documents that are not the first of their cluster, sorted: union-find, all links at once."""
    members, places = np.unique(links, return_inverse=True)
    left, right = places.reshape(-1, 2).T
    label = np.arange(len(members))
    while True:
        lowest = np.minimum(label[left], label[right])
        joined = label.copy()
        np.minimum.at(joined, left, lowest)
        np.minimum.at(joined, right, lowest)
        # What a label's own label is: paths halve, so a chain takes few rounds.
        joined = joined[joined]
        if np.array_equal(joined, label):
            found: NDArray[np.int64] = members[label != np.arange(len(members))]
            return found
        label = joined


def save(path: Path, array: NDArray[Any]) -> None:
    """Write an array as a whole or not at all."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_durably(path, content.getvalue())


def _file(folder: Path, number: int, name: str) -> Path:
    return folder / f"{number:06d}.{name}.npy"
