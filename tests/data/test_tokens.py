"""Ranges of a source across chunks and shards, checked on first touch, with bounded memory."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data import arrays, kept, shards, tokens
from data.config import DataError, MissingError
from data.manifest import read_manifest
from data.shard_index import index_path, read_index
from data.tokens import TokenSource
from tests.data.tiny import documents, flip_bit, write_dataset

TEXTS = documents(60)
STREAM: NDArray[np.int64] = np.concatenate(TEXTS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    _write(folder)
    return folder


@pytest.fixture
def own_dataset(tmp_path: Path) -> Path:
    """One that a test may damage."""
    _write(tmp_path)
    return tmp_path


def test_the_source_is_the_documents_one_after_another(dataset: Path) -> None:
    source = _source(dataset)
    assert source.num_tokens == len(STREAM)
    found = source.read(0, len(STREAM))
    assert found.dtype == np.uint32
    assert found.tolist() == STREAM.tolist()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_range_is_joined_from_its_pieces(dataset: Path, data: st.DataObject) -> None:
    source = _source(dataset)
    for _ in range(3):
        start = data.draw(st.integers(0, len(STREAM) - 1))
        stop = data.draw(st.integers(start + 1, len(STREAM)))
        assert source.read(start, stop).tolist() == STREAM[start:stop].tolist()


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_documents_of_a_range_are_named(dataset: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(STREAM) - 1))
    stop = data.draw(st.integers(start + 1, min(start + 2000, len(STREAM))))
    source = _source(dataset)
    parts = list(source.documents(start, stop))

    texts = iter(TEXTS)
    by_shard = {
        entry.path: [next(texts) for _ in range(entry.documents)]
        for entry in read_manifest(dataset).source_shards("train", "text")
    }
    joined = [
        by_shard[part.shard][part.number][part.first_token :][: part.num_tokens] for part in parts
    ]
    assert np.concatenate(joined).tolist() == STREAM[start:stop].tolist()
    assert all(part.first_token == 0 for part in parts[1:])


def test_chunks_that_leave_the_cache_are_read_in_ranges(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "KEPT_TOKENS", 1250)
    monkeypatch.setattr(tokens, "MAX_FILES", 2)
    monkeypatch.setattr(tokens, "MAX_INDEXES", 2)
    before = len(os.listdir("/proc/self/fd"))
    source = _source(dataset)
    random = np.random.default_rng(0)
    for start in random.integers(0, len(STREAM) - 100, size=300).tolist():
        assert source.read(start, start + 100).tolist() == STREAM[start : start + 100].tolist()
    assert 500 <= source._kept.tokens <= 1250
    # The mapped table may hold one file more.
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_chunks_too_large_to_keep_are_checked_piece_by_piece(
    own_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "LARGEST_CACHED_CHUNK", 100)
    monkeypatch.setattr(arrays, "_PIECE_BYTES", 64)
    source = _source(own_dataset)
    assert source.read(0, len(STREAM)).tolist() == STREAM.tolist()
    assert source._kept.tokens == 0

    shard, chunk = _damage_chunk(own_dataset, 1, 1)
    with pytest.raises(DataError, match=rf"{shard}, chunk {chunk}: its tokens are damaged"):
        _source(own_dataset).read(0, len(STREAM))


def test_a_flipped_bit_names_shard_and_chunk(own_dataset: Path) -> None:
    shard, chunk = _damage_chunk(own_dataset, 1, 1)
    source = _source(own_dataset)
    source.read(0, 500)
    with pytest.raises(DataError, match=rf"{shard}, chunk {chunk}: its tokens are damaged \(xxh3"):
        source.read(0, len(STREAM))


def test_damaged_document_lengths_name_shard_and_chunk(own_dataset: Path) -> None:
    entry = read_manifest(own_dataset).shards[0]
    chunk = read_index(index_path(own_dataset / entry.path)).chunks[0]
    flip_bit(own_dataset / entry.path, chunk.lens_offset)
    source = _source(own_dataset)
    source.read(0, len(STREAM))
    with pytest.raises(DataError, match=rf"{chunk.key}: its document lengths are damaged"):
        list(source.documents(0, 10))


def test_a_cut_shard_is_refused_when_it_is_opened(own_dataset: Path) -> None:
    path = own_dataset / read_manifest(own_dataset).shards[1].path
    size = path.stat().st_size
    os.truncate(path, size - 512)
    with pytest.raises(
        DataError, match=rf"{path} is damaged: {size - 512} bytes, the manifest says"
    ):
        _source(own_dataset).read(0, len(STREAM))


def test_a_shard_cut_while_it_is_open_is_refused(
    own_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "KEPT_TOKENS", 0)
    source = _source(own_dataset)
    source.read(0, 100)
    os.truncate(own_dataset / read_manifest(own_dataset).shards[0].path, 700)
    with pytest.raises(DataError, match=r"chunk 000000-00000: the file ends \d+ bytes too early"):
        source.read(0, 100)


def test_a_missing_shard_or_index_is_named(own_dataset: Path) -> None:
    path = own_dataset / read_manifest(own_dataset).shards[0].path
    path.rename(path.with_name("away"))
    with pytest.raises(DataError, match=rf"{path} cannot be read: No such file"):
        _source(own_dataset).read(0, 10)
    path.with_name("away").rename(path)
    index_path(path).unlink()
    with pytest.raises(DataError, match=rf"{index_path(path)} is missing"):
        _source(own_dataset).read(0, 10)


def test_swapped_shards_are_found(own_dataset: Path) -> None:
    first, second = (own_dataset / s.path for s in read_manifest(own_dataset).shards[:2])
    for a, b in [(first, second), (index_path(first), index_path(second))]:
        a.rename(a.with_name("aside"))
        b.rename(a)
        a.with_name("aside").rename(b)
    with pytest.raises(DataError, match=r"is an intact index, but not the one|is damaged: "):
        _source(own_dataset).read(0, len(STREAM))


def test_an_id_outside_the_vocabulary_names_shard_and_chunk(tmp_path: Path) -> None:
    texts = [*TEXTS[:3], np.array([5, 400, 2])]
    write_dataset(tmp_path, {"train/text": texts}, vocab_size=400)
    with pytest.raises(
        DataError,
        match=r"shard-000000\.tar, chunk 000000-00000: token id 400 is outside the vocabulary of",
    ):
        _source(tmp_path).read(0, 5)


def test_a_copy_sent_to_another_process_reads_on_its_own(dataset: Path) -> None:
    source = _source(dataset)
    source.read(0, 1000)
    raw = pickle.dumps(source)
    assert len(raw) < 3000
    assert pickle.loads(raw).read(500, 1500).tolist() == STREAM[500:1500].tolist()


def test_a_copy_refuses_the_dataset_that_took_the_place_of_its_own(tmp_path: Path) -> None:
    """As a loader process meets it when the link to the dataset is switched before it starts."""
    for seed, name in enumerate(("old", "new")):
        ids = np.random.default_rng(seed).integers(4, 300, 900)
        write_dataset(tmp_path / name, {"train/text": [ids]})
    link = tmp_path / "dataset"
    link.symlink_to("old")
    raw = pickle.dumps(_source(link))
    link.unlink()
    link.symlink_to("new")
    with pytest.raises(DataError, match=r"dataset/shards\.npy is missing or damaged \(its sha256"):
        pickle.loads(raw).read(0, 100)


def test_rows_that_touch_damage_are_the_same_whoever_reads_them(own_dataset: Path) -> None:
    """The number of readers, their order and their caches have no say in what is left out."""
    _damage_chunk(own_dataset, 1, 1)
    os.truncate(own_dataset / read_manifest(own_dataset).shards[2].path, 1000)
    starts = list(range(0, len(STREAM) - 41, 40))
    expected = [_is_damaged(own_dataset, start, start + 41) for start in starts]
    assert 0 < sum(expected) < len(starts) // 2

    for num_readers in (1, 2, 3, 7):
        found: dict[int, str] = {}
        rows = np.ones((len(starts), 41), dtype=np.uint32)
        for rank in range(num_readers):
            places = list(range(rank, len(starts), num_readers))[:: -1 if rank % 2 else 1]
            reader = _source(own_dataset)
            reader.read_rows([starts[place] for place in places], rows, places, found)
        assert [place in found for place in range(len(starts))] == expected
        assert all("damaged" in what for what in found.values())
        for start, row, damaged in zip(starts, rows, expected, strict=True):
            assert row.tolist() == ([0] * 41 if damaged else STREAM[start : start + 41].tolist())


def test_a_shard_that_is_missing_is_not_damage(own_dataset: Path) -> None:
    """A file system that is not mounted must not become a dataset without samples."""
    (own_dataset / read_manifest(own_dataset).shards[0].path).unlink()
    rows = np.zeros((1, 10), dtype=np.uint32)
    with pytest.raises(MissingError, match=r"cannot be read: No such file .*; restore it from a"):
        _source(own_dataset).read_rows([0], rows, [0], {})


def test_damage_is_read_once_and_raises_where_nobody_asked_to_skip_it(own_dataset: Path) -> None:
    _damage_chunk(own_dataset, 0, 0)
    source = _source(own_dataset)
    rows = np.zeros((1, 10), dtype=np.uint32)
    for _ in range(3):
        with pytest.raises(DataError, match="chunk 000000-00000: its tokens are damaged"):
            source.read_rows([0], rows, [0])
    index = read_index(index_path(own_dataset / read_manifest(own_dataset).shards[0].path))
    assert source.bytes_read == 2 * index.chunks[0].tokens


def _is_damaged(dataset: Path, start: int, stop: int) -> bool:
    """By a reader that has read nothing else."""
    try:
        _source(dataset).read(start, stop)
    except DataError:
        return True
    return False


def _write(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_TOKENS", 500)
        write_dataset(folder, {"train/text": TEXTS, "val/text": documents(3, seed=9)})


def _source(dataset: Path) -> TokenSource:
    return TokenSource(dataset, read_manifest(dataset), "train", "text")


def _damage_chunk(dataset: Path, shard: int, chunk: int) -> tuple[str, str]:
    path = dataset / read_manifest(dataset).shards[shard].path
    found = read_index(index_path(path)).chunks[chunk]
    flip_bit(path, found.tokens_offset + 2 * (found.tokens // 2))
    return str(path), found.key
