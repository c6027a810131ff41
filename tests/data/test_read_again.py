"""What a process reads again is checked again: a disk or a page cache may fail later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data import arrays, kept, shards, tokens
from data.config import DataError
from data.manifest import read_manifest
from data.shard_index import index_path, read_index
from data.tokens import TokenSource
from tests.data.tiny import documents, flip_bit, write_dataset

TEXTS = documents(120)
STREAM = np.concatenate(TEXTS)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Chunks of about 500 tokens, of which two stay in memory, in blocks of 32 tokens."""
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 500)
    monkeypatch.setattr(kept, "KEPT_TOKENS", 1200)
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 64)
    write_dataset(tmp_path / "dataset", {"train/text": TEXTS}, shard_bytes=10**6)
    return tmp_path / "dataset"


def opened(dataset: Path) -> tuple[TokenSource, Path, int]:
    """A source that has read everything once, its only shard, and where the first chunk lies."""
    source = TokenSource(dataset, read_manifest(dataset), "train", "text")
    assert source.read(0, len(STREAM)).tolist() == STREAM.tolist()
    (shard,) = dataset.rglob("shard-*.tar")
    return source, shard, read_index(index_path(shard)).chunks[0].tokens_offset


def test_every_range_is_read_again_as_it_is(dataset: Path) -> None:
    source, _, _ = opened(dataset)
    random = np.random.default_rng(0)
    for _ in range(3000):
        start = int(random.integers(len(STREAM) - 1))
        stop = int(random.integers(start + 1, min(start + 200, len(STREAM)) + 1))
        assert source.read(start, stop).tolist() == STREAM[start:stop].tolist()


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_damage_that_comes_later_is_found(dataset: Path, num_before: int) -> None:
    """Whether the chunk was read again before it came, or not."""
    source, shard, offset = opened(dataset)
    for _ in range(num_before):
        assert source.read(10, 20).tolist() == STREAM[10:20].tolist()
    flip_bit(shard, offset + 2 * 15)
    with pytest.raises(DataError, match=rf"{shard}, chunk .*its tokens are damaged"):
        source.read(10, 20)
    rows, damaged = np.ones((1, 20), np.uint32), {}
    source.read_rows([100], rows, [0], damaged)
    assert not rows.any() and "its tokens are damaged" in damaged[0], "the chunk is known as bad"
    end = len(STREAM)
    assert source.read(end - 50, end).tolist() == STREAM[end - 50 :].tolist()


def test_a_block_that_was_read_wrongly_is_read_again(dataset: Path) -> None:
    """Damage between disk and process goes away: the hash of the chunk decides."""
    source, _, _ = opened(dataset)
    source.read(10, 20)
    sums = source._sums.find((0, 0))
    assert sums is not None
    sums[0] ^= 1
    assert source.read(10, 20).tolist() == STREAM[10:20].tolist()
    assert source._sums.find((0, 0)) is not sums


def test_chunks_too_large_to_keep_are_checked_in_blocks_from_the_first_time(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "LARGEST_CACHED_CHUNK", 100)
    monkeypatch.setattr(arrays, "_PIECE_BYTES", 100)
    source, shard, offset = opened(dataset)
    flip_bit(shard, offset + 2 * 15)
    with pytest.raises(DataError, match="its tokens are damaged"):
        source.read(10, 20)


def test_hashes_of_blocks_are_kept_of_so_many_chunks(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_SUMS", 2)
    source, shard, offset = opened(dataset)
    for start in range(0, len(STREAM), 100):
        source.read(start, min(start + 100, len(STREAM)))
    assert source._sums.find((0, 0)) is None
    assert source.read(10, 20).tolist() == STREAM[10:20].tolist()
    flip_bit(shard, offset + 2 * 15)
    with pytest.raises(DataError, match="its tokens are damaged"):
        source.read(10, 20)
