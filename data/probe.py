"""Whether this machine reads a dataset: its manifest, and one chunk of a few of its shards.

Cost: the manifest, and of each shard that is looked at its index and one chunk (of a command: the
whole shard). Nothing is kept in a cache.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import numpy as np

from data.arrays import check_tokens
from data.config import DataConfig
from data.manifest import Manifest, ShardEntry, read_manifest
from data.places import Place, place_of
from data.shard_index import index_of

NUM_SHARDS = 3
"""Looked at per dataset: the first, the last, and one that differs from machine to machine."""


@dataclass(frozen=True)
class Probe:
    """What was read."""

    fingerprint: str
    """Of all datasets."""
    vocab_size: int
    num_shards: int
    """Shards of which a chunk was read and hashed."""


def probe(config: DataConfig, seed: str) -> Probe:
    """Read a little of every dataset that is named; `seed` chooses which shards. DataError or
    DataUsageError says what cannot be read, or is damaged.
    """
    fingerprints, vocab_size, num_shards = [], 0, 0
    for path in config.paths:
        # The config comes from the command line and a recipe: a person has written its commands.
        place = place_of(path, config, commands=True)
        manifest = read_manifest(place)
        fingerprints.append(manifest.fingerprint)
        vocab_size = manifest.vocab_size
        for entry in _some(manifest, f"{seed} {path}"):
            _read_a_chunk(place, manifest, entry)
            num_shards += 1
    return Probe(" ".join(fingerprints), vocab_size, num_shards)


def _some(manifest: Manifest, seed: str) -> list[ShardEntry]:
    shards = manifest.shards
    chosen = [shards[0], shards[-1], random.Random(seed).choice(shards)]
    return list({entry.path: entry for entry in chosen[:NUM_SHARDS]}.values())


def _read_a_chunk(place: Place, manifest: Manifest, entry: ShardEntry) -> None:
    place.check_size(entry.path, entry.bytes)
    index = index_of(place, entry.path, entry.idx_sha256, original=True)
    if not index.chunks:
        return
    number = len(index.chunks) // 2
    chunk = index.chunks[number]
    file = place.open_original(chunk.array("tokens", shard=entry.path, number=number, index=index))
    try:
        at = chunk.alone() if place.by_chunk else chunk
        path, dtype = place.path(entry.path), np.dtype(manifest.dtype)
        check_tokens(file, path, at, dtype, manifest.vocab_size)
    finally:
        os.close(file)
