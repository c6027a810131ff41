"""`headrace data pack`: make the best-fit plan of a dataset for samples of one length.

Shards are planned one by one from the lengths of their documents alone; no token is read. The plan
is written beside the data (data/plans.py), plan.json last, so that a kill leaves the old plan, or
one that nobody takes for finished. Equal data gives equal bytes, for any number of workers.
Cost: 3 s per million documents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.arrays import check_lens
from data.claim import holding
from data.config import AccessError, DataError, DataUsageError, MissingError
from data.durable import remove_leftovers, write_durably, writing
from data.manifest import Manifest, ShardEntry, read_manifest
from data.packing import pack
from data.places import Place, place_of
from data.plans import (
    LENGTH_BITS,
    PLAN,
    PackedShard,
    Plan,
    open_plan_file,
    plan_bytes,
    plan_folder,
    plan_name,
    read_plan,
    write_plan,
)
from data.pool import Pool, Progress
from data.shard_index import index_of


@dataclass(frozen=True)
class PackedSource:
    """What a plan makes of one source of one split."""

    seq_len: int
    split: str
    source: str
    documents: int
    cut_documents: int
    """Those that are longer than a sample."""
    samples: int
    targets: int
    """Every token but the first of each document, once."""
    padding: float
    """Share of the samples' targets that are none."""


@dataclass(frozen=True)
class PackedDataset:
    """A plan and what it holds."""

    dataset: str
    seq_len: int
    sources: tuple[PackedSource, ...]
    was_complete: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def pack_dataset(
    dataset: Path,
    *,
    seq_len: int,
    workers: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> PackedDataset:
    """Plan both splits of a dataset, unless that was done. DataUsageError when samples of seq_len
    cannot be cut from it, DataError when it is damaged.
    """
    manifest = read_manifest(dataset)
    limit = min(manifest.block_tokens, 2**LENGTH_BITS - 1)
    if not 0 < seq_len <= limit:
        raise DataUsageError(
            f"--seq-len {seq_len}: samples of {dataset} hold 1 to {limit} targets; choose another"
        )
    folder = plan_folder(dataset, seq_len)
    with holding(folder):
        plan = finished_plan(place_of(dataset), manifest, seq_len)
        was_complete = plan is not None
        if plan is None:
            with writing(folder):
                # An old plan must not vouch for new files.
                (folder / PLAN).unlink(missing_ok=True)
            remove_leftovers(folder)
            shards = _pack_shards(dataset, manifest, seq_len, workers, progress)
            write_plan(dataset, manifest, seq_len, shards)
            plan = read_plan(place_of(dataset), manifest, seq_len)
    return PackedDataset(str(dataset), seq_len, packed_sources(plan, manifest), was_complete)


def finished_plan(place: Place, manifest: Manifest, seq_len: int) -> Plan | None:
    """The plan that was made before, after hashing all of it; None when it must be made (again)."""
    try:
        plan = read_plan(place, manifest, seq_len)
        for entry, shard in zip(manifest.shards, plan.shards, strict=True):
            os.close(open_plan_file(place, seq_len, entry.path, shard.sha256))
    except MissingError:
        return None
    except AccessError:
        raise
    except DataError:
        return None
    return plan


def packed_sources(plan: Plan, manifest: Manifest) -> tuple[PackedSource, ...]:
    """Samples and padding of every source of a plan."""
    return tuple(
        _packed_source(plan, manifest, split, name)
        for split in ("train", "val")
        for name in manifest.source_names(split)
    )


def _packed_source(plan: Plan, manifest: Manifest, split: str, name: str) -> PackedSource:
    entries = manifest.source_shards(split, name)
    row = manifest.shards.index(entries[0])
    shards = plan.shards[row : row + len(entries)]
    samples, targets = sum(s.samples for s in shards), sum(s.targets for s in shards)
    return PackedSource(
        seq_len=plan.seq_len,
        split=split,
        source=name,
        documents=sum(entry.documents for entry in entries),
        cut_documents=sum(s.cut for s in shards),
        samples=samples,
        targets=targets,
        padding=1 - targets / (samples * plan.seq_len) if samples else 0.0,
    )


def pack_shard(place: Place, entry: ShardEntry, seq_len: int) -> tuple[bytes, PackedShard]:
    """The file of a shard, and what plan.json says of it."""
    begin, packings = 0, []
    for lens in chunk_lens(place, entry):
        packings.append((begin, pack(lens, seq_len)))
        begin += int(lens.sum())
    return plan_bytes(packings)


def chunk_lens(place: Place, entry: ShardEntry) -> Iterator[NDArray[np.int64]]:
    """The document lengths of every chunk of a shard, checked."""
    index = index_of(place, entry.path, entry.idx_sha256)
    for number, listed in enumerate(index.chunks):
        chunk = listed.alone() if place.by_chunk else listed
        array = listed.array("lens", shard=entry.path, number=number, index=index)
        file = place.open_array(array)
        try:
            yield check_lens(file, place.path(entry.path), chunk).astype(np.int64)
        finally:
            os.close(file)


def _pack_shards(
    dataset: Path, manifest: Manifest, seq_len: int, workers: int, progress: Progress
) -> list[PackedShard]:
    for parent in {Path(entry.path).parent for entry in manifest.shards}:
        folder = plan_folder(dataset, seq_len) / parent
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    shards = []
    with Pool(workers) as pool:
        packed = pool.map(partial(_write_shard, dataset, seq_len), manifest.shards)
        for number, shard in enumerate(packed, 1):
            shards.append(shard)
            progress("pack", number, len(manifest.shards))
    return shards


def _write_shard(dataset: Path, seq_len: int, entry: ShardEntry) -> PackedShard:
    content, shard = pack_shard(place_of(dataset), entry, seq_len)
    write_durably(dataset / plan_name(seq_len, entry.path), content)
    return shard
