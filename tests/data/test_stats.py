"""Statistics are those of a count by hand; copies are found however they are spread."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data import arrays, kept, order, repeats, shards, stats
from data.config import DataError
from data.manifest import read_manifest
from data.repeats import RepeatCounter
from data.shard_index import index_path, read_index
from data.stats import Stats, dataset_stats
from tests.data.tiny import documents, flip_bit, write_dataset

TRAIN = [*documents(60), *documents(60)[:10], np.array([7, 7, 2])]
VAL = [*documents(60)[:3], *documents(4, seed=1)]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 500)
    write_dataset(tmp_path, {"train/a": TRAIN[:50], "train/b": TRAIN[50:], "val/text": VAL})
    return tmp_path


def test_counts_and_lengths_are_those_of_the_documents(dataset: Path) -> None:
    found = dataset_stats(dataset, seq_len=100)
    lengths = [len(ids) for ids in TRAIN + VAL]
    assert (found.tokens, found.documents) == (sum(lengths), len(lengths))
    assert found.longest_document == max(lengths)
    assert found.longer_than_seq_len == sum(length > 100 for length in lengths)
    expected = Counter(2 ** int(np.log2(length)) for length in lengths)
    assert found.length_histogram == dict(sorted(expected.items()))
    assert [(s.split, s.source, s.tokens) for s in found.sources] == [
        ("train", "a", sum(lengths[:50])),
        ("train", "b", sum(lengths[50:71])),
        ("val", "text", sum(lengths[71:])),
    ]
    assert all(s.samples_per_epoch * 100 + s.unused_tokens == s.tokens for s in found.sources)
    on_disk = sum(p.stat().st_size for p in dataset.rglob("shard-*"))
    assert found.disk_bytes == on_disk
    assert found.disk_over_tokens == on_disk / (2 * sum(lengths))
    assert json.loads(json.dumps(found.to_json()))["repeats"]["documents"] > 0


def test_copies_are_counted_once_each_and_across_the_split(dataset: Path) -> None:
    _check_copies(dataset_stats(dataset, seq_len=100))


def test_copies_are_counted_the_same_in_bounded_memory(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "BUFFERED", 7)
    monkeypatch.setattr(arrays, "LARGEST_CACHED_CHUNK", 100)
    monkeypatch.setattr(arrays, "_PIECE_BYTES", 64)
    _check_copies(dataset_stats(dataset, seq_len=100))


def test_a_reader_that_keeps_all_chunks_reads_each_byte_once(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = dataset_stats(dataset, seq_len=20).sources[0].read_amplification
    assert 1 <= once < 1.25
    monkeypatch.setattr(kept, "KEPT_TOKENS", 0)
    assert dataset_stats(dataset, seq_len=20).sources[0].read_amplification > 1.8


def test_reading_a_window_of_the_default_order_costs_at_most_three_tenths_more() -> None:
    """Every chunk is read whole for its check, and of its tokens three quarters stay: one sample
    in four is read once more.
    """
    random = np.random.default_rng(0)
    texts = [np.append(random.integers(4, 300, size=2**13 - 1), 2) for _ in range(2**9)]
    with tempfile.TemporaryDirectory(prefix="headrace-window-") as name:
        sources = {"train/main": texts * 2**5}
        write_dataset(Path(name), sources, shard_bytes=2**25, block_tokens=2**19)
        (source,) = dataset_stats(name, seq_len=2048).sources
    assert source.tokens == stats.MEASURED_TOKENS == order.WINDOW_TOKENS
    assert 1.2 < source.read_amplification <= 1.3


def test_a_sequence_longer_than_a_block_gives_no_sample(dataset: Path) -> None:
    found = dataset_stats(dataset, seq_len=513)
    assert [s.samples_per_epoch for s in found.sources] == [0, 0, 0]
    assert [s.read_amplification for s in found.sources] == [0, 0, 0]


def test_damage_ends_the_count(dataset: Path) -> None:
    path = dataset / read_manifest(dataset).shards[0].path
    flip_bit(path, read_index(index_path(path)).chunks[0].tokens_offset)
    with pytest.raises(DataError, match=rf"{path}, chunk 000000-00000: its tokens are"):
        dataset_stats(dataset, seq_len=100)


def test_no_document_gives_no_copy() -> None:
    counter = RepeatCounter()
    assert counter.result().documents == 0
    counter.add(xxhash.xxh3_128(b"once"), 4, is_train=True)
    assert counter.result().documents == 0


def _check_copies(found: Stats) -> None:
    texts = [tuple(ids.tolist()) for ids in TRAIN + VAL]
    seen = Counter(texts)
    copies = {text: count - 1 for text, count in seen.items() if count > 1}
    train = set(texts[: len(TRAIN)])
    assert found.repeats.documents == sum(copies.values()) >= 13
    assert found.repeats.tokens == sum(len(text) * count for text, count in copies.items())
    assert found.repeats.val_documents_in_train == sum(t in train for t in texts[len(TRAIN) :])
