"""Datasets of a few thousand tokens, written through the real writer with a stand-in tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.manifest import Manifest, ShardEntry, dtype_for, write_manifest
from data.shards import Named, write_shard

VOCAB_SIZE = 300
EOS = 2


def documents(count: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[NDArray[Any]]:
    """Documents of 1 to 200 random ids, each ending in EOS."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 200, size=count)
    return [np.append(random.integers(4, vocab_size, size=n), EOS) for n in lengths]


def write_dataset(
    folder: Path,
    sources: Mapping[str, Sequence[NDArray[Any]]],
    *,
    vocab_size: int = VOCAB_SIZE,
    shard_bytes: int = 4000,
    block_tokens: int = 512,
    named: bool = False,
) -> Manifest:
    """A dataset of the given sources, named "SPLIT/SOURCE"; `named` documents have ids."""
    entries: list[ShardEntry] = []
    for name, texts in sources.items():
        for number, part in enumerate(cut(texts, shard_bytes)):
            path = folder / name / f"shard-{number:06d}.tar"
            ided = [Named(ids, f"{name}-{number}-{i}") for i, ids in enumerate(part)]
            entries.append(write_shard(path, ided if named else part, dtype_for(vocab_size)))
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(b"stands for a tokenizer")
    return write_manifest(
        folder,
        entries,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        special_ids={"unk": 0, "bos": 1, "eos": EOS, "pad": 3},
        preparation={"vocab_size": vocab_size},
        split_rule="written by a test",
        block_tokens=block_tokens,
    )


def cut(texts: Sequence[NDArray[Any]], shard_bytes: int) -> list[list[NDArray[Any]]]:
    """Runs of documents whose tokens take about `shard_bytes` each, at 2 bytes a token."""
    parts: list[list[NDArray[Any]]] = []
    size = shard_bytes
    for ids in texts:
        if size >= shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(ids)
        size += 2 * len(ids)
    return parts


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Damage one bit of a file in place."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)
