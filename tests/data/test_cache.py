"""One cache, several processes, a kill, damage, too little room: content is never wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data import cache as cache_module
from data.cache import Cache, Content
from data.config import AccessError, DataError
from tests.disks import fill, read_only, small_disk

FORKSERVER = multiprocessing.get_context("forkserver")


def made(number: int, size: int = 10_000) -> tuple[Content, bytes]:
    """Content of its own for every number."""
    raw = np.random.default_rng(number).bytes(size)
    digest = xxhash.xxh3_64_hexdigest(raw)
    return Content(f"{number % 256:02x}{digest}", len(raw), "xxh3", digest), raw


def wrong() -> DataError:
    return DataError("the origin has other content")


def read(cache: Cache, number: int, size: int = 10_000) -> bytes:
    """An entry, fetched where it is missing; each fetch is noted in the folder beside the cache."""
    content, raw = made(number, size)

    def fetch() -> Iterator[bytes]:
        note = cache.folder.parent / "fetched"
        note.mkdir(exist_ok=True)
        (note / f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
        yield raw[: size // 2]
        yield raw[size // 2 :]

    file = cache.open(content, fetch, wrong)
    try:
        return os.pread(file, 10 * size, 0)
    finally:
        os.close(file)


def fetches(cache: Cache, number: int) -> int:
    return len(list((cache.folder.parent / "fetched").glob(f"{number}-*")))


def held(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def read_many(folder: Path, max_bytes: int, numbers: list[int], stalled: float) -> None:
    cache_module._STALLED_SECONDS = stalled
    cache = Cache(folder, max_bytes)
    for number in numbers:
        assert read(cache, number) == made(number)[1]


def stop_in_the_middle(folder: Path, number: int) -> None:
    """Half of an entry, and then nothing more."""
    content, raw = made(number)

    def fetch() -> Iterator[bytes]:
        yield raw[:5000]
        (folder / "half-written").touch()
        time.sleep(60)

    Cache(folder, 2**30).open(content, fetch, wrong)


def run_all(*processes: Any) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_an_entry_is_fetched_once_and_found_again(tmp_path: Path) -> None:
    for _ in range(2):
        cache = Cache(tmp_path / "cache", 2**30)
        assert read(cache, 7) == read(cache, 7) == made(7)[1]
    assert fetches(cache, 7) == 1
    assert cache.bytes_fetched == 0
    assert [path.name for path in held(cache.folder)] == [made(7)[0].key]


@pytest.mark.parametrize("has_links", [True, False])
def test_nobody_can_begin_to_fetch_an_entry_that_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    claimed: list[bool] = []
    replace = os.replace

    def looking(source: Path, target: Path) -> None:
        claimed.append(Path(f"{target}.part.0").exists())
        replace(source, target)

    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "replace", looking)
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    cache = Cache(tmp_path / "cache", 2**30)
    assert read(cache, 7) == made(7)[1]
    assert claimed == [has_links]
    assert [path.name for path in held(cache.folder)] == [made(7)[0].key]


def test_many_processes_at_once_fetch_an_entry_once(tmp_path: Path) -> None:
    """They wait for whoever began."""
    arguments = (tmp_path / "cache", 2**30, list(range(30)), 60.0)
    run_all(*(FORKSERVER.Process(target=read_many, args=arguments) for _ in range(4)))
    cache = Cache(tmp_path / "cache", 2**30)
    assert [fetches(cache, number) for number in range(30)] == [1] * 30


def test_a_kill_in_the_middle_of_a_write_stops_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    killed = FORKSERVER.Process(target=stop_in_the_middle, args=(folder, 3))
    killed.start()
    while not (folder / "half-written").exists():
        time.sleep(0.01)
    arguments = (folder, 2**30, [1, 2, 3, 4], 0.5)
    others = [FORKSERVER.Process(target=read_many, args=arguments) for _ in range(2)]
    for process in others:
        process.start()
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    for process in (killed, *others):
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0]
    # What the dead one has left is gone, and only one of the others took its place.
    assert sorted(path.name for path in held(folder) if path.name != "half-written") == sorted(
        made(number)[0].key for number in (1, 2, 3, 4)
    )
    assert fetches(Cache(folder, 2**30), 3) == 1


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 55_000)
    for number in range(12):
        assert read(cache, number) == made(number)[1]
        read(cache, 0)
        assert sum(path.stat().st_size for path in held(cache.folder)) <= 55_000
        time.sleep(0.002)
    assert {path.name for path in held(cache.folder)} == {
        made(number)[0].key for number in (0, 8, 9, 10, 11)
    }
    # What does not fit at all is read all the same, and not kept.
    assert read(cache, 20, size=60_000) == made(20, size=60_000)[1]
    assert sum(path.stat().st_size for path in held(cache.folder)) <= 55_000


def test_processes_with_too_little_room_read_the_truth_and_keep_the_bound(tmp_path: Path) -> None:
    """The groups of a large cache, made small."""
    folder, numbers = tmp_path / "cache", list(range(40))
    arguments = [(folder, 100_000, numbers[:: 1 - 2 * (i % 2)], 60.0) for i in range(3)]
    processes = [FORKSERVER.Process(target=read_many, args=one) for one in arguments]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        sizes = []
        for path in folder.rglob("*") if folder.exists() else ():
            try:
                sizes.append(path.stat().st_size if path.is_file() else 0)
            except FileNotFoundError:
                continue
        largest = max(largest, sum(sizes))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    # Each of three may claim an entry at one moment, and a walk that meets its renaming counts it
    # under both names.
    assert 50_000 < largest <= 100_000 + 3 * 2 * 10_000
    assert sum(path.stat().st_size for path in held(folder)) <= 100_000


def test_groups_share_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.cache.GROUP_BYTES", 40_000)
    cache = Cache(tmp_path / "cache", 160_000)
    for number in range(64):
        read(cache, number)
    names = {path.name for path in held(cache.folder)}
    assert names == {made(number)[0].key for number in range(48, 64)}


@pytest.mark.parametrize("harm", ["flip", "cut", "longer", "empty"])
def test_a_damaged_entry_is_fetched_again(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "cache"
    read(Cache(folder, 2**30), 5)
    (path,) = held(folder)
    raw = bytearray(path.read_bytes())
    raw[777] ^= 4
    changed = {"flip": bytes(raw), "cut": raw[:-1], "longer": raw + b"x", "empty": b""}[harm]
    path.write_bytes(changed)
    cache = Cache(folder, 2**30)
    assert read(cache, 5) == made(5)[1]
    assert fetches(cache, 5) == 2
    assert path.read_bytes() == made(5)[1]


def test_content_of_another_hash_is_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.cache._FIRST_PAUSE", 0.001)
    cache, (content, raw) = Cache(tmp_path / "cache", 2**30), made(1)
    answers = [raw[:-1], b"x" * len(raw), raw + b"x", raw]
    file = cache.open(content, lambda: [answers.pop(0)], wrong)
    assert os.pread(file, 99_999, 0) == raw
    os.close(file)
    cache.path(content).unlink()
    with pytest.raises(DataError, match="the origin has other content"):
        cache.open(content, lambda: [b"x" * len(raw)], wrong)
    assert held(cache.folder) == []


def test_a_failed_fetch_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    cache, (content, raw) = Cache(tmp_path / "cache", 2**30), made(1)

    def fail() -> Iterator[bytes]:
        yield raw[:100]
        raise AccessError("no network")

    with pytest.raises(AccessError, match="no network"):
        cache.open(content, fail, wrong)
    assert held(cache.folder) == []
    assert read(cache, 1) == raw


def test_a_writer_taken_for_dead_does_not_publish_the_part_of_another(tmp_path: Path) -> None:
    cache, (content, raw) = Cache(tmp_path / "cache", 2**30), made(1)
    part = cache.path(content).with_name(f"{content.key}.part.0")
    begun, over = threading.Event(), threading.Event()

    def second() -> Iterator[bytes]:
        begun.set()
        over.wait(60)
        yield raw

    other = threading.Thread(
        target=lambda: os.close(Cache(cache.folder, 2**30).open(content, second, wrong))
    )

    def slow() -> Iterator[bytes]:
        yield raw[:100]
        part.unlink()  # as whoever took this writer for dead, and was done
        other.start()
        begun.wait(60)
        yield raw[100:]

    file = cache.open(content, slow, wrong)
    assert os.pread(file, len(raw) + 1, 0) == raw
    os.close(file)
    for path in held(cache.folder):
        assert path.read_bytes() == raw or ".part." in path.name, "half of an entry has its name"
    over.set()
    other.join()
    assert read(cache, 1) == raw


def test_a_disk_that_refuses_is_named_with_the_cure(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        cache = Cache(disk / "cache", 2**30)
        read(cache, 1)
        fill(disk)
        full = r"No space left on device; make room there, lower data\.cache_bytes, or name another"
        with pytest.raises(AccessError, match=rf"the cache {cache.folder} cannot be used: {full}"):
            read(cache, 2, size=50_000)
        assert [path.name for path in held(cache.folder)] == [made(1)[0].key]
        assert read(cache, 1) == made(1)[1]
        with (
            read_only(disk),
            pytest.raises(AccessError, match=r"Read-only file system; mend that disk or its righ"),
        ):
            read(cache, 2)
