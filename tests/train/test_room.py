"""A checkpoint that does not fit is refused before its first byte, with what it needs and what is
there; on real small disks, byte by byte.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.durable import StorageError
from tests.disks import fill, make_room, read_only, small_disk
from tests.train.checkpoints import inventory, pieces, values, write
from train import checkpoint, slices
from train.checkpoint import begin, committed, open_checkpoint, step_folder
from train.room import Share, check_room, free_at, share, tight
from train.slices import Range, num_chunks, write_slices

BIG = 60_000
"""Elements of the parameter of `save`: a file of 240 KB for each state and all ranks."""


def big(rank: int, num_ranks: int) -> tuple[dict[str, list[np.ndarray]], dict[str, list[Range]]]:
    first, last = BIG * rank // num_ranks, BIG * (rank + 1) // num_ranks
    array = np.arange(first, last, dtype=np.float32)
    return {"param": [array], "exp_avg": [-array]}, {
        key: [("w", first, last - first)] for key in ("param", "exp_avg")
    }


def save(run: Path, step: int, *, num_ranks: int = 2) -> None:
    """A checkpoint of 480 KB, with the look at the room that a save begins with."""
    state = {"step": step}
    model = inventory({"w": (BIG,)})
    shares = [share(rank, big(rank, num_ranks)[1], model) for rank in range(num_ranks)]
    check_room(run, step, shares, state)
    folder = begin(run, step)
    files = [write_slices(folder, rank, *big(rank, num_ranks)) for rank in range(num_ranks)]
    checkpoint.commit(
        folder, step=step, parameters=model, scalars={"step": 1.0}, state=state, files=files
    )


@pytest.mark.parametrize("chunk_bytes", [64, 16 << 20])
@pytest.mark.parametrize("num_ranks", [1, 2, 7])
def test_the_share_of_a_rank_is_exact_for_its_file_and_enough_for_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(slices, "CHUNK_BYTES", chunk_bytes)
    write(tmp_path, 1, num_ranks=num_ranks)
    folder = step_folder(tmp_path, 1)
    shares = [share(r, pieces(values(1), r, num_ranks)[1], inventory()) for r in range(num_ranks)]
    for entry, one in zip(open_checkpoint(tmp_path).manifest["files"], shares, strict=True):
        assert (folder / entry["name"]).stat().st_size == entry["bytes"] == one.file_bytes
    size = (folder / "manifest.json").stat().st_size
    hashes = sum(16 * num_chunks(one.file_bytes, chunk_bytes) for one in shares)
    bound = 400 + len('{"step":1}') + hashes + sum(one.manifest_bytes for one in shares)
    assert size <= bound <= size + 400 + 30 * num_ranks


def test_what_passes_the_look_is_written_and_what_does_not_leaves_nothing(tmp_path: Path) -> None:
    """On disks from none of the room to more than enough, in steps of one page."""
    outcomes: Counter[str] = Counter()
    with small_disk(tmp_path / "disk", 640) as disk:
        for kilobytes in range(440, 560, 4):
            fill(disk, leave_kilobytes=kilobytes)
            before = sorted(disk.rglob("*"))
            try:
                save(disk / "run", 1)
            except StorageError as error:
                assert f"{step_folder(disk / 'run', 1)} needs " in str(error)
                assert f" bytes, and its file system has {kilobytes * 1024:,} free" in str(error)
                assert sorted(disk.rglob("*")) == before
                outcomes["refused"] += 1
            else:
                open_checkpoint(disk / "run").verify()
                outcomes["written"] += 1
                checkpoint.remove(checkpoint.retire_but(disk / "run", ()))
                (disk / "run" / "checkpoints").rmdir()
                (disk / "run").rmdir()
            make_room(disk)
    # Nothing passes the look and then meets the end of the disk: that would raise another message.
    assert outcomes["refused"] > 5 and outcomes["written"] > 5


def test_what_is_in_the_place_of_the_checkpoint_counts_as_free(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 700) as disk:
        save(disk / "run", 1)
        fill(disk, leave_kilobytes=16)
        with pytest.raises(StorageError, match="make room on that disk, then run the same command"):
            save(disk / "run", 2)
        assert committed(disk / "run") == [1]
        save(disk / "run", 1)
        open_checkpoint(disk / "run").verify()


def test_inodes_are_counted(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4000, inodes=20) as disk:
        with pytest.raises(
            StorageError,
            match=r"needs 33 inodes, one for each file, and its file system has 19 free; remove "
            "files from that disk, then run the same command again",
        ):
            save(disk / "run", 1, num_ranks=30)
        assert list(disk.iterdir()) == []
        save(disk / "run", 1, num_ranks=8)
        open_checkpoint(disk / "run").verify()


def test_a_disk_without_inodes_is_not_called_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4000, inodes=8) as disk:
        folder = begin(disk / "run", 1)
        for number in range(10):
            with contextlib.suppress(OSError):
                (disk / str(number)).touch()
        with pytest.raises(
            StorageError,
            match=r"rank-00000.safetensors cannot be written: No inode is left there, so no "
            r"further file can be made, although bytes are free; remove files from that disk",
        ):
            write_slices(folder, 0, *big(0, 1))


def test_a_disk_that_became_full_or_read_only_is_told_in_words(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1200) as disk:
        save(disk / "run", 1)
        folder = begin(disk / "run", 2)
        fill(disk, leave_kilobytes=60)
        with pytest.raises(
            StorageError, match=r"rank-00000.safetensors cannot be written: No space left on dev"
        ):
            write_slices(folder, 0, *big(0, 2))
        checkpoint.discard(disk / "run", 2)
        assert not folder.exists()
        make_room(disk)
        with (
            read_only(disk),
            pytest.raises(StorageError, match="Read-only file system; have"),
        ):
            save(disk / "run", 2)
        save(disk / "run", 2)
        assert committed(disk / "run") == [2, 1]


def test_a_run_that_cannot_keep_what_it_should_is_warned_of(tmp_path: Path) -> None:
    shares = [Share(200_000, 100)] * 2
    with small_disk(tmp_path / "disk", 1700) as disk:
        run = disk / "run"
        assert tight(run, 3, shares) is None
        warning = tight(run, 4, shares)
        assert warning is not None and "checkpoint.keep=4 needs room for 5: " in warning
        assert "lower checkpoint.keep, or put the run on another disk" in warning
        # What the run's own checkpoints take will be free for others.
        save(run, 1)
        assert tight(run, 3, shares) is None
        fill(disk, leave_kilobytes=100)
        warning = tight(run, 3, shares)
        assert warning is not None and f"the file system of {run} has " in warning
    with small_disk(tmp_path / "few", 4000, inodes=12) as disk:
        warning = tight(disk / "run", 2, shares)
        assert warning is not None and warning.startswith("a checkpoint takes 5 inodes, and ")


def test_a_file_system_that_tells_nothing_is_believed_to_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = os.statvfs(tmp_path)
    fields: Any = list(told)
    fields[2:8] = [0] * 6
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    free = free_at(tmp_path)
    assert (free.bytes, free.inodes) == (None, None)
    save(tmp_path / "run", 1)
    assert tight(tmp_path / "run", 100, [Share(10**15, 100)]) is None
