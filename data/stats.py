"""What a dataset is made of: counts, document lengths, copies, and what packing and reading cost.

Every token is read once and checked, as `headrace data verify` does; then the first samples of the
default order are read as a trainer reads them. Cost: 1 s per GB plus 3 us per document. Memory:
one chunk, what a reader keeps (data/kept.py), and data/repeats.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.arrays import check_lens, check_tokens, hash_tokens
from data.config import AccessError, DataError
from data.manifest import Manifest, ShardEntry, read_manifest
from data.order import Geometry, locate
from data.pack import PackedSource, chunk_lens, packed_sources
from data.places import Place, place_of
from data.plans import planned_lengths, read_plan
from data.repeats import RepeatCounter, Repeats
from data.shard_index import index_of, index_path
from data.tokens import TokenSource

MEASURED_TOKENS = 2**27
"""How far the default order is followed: one window of it."""


@dataclass
class SourceStats:
    """One source of one split."""

    split: str
    source: str
    shards: int = 0
    tokens: int = 0
    documents: int = 0
    disk_bytes: int = 0
    """Shards and their indexes."""
    samples_per_epoch: int = 0
    unused_tokens: int = 0
    """Tokens that no sample of an epoch has as its target: cut off at the ends of blocks."""
    cut_documents: int = 0
    """Documents that no sample of concatenated tokens holds whole."""
    read_amplification: float = 0.0
    """Bytes read from files over bytes used, by one reader in the default order; 0: no sample."""


@dataclass(frozen=True)
class Stats:
    """All of a dataset."""

    dataset: str
    fingerprint: str
    vocab_size: int
    seq_len: int
    tokens: int
    documents: int
    sources: tuple[SourceStats, ...]
    plans: tuple[PackedSource, ...]
    """What `headrace data pack` has made, for every length."""
    text_bytes: int | None
    """Of the text that was stored; None where the preparation did not count it."""
    bytes_per_token: float | None
    length_histogram: dict[int, int]
    """Power of two -> documents with at least so many tokens and fewer than twice as many."""
    longest_document: int
    longer_than_seq_len: int
    """Documents with more than seq_len tokens."""
    repeats: Repeats
    disk_bytes: int
    disk_over_tokens: float
    """Bytes of shards and indexes over the bytes of their tokens."""
    epochs: dict[str, float] = field(default_factory=dict)
    """Training source -> passes that a run makes over it; empty without a run."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def dataset_stats(
    dataset: str | Path | Place,
    *,
    seq_len: int,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Stats:
    """Read a dataset once and say what it holds. DataError when it is damaged."""
    place = place_of(dataset)
    manifest = read_manifest(place)
    lengths: Counter[int] = Counter()
    counter = RepeatCounter()
    longest = longer = 0
    for number, entry in enumerate(manifest.shards):
        for length, digest in _documents(place, manifest, entry):
            lengths[length.bit_length() - 1] += 1
            longest, longer = max(longest, length), longer + (length > seq_len)
            counter.add(digest, length, is_train=entry.split == "train")
        progress("read", number + 1, len(manifest.shards))
    sources = tuple(
        _source(place, manifest, split, name, seq_len, seed)
        for split in ("train", "val")
        for name in manifest.source_names(split)
    )
    tokens, disk = sum(s.tokens for s in sources), sum(s.disk_bytes for s in sources)
    text_bytes = _text_bytes(manifest)
    return Stats(
        dataset=str(place),
        fingerprint=manifest.fingerprint,
        vocab_size=manifest.vocab_size,
        seq_len=seq_len,
        tokens=tokens,
        documents=sum(s.documents for s in sources),
        sources=sources,
        plans=_plans(place, manifest),
        text_bytes=text_bytes,
        bytes_per_token=None if text_bytes is None else text_bytes / tokens,
        length_histogram={2**power: lengths[power] for power in sorted(lengths)},
        longest_document=longest,
        longer_than_seq_len=longer,
        repeats=counter.result(),
        disk_bytes=disk,
        disk_over_tokens=disk / (tokens * np.dtype(manifest.dtype).itemsize),
    )


def _documents(
    place: Place, manifest: Manifest, entry: ShardEntry
) -> Iterator[tuple[int, xxhash.xxh3_128]]:
    """Length and hash of every document of a shard, all of it checked."""
    path, dtype = place.path(entry.path), np.dtype(manifest.dtype)
    index = index_of(place, entry.path, entry.idx_sha256)
    for number, listed in enumerate(index.chunks):
        named: Any = {"shard": entry.path, "number": number, "index": index}
        chunk = listed.alone() if place.by_chunk else listed
        with ExitStack() as held:
            lens = place.open_array(listed.array("lens", **named))
            held.callback(os.close, lens)
            file = place.open_array(listed.array("tokens", **named))
            held.callback(os.close, file)
            tokens = check_tokens(file, path, chunk, dtype, manifest.vocab_size)
            begin = 0
            for length in check_lens(lens, path, chunk).tolist():
                if length == 0:
                    raise DataError(f"{path}, chunk {chunk.key}: a document of no tokens")
                if tokens is not None:
                    yield length, xxhash.xxh3_128(tokens[begin : begin + length].data)
                else:
                    yield length, hash_tokens(file, path, chunk, dtype, begin, length)
                begin += length


def _source(
    place: Place, manifest: Manifest, split: str, name: str, seq_len: int, seed: int
) -> SourceStats:
    entries = manifest.source_shards(split, name)
    found = SourceStats(
        split,
        name,
        shards=len(entries),
        tokens=sum(entry.tokens for entry in entries),
        documents=sum(entry.documents for entry in entries),
        disk_bytes=sum(entry.bytes + _index_bytes(place, entry) for entry in entries),
    )
    geometry = Geometry(found.tokens, manifest.block_tokens, seq_len)
    if seq_len <= manifest.block_tokens:
        found.samples_per_epoch = geometry.num_samples
    if found.samples_per_epoch:
        found.cut_documents = _cut(place, entries, geometry)
    found.unused_tokens = found.tokens - found.samples_per_epoch * seq_len
    count = min(found.samples_per_epoch, max(MEASURED_TOKENS // seq_len, 1))
    if count:
        source = TokenSource(place, manifest, split, name)
        _, offsets = locate(np.arange(count), geometry, seed=seed, source=name)
        for offset in offsets.tolist():
            source.read(offset, offset + seq_len + 1)
        # One token of a sample is also the first one of the next.
        used = count * seq_len * np.dtype(manifest.dtype).itemsize
        found.read_amplification = source.bytes_read / used
    return found


def _cut(place: Place, entries: tuple[ShardEntry, ...], geometry: Geometry) -> int:
    """Documents that no sample of concatenated tokens holds whole."""
    begin = count = 0
    for entry in entries:
        for lens in chunk_lens(place, entry):
            ends = begin + np.cumsum(lens)
            blocks, inside = np.divmod(ends - lens, geometry.block_tokens)
            slots = np.minimum(inside // geometry.seq_len, geometry.samples_per_block - 1)
            starts = blocks * geometry.block_tokens + slots * geometry.seq_len
            numbers = blocks * geometry.samples_per_block + slots
            whole = (ends <= starts + geometry.seq_len + 1) & (numbers < geometry.num_samples)
            count += int((~whole).sum())
            begin = int(ends[-1])
    return count


def _plans(place: Place, manifest: Manifest) -> tuple[PackedSource, ...]:
    """Of every length that has a plan for these data."""
    found: list[PackedSource] = []
    for seq_len in planned_lengths(place):
        try:
            found += packed_sources(read_plan(place, manifest, seq_len), manifest)
        except AccessError:
            raise
        except DataError:
            # Unfinished, stale or damaged: `headrace data verify` tells which.
            continue
    return tuple(found)


def _index_bytes(place: Place, entry: ShardEntry) -> int:
    with place.open(index_path(Path(entry.path)).as_posix(), entry.idx_sha256) as file:
        return os.fstat(file.fileno()).st_size


def _text_bytes(manifest: Manifest) -> int | None:
    found = [count for name, count in manifest.counts.items() if name.startswith("text_bytes_")]
    return sum(found) if found else None
