"""Shards are tars that anyone can read, written whole or not at all, the same bytes every time."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray

from data import shards
from data.config import DataError
from data.durable import file_sha256, write_sealed
from data.shard_index import index_path, read_index
from data.shards import finished_shard, write_shard
from tests.data.tiny import documents, flip_bit, write_dataset


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 500)


@pytest.fixture
def shard(tmp_path: Path, small_chunks: None) -> Path:
    path = tmp_path / "train" / "text" / "shard-000000.tar"
    write_shard(path, documents(30), "<u2")
    return path


@pytest.mark.parametrize(
    ("length", "count"), [(1000, 6000), (10**6, 6), (20, 20_000), (3, 100_000)]
)
def test_a_dataset_takes_hardly_more_than_its_tokens(
    tmp_path: Path, length: int, count: int
) -> None:
    """Of long documents 0.5 %; of short ones also 4 bytes each, and 10 KiB for each shard."""
    texts = [np.full(length, 7)] * count
    write_dataset(tmp_path, {"train/text": texts}, shard_bytes=2**22)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if path.name != "tokenizer.model")
    num_shards = sum(path.suffix == ".tar" for path in files)
    allowed = 1.005 * 2 * length * count
    if length < 1000:
        allowed += 4 * count + 10_240 * num_shards
    assert 2 * length * count < size <= allowed


def test_tarfile_reads_every_document(shard: Path) -> None:
    found: list[NDArray[Any]] = []
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        for lens_member, tokens_member in zip(members[::2], members[1::2], strict=True):
            assert tokens_member.name == lens_member.name.replace("lens", "tokens")
            lens, tokens = _load(tar, lens_member), _load(tar, tokens_member)
            assert (lens.dtype, tokens.dtype) == (np.dtype("<u4"), np.dtype("<u2"))
            found += np.split(tokens, np.cumsum(lens)[:-1])
    assert len(members) > 4
    assert members[0].name == "000000-00000.lens.npy"
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    _assert_same_documents(found, documents(30))


# webdataset leaves the closing of its file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_every_document(shard: Path) -> None:
    found: list[NDArray[Any]] = []
    for sample in webdataset.WebDataset(str(shard), shardshuffle=False).decode():
        found += np.split(sample["tokens.npy"], np.cumsum(sample["lens.npy"])[:-1])
    _assert_same_documents(found, documents(30))


def test_the_tar_command_lists_a_shard(shard: Path) -> None:
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:2] == ["000000-00000.lens.npy", "000000-00000.tokens.npy"]
    assert listed.stderr == ""


def test_the_index_points_at_the_arrays(shard: Path) -> None:
    index = read_index(index_path(shard))
    raw = shard.read_bytes()
    tokens = [
        np.frombuffer(raw, "<u2", chunk.tokens, chunk.tokens_offset) for chunk in index.chunks
    ]
    lens = [np.frombuffer(raw, "<u4", chunk.documents, chunk.lens_offset) for chunk in index.chunks]
    assert np.concatenate(tokens).tolist() == np.concatenate(documents(30)).tolist()
    assert np.concatenate(lens).tolist() == [len(ids) for ids in documents(30)]
    assert all(chunk.tokens >= 500 for chunk in index.chunks[:-1])
    assert index.tar_sha256 == file_sha256(shard)
    assert index.bytes == len(raw)


@pytest.mark.parametrize(("dtype", "largest"), [("<u2", 65_535), ("<u4", 2**32 - 1)])
def test_the_largest_id_of_a_type_is_stored(tmp_path: Path, dtype: Any, largest: int) -> None:
    path = tmp_path / "train" / "text" / "shard-000000.tar"
    entry = write_shard(path, [np.array([0, largest])], dtype)
    chunk = read_index(index_path(path)).chunks[0]
    found = np.frombuffer(path.read_bytes(), dtype, 2, chunk.tokens_offset)
    assert found.tolist() == [0, largest]
    assert (entry.tokens, entry.documents) == (2, 1)


@pytest.mark.parametrize("bad", [65_536, -1])
def test_an_id_that_does_not_fit_is_refused(tmp_path: Path, bad: int) -> None:
    path = tmp_path / "train" / "text" / "shard-000000.tar"
    with pytest.raises(DataError, match=r"token id 65536, .* from 0 to 65535|token id -1, .*"):
        write_shard(path, [np.array([bad])], "<u2")
    assert not path.exists()


def test_a_shard_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs at least one document"):
        write_shard(tmp_path / "train" / "text" / "shard-000000.tar", [], "<u2")
    assert list((tmp_path / "train" / "text").iterdir()) == []


def test_equal_documents_make_equal_bytes(shard: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "train" / "text" / "shard-000000.tar"
    entry = write_shard(again, iter(documents(30)), "<u2")
    assert again.read_bytes() == shard.read_bytes()
    assert index_path(again).read_bytes() == index_path(shard).read_bytes()
    assert entry == finished_shard(shard)


@pytest.mark.parametrize("damage", ["flip", "cut", "no index", "damaged index", "no tar"])
def test_a_damaged_shard_is_not_finished(shard: Path, damage: str) -> None:
    assert finished_shard(shard) is not None
    if damage == "flip":
        flip_bit(shard, 5000)
    elif damage == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "no index":
        index_path(shard).unlink()
    elif damage == "damaged index":
        flip_bit(index_path(shard), 30)
    else:
        shard.unlink()
    assert finished_shard(shard) is None


def test_an_old_index_never_vouches_for_a_new_tar(shard: Path) -> None:
    def cut_short() -> Any:
        yield documents(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(shard, cut_short(), "<u2")
    assert not index_path(shard).exists()
    assert finished_shard(shard) is None


def test_every_flipped_bit_of_an_index_is_found(shard: Path) -> None:
    path = index_path(shard)
    intact = path.read_bytes()
    for offset in range(0, len(intact), 7):
        flip_bit(path, offset, bit=offset % 8)
        with pytest.raises(DataError, match=r"shard-000000\.idx\.json is damaged or was edited"):
            read_index(path)
        path.write_bytes(intact)
    assert len(read_index(path).chunks) > 2


def test_a_newer_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.idx.json"
    write_sealed(path, {"format": "headrace-shard-index", "version": 2})
    with pytest.raises(DataError, match=r"no shard index that this headrace reads: .*version 2"):
        read_index(path)


def test_a_kill_leaves_no_shard_that_looks_finished(tmp_path: Path) -> None:
    path = tmp_path / "train" / "text" / "shard-000000.tar"
    code = (
        "import sys, numpy as np; from pathlib import Path; from data.shards import write_shard\n"
        "def endless():\n"
        "    while True: yield np.zeros(2**18, dtype='u2'); print('.', flush=True)\n"
        "write_shard(Path(sys.argv[1]), endless(), '<u2')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(9):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [file.name for file in path.parent.iterdir()] == ["shard-000000.tar.tmp"]
    assert finished_shard(path) is None

    entry = write_shard(path, documents(5), "<u2")
    assert finished_shard(path) == entry
    assert not list(path.parent.glob("*.tmp"))


def test_reading_needs_no_torch_and_no_webdataset() -> None:
    code = (
        "import sys, data.verify, data.stream, data.inspect\n"
        "print(sorted({'torch', 'webdataset'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


def _load(tar: tarfile.TarFile, member: tarfile.TarInfo) -> NDArray[Any]:
    file = tar.extractfile(member)
    assert file is not None
    array: NDArray[Any] = np.load(io.BytesIO(file.read()), allow_pickle=False)
    return array


def _assert_same_documents(found: list[NDArray[Any]], expected: list[NDArray[Any]]) -> None:
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
