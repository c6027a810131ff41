"""A file is the old one or the new one, and storage that refuses says what, why and what helps."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from data.config import DataError, PrepareConfig
from data.durable import (
    RowFile,
    StorageError,
    publish_folder,
    read_sealed,
    told,
    write_durably,
    write_sealed,
)
from data.prepare import prepare
from tests.data.texts import prose, write_lines
from tests.data.tiny import flip_bit
from tests.disks import fill, make_room, read_only, small_disk


def test_a_full_disk_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        write_durably(disk / "a", b"old")
        fill(disk)
        with pytest.raises(StorageError, match=r"disk/a.* cannot be written: No space left .*room"):
            write_durably(disk / "a", bytes(20_000))
        assert (disk / "a").read_bytes() == b"old"
        make_room(disk)
        assert [path.name for path in disk.iterdir()] == ["a"]
        write_durably(disk / "a", bytes(20_000))
        with (
            read_only(disk),
            pytest.raises(StorageError, match=r"Read-only file system; .*the same command again"),
        ):
            write_durably(disk / "a", b"new")
        assert (disk / "a").read_bytes() == bytes(20_000)


def test_a_row_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 64) as disk,
        closing(RowFile(disk / "rows.jsonl")) as rows,
    ):
        rows.append({"row": 1})
        fill(disk)
        # The page that holds the first row takes a part of this one.
        with pytest.raises(StorageError, match=r"rows\.jsonl cannot be written: No space left"):
            rows.append({"row": "x" * 9000})
        assert (disk / "rows.jsonl").read_text() == '{"row": 1}\n'
        rows.append({"row": 2})
        rows.sync()
        found = [json.loads(line) for line in (disk / "rows.jsonl").read_text().splitlines()]
        assert found == [{"row": 1}, {"row": 2}]


def test_a_row_after_a_torn_line_is_not_swallowed(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"row": 1}\n{"ro')
    with closing(RowFile(tmp_path / "rows")) as rows:
        rows.append({"row": 2})
    assert (tmp_path / "rows").read_text().splitlines() == ['{"row": 1}', '{"ro', '{"row": 2}']


def test_a_sealed_file_tells_every_flipped_bit_in_the_words_of_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    content = {"b": [1, 2.5], "a": {"name": "x"}}
    write_sealed(path, content)
    assert read_sealed(path) == content
    intact = path.read_bytes()
    for offset in range(len(intact)):
        flip_bit(path, offset, bit=offset % 8)
        with pytest.raises(KeyError, match=r"is damaged or was edited: .* end: ask me"):
            read_sealed(path, error=Complaint, remedy=": ask me")
        path.write_bytes(intact)
    path.write_bytes(intact[:40])
    with pytest.raises(DataError, match="is damaged or was edited"):
        read_sealed(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_sealed(path)


class Complaint(ValueError, KeyError):
    """An error of somebody else."""


def test_a_folder_is_published_onto_nothing_that_holds_a_file(tmp_path: Path) -> None:
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "new", tmp_path / "out")
    publish_folder(tmp_path / "new", tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "new"


def test_only_errors_that_are_about_writing_are_told_wherever_they_come_from() -> None:
    assert "make room within the quota" in str(told(OSError(122, "", "/data/x")))
    assert told(OSError(13, "Permission denied", "/data/x")) is None
    assert told(FileNotFoundError(2, "no such file")) is None


SETTINGS = PrepareConfig(vocab_size=330, val_fraction=0.2, part_bytes=2000, shard_bytes=6000)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_preparation_on_a_full_disk_continues_when_there_is_room(tmp_path: Path) -> None:
    corpus = str(write_lines(tmp_path / "a.jsonl", [prose(300, seed=s) for s in range(40)]))
    prepare([corpus], tmp_path / "reference", SETTINGS, workers=1)
    expected = tree(tmp_path / "reference")
    reached = set()
    with small_disk(tmp_path / "disk", 1000) as disk:
        # Every stage of the work meets the full disk once: each file takes a page or more.
        for left in range(0, 120, 4):
            output = disk / f"leave-{left}"
            fill(disk, leave_kilobytes=left)
            try:
                prepare([corpus], output, SETTINGS, workers=1)
            except StorageError as error:
                assert "No space left on device; make room" in str(error)
                assert str(output) in str(error) and error.exit_code == 1
                assert not list(output.rglob("*.tmp"))
                reached.add(str(error).split(" cannot be written")[0].removeprefix(str(output)))
            make_room(disk)
            prepare([corpus], output, SETTINGS, workers=1)
            assert tree(output) == expected, left
            for path in sorted(output.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            output.rmdir()
    assert len(reached) > 8, reached
    assert any(".tar" in path for path in reached)


def test_a_preparation_on_a_read_only_disk_is_told(tmp_path: Path) -> None:
    corpus = str(write_lines(tmp_path / "a.jsonl", [prose(300, seed=s) for s in range(40)]))
    with small_disk(tmp_path / "disk", 1000) as disk:
        with read_only(disk), pytest.raises(StorageError, match=r"/new.*Read-only file system"):
            prepare([corpus], disk / "new", SETTINGS, workers=1)
        prepare([corpus], disk / "done", SETTINGS, workers=1)
        with read_only(disk):
            assert prepare([corpus], disk / "done", SETTINGS, workers=1).was_complete
