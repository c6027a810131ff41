"""A dataset from a URL or staged through the cache is the dataset itself, or a named error."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.config import AccessError, DataConfig, DataError, DataUsageError
from data.manifest import read_manifest
from data.places import Place, place_of
from data.shard_index import index_path, read_index
from data.stats import dataset_stats
from data.tokens import TokenSource
from data.verify import verify
from tests.data.servers import (
    Fault,
    FolderServer,
    other_content,
    redirect,
    serving,
    short_body,
    short_range,
    stall,
    status,
    whole_file,
)
from tests.data.tiny import documents, flip_bit, write_dataset

TEXTS = documents(60)
STREAM = np.concatenate(TEXTS)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits in a test."""
    monkeypatch.setattr("data.retries._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("data.cache._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("data.remote._STALLED_SECONDS", 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_TOKENS", 500)
        sources = {"train/a text": TEXTS, "val/a text": documents(3, seed=9)}
        write_dataset(tmp_path / "dataset", sources)
    return tmp_path / "dataset"


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def source(place: Place) -> TokenSource:
    return TokenSource(place, read_manifest(place), "train", "a text")


def is_whole(found: TokenSource) -> bool:
    return found.read(0, found.num_tokens).tolist() == STREAM.tolist()


def held(config: DataConfig) -> list[Path]:
    return sorted(path for path in Path(config.cache_dir).rglob("*") if path.is_file())


def first_chunk(folder: Path) -> tuple[Path, int]:
    """The first shard, and the offset of its first token."""
    path = folder / read_manifest(folder).source_shards("train", "a text")[0].path
    return path, read_index(index_path(path)).chunks[0].tokens_offset


def test_a_url_is_the_dataset_and_every_byte_is_fetched_once(
    server: FolderServer, folder: Path, config: DataConfig
) -> None:
    assert is_whole(source(place_of(server.url, config)))
    expected = sum(
        entry.tokens * 2 for entry in read_manifest(folder).source_shards("train", "a text")
    )
    small = [path for path in folder.rglob("*") if path.suffix in (".json", ".npy")]
    # The tar's headers and the lengths of documents stay where they are.
    assert server.sent <= expected + sum(path.stat().st_size for path in small)
    asked = len(server.asked)
    again = source(place_of(server.url, config))
    assert is_whole(again)
    assert list(again.documents(0, 1500)) == list(source(place_of(folder)).documents(0, 1500))
    # The manifest is always fetched, the lengths for the first time.
    news = server.asked[asked:]
    assert news[0] == ("manifest.json", "")
    assert all(path.endswith(".tar") for path, _ in news[1:])


def test_a_copy_sent_to_another_process_reads_on_its_own(
    server: FolderServer, config: DataConfig
) -> None:
    found = source(place_of(server.url, config))
    found.read(0, 1000)
    raw = pickle.dumps(found)
    assert len(raw) < 3000
    assert is_whole(pickle.loads(raw))


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        *((".tar", fault) for fault in (short_range, other_content, stall, redirect)),
        *((".idx.json", fault) for fault in (short_body, other_content, stall, redirect)),
        *((file, status(503)) for file in (".tar", ".idx.json", "shards.npy", "manifest.json")),
        ("shards.npy", other_content),
        (".tar", short_body),
    ],
)
def test_a_fault_that_passes_changes_nothing(
    server: FolderServer, config: DataConfig, fault: Fault, file: str
) -> None:
    server.fail(file, fault, fault)
    assert is_whole(source(place_of(server.url, config)))
    assert not server.faults


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (short_body, AccessError, r"could not be fetched in 8 attempts \(ClientPayloadError"),
        (short_range, AccessError, r"\(bytes \d+ to \d+ were asked for, \d+ bytes came\)"),
        (whole_file, AccessError, r"cannot be read in parts: .* gave the whole file; copy the"),
        (status(503), AccessError, r"in 8 attempts \(HTTP 503, .*when the server answers"),
        (status(403), AccessError, r"cannot be fetched \(HTTP 403, .*parts of files: copy the"),
        (status(416), AccessError, r"cannot be fetched \(ValueError\); the file there is not the"),
        (other_content, DataError, r"chunk 000000-00000: its tokens are damaged \(xxh3 differs"),
    ],
)
def test_a_fault_that_stays_is_named_and_nothing_is_kept(
    server: FolderServer, config: DataConfig, fault: Fault, error: type[DataError], message: str
) -> None:
    found = source(place_of(server.url, config))
    before, asked = held(config), len(server.asked)
    server.fail("000000.tar", *[fault] * 99)
    with pytest.raises(error, match=message) as raised:
        found.read(0, 100)
    assert f"{server.url}/train/a%20text/shard-000000.tar" in str(raised.value)
    assert isinstance(raised.value, AccessError) == (error is AccessError)
    assert [path for path in held(config) if path.suffix == ".tokens"] == []
    assert set(before) <= set(held(config))
    if "cannot be" in message:
        assert len([path for path, _ in server.asked[asked:] if path.endswith(".tar")]) == 1


def test_a_missing_file_is_named_with_its_url(server: FolderServer, folder: Path) -> None:
    with pytest.raises(
        AccessError, match=rf"{server.url}/nothing/manifest\.json cannot be fetched"
    ):
        read_manifest(place_of(f"{server.url}/nothing"))
    (folder / "manifest.json").write_bytes(b"<html>no such page</html>")
    with pytest.raises(DataUsageError, match=rf"{server.url} is not a dataset: its manifest\.json"):
        read_manifest(place_of(server.url))


def test_a_file_that_was_replaced_is_never_mixed_in(
    server: FolderServer, folder: Path, config: DataConfig
) -> None:
    """As by another preparation at the same address: other sizes, other bytes."""
    found = source(place_of(server.url, config))
    found.read(0, 100)
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_TOKENS", 500)
        write_dataset(folder, {"train/a text": documents(60, seed=3)})
    with pytest.raises(DataError, match=r"damaged, or not the file that the dataset lists|damaged"):
        found.read(0, found.num_tokens)
    assert found.read(0, 100).tolist() == STREAM[:100].tolist()


def test_every_damaged_file_of_the_cache_is_noticed(
    server: FolderServer, config: DataConfig, folder: Path
) -> None:
    def everything() -> list[object]:
        found = source(place_of(server.url, config))
        place = place_of(server.url, config)
        read = read_manifest(place)
        tokenizer = place.tokenizer(read.tokenizer_file, read.tokenizer_sha256)
        return [
            found.read(0, found.num_tokens).tolist(),
            list(found.documents(0, found.num_tokens)),
            (tokenizer / read.tokenizer_file).read_bytes(),
        ]

    expected = everything()
    files = held(config)
    assert {path.suffix for path in files} == {".file", ".tokens", ".lens", ".model"}
    for path in files:
        raw = path.read_bytes()
        path.write_bytes(
            raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 8]) + raw[len(raw) // 2 + 1 :]
        )
        assert everything() == expected
        assert path.read_bytes() == raw


def test_a_cache_that_is_too_small_is_only_slower(server: FolderServer, tmp_path: Path) -> None:
    small = DataConfig(cache_dir=str(tmp_path / "cache"), cache_bytes=2**20)
    place = place_of(server.url, small)
    place._cache._group_bytes = 5_000  # type: ignore[attr-defined]
    for _ in range(2):
        assert is_whole(source(place))
        assert sum(path.stat().st_size for path in held(small)) <= 5_000


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@host/data",
        "https://host/data?token=secret",
        "s3://key:secret@bucket/data",
        "http://host/data#secret",
    ],
)
def test_a_url_with_a_secret_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"named with a password, a query or a") as raised:
        DataConfig(path=url)
    assert "secret" not in str(raised.value.errors()[0]["ctx"]["error"])  # type: ignore[attr-defined]
    with pytest.raises(DataUsageError, match=r"put credentials where the library"):
        place_of(url)


def test_passwords_come_from_netrc(
    folder: Path, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, password="secret") as server:
        with pytest.raises(AccessError, match=r"cannot be fetched \(HTTP 401"):
            read_manifest(place_of(server.url, config))
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login user password secret\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        assert is_whole(source(place_of(server.url, config)))


def test_another_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataUsageError, match=r"dataset ftp://host/x: ftp:// is not supported; s3"):
        place_of("ftp://host/x")


def test_verify_reads_the_url_itself_and_no_copy(
    server: FolderServer, folder: Path, config: DataConfig
) -> None:
    place = place_of(server.url, config)
    assert is_whole(source(place))
    assert verify(place, full=True).ok
    path, offset = first_chunk(folder)
    flip_bit(path, offset)
    (problem,) = verify(place).problems
    assert (problem.chunk, problem.file) == ("000000-00000", "train/a text/shard-000000.tar")
    assert f"{server.url}/train/a%20text/shard-000000.tar, chunk" in problem.message
    flip_bit(path, offset)
    flip_bit(path, 0)
    assert verify(place).ok
    assert "outside its arrays" in verify(place, full=True).problems[0].message
    os.truncate(path, path.stat().st_size - 512)
    assert "the manifest says" in verify(place).problems[0].message
    path.unlink()
    assert "cannot be fetched (HTTP 404" in verify(place).problems[0].message
    server.fail(".tar", *[status(403)] * 9)
    with pytest.raises(AccessError, match="HTTP 403"):
        verify(place)


def test_stats_of_a_url_are_those_of_the_folder(
    server: FolderServer, folder: Path, config: DataConfig
) -> None:
    far = dataset_stats(place_of(server.url, config), seq_len=32).to_json()
    near = dataset_stats(folder, seq_len=32).to_json()
    assert far.pop("dataset") == server.url
    del near["dataset"]
    assert far == near


def test_a_staged_folder_is_read_once_per_node(folder: Path, config: DataConfig) -> None:
    staged = config.model_copy(update={"stage": True})
    place = place_of(folder, staged)
    found = source(place)
    random = np.random.default_rng(0)
    for start in random.integers(0, len(STREAM) - 100, size=300).tolist():
        assert found.read(start, start + 100).tolist() == STREAM[start : start + 100].tolist()
    assert is_whole(found)
    assert place._cache.bytes_fetched == 2 * len(STREAM)  # type: ignore[attr-defined]
    second = place_of(folder, staged)
    for path in folder.rglob("*.tar"):
        os.truncate(path, 0)
    assert is_whole(source(second))


def test_damage_of_a_staged_folder_is_named(folder: Path, config: DataConfig) -> None:
    path, offset = first_chunk(folder)
    flip_bit(path, offset)
    found = source(place_of(folder, config.model_copy(update={"stage": True})))
    with pytest.raises(DataError, match=rf"{path}, chunk 000000-00000: its tokens are damaged"):
        found.read(0, 100)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} cannot be read: No such file"):
        source(place_of(folder, config.model_copy(update={"stage": True}))).read(0, 100)


def test_what_is_out_of_reach_is_not_damage(server: FolderServer, config: DataConfig) -> None:
    found = source(place_of(server.url, config))
    server.fail(".tar", *[status(500)] * 99)
    rows, damaged = np.zeros((1, 10), dtype=np.uint32), dict[int, str]()
    with pytest.raises(AccessError, match="HTTP 500"):
        found.read_rows([0], rows, [0], damaged)
    assert not damaged


def test_the_ranks_of_a_node_come_for_the_tokenizer_at_once(folder: Path, tmp_path: Path) -> None:
    start = threading.Barrier(8)
    sha256 = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()

    def fetch(cache: Path) -> bytes:
        location = f"pipe:cat {folder}/{{path}}"
        place = place_of(location, DataConfig(cache_dir=str(cache)), commands=True)
        start.wait()
        return (place.tokenizer("tokenizer.model", sha256) / "tokenizer.model").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            found = set(pool.map(fetch, [tmp_path / f"cache-{number}"] * 8))
            assert found == {(folder / "tokenizer.model").read_bytes()}
            (kept,) = (tmp_path / f"cache-{number}" / "tokenizers").iterdir()
            assert [path.name for path in kept.iterdir()] == ["tokenizer.model"]
