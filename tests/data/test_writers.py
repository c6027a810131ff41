"""Writers of one file have a name each while they write; what killed ones left is never read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.config import PrepareConfig
from data.drafts import remove_drafts
from data.durable import is_leftover, remove_leftovers, write_durably, write_stream
from data.manifest import MANIFEST
from data.prepare import prepare
from data.verify import verify
from tests.data.test_prepare import tree
from tests.data.texts import prose, write_lines

LEFT = ".0123abcd.tmp"
WRITES = 150


def test_two_that_write_one_file_at_once_write_a_file_each(tmp_path: Path) -> None:
    path = tmp_path / "file"
    names = []

    def slow() -> Iterator[bytes]:
        yield b"half of "
        write_durably(path, b"other")
        assert path.read_bytes() == b"other"
        (name,) = (found.name for found in tmp_path.iterdir() if found != path)
        names.append(name)
        yield b"one"

    write_stream(path, slow())
    assert path.read_bytes() == b"half of one"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert is_leftover(names[0], of="file") and not is_leftover(names[0], of="other")


def write_often(path: Path, letter: str) -> None:
    for length in range(1, WRITES):
        write_durably(path, letter.encode() * 500 * length)


def test_processes_that_write_one_file_all_succeed_and_a_reader_sees_one_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    write_durably(path, b"x" * 500)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in "abc"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        assert len(content) % 500 == 0 and len(set(content)) == 1, "half of one file"
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


KILLED = """
import sys, time
from pathlib import Path
from data.durable import write_stream
def pieces():
    yield b"half"
    print("half", flush=True)
    time.sleep(600)
write_stream(Path(sys.argv[1]), pieces())
"""


def test_what_a_killed_writer_left_goes_when_the_owner_comes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"half\n"
        os.kill(writer.pid, signal.SIGKILL)
    (left,) = (found for found in tmp_path.iterdir() if found != path)
    assert is_leftover(left.name, of="file") and path.read_bytes() == b"old"
    people = ["notes.tmp", "notes.0123abc.tmp", "0123abcd.tmp.txt", "file.0123ABCD.tmp"]
    for name in people:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, tmp_path / "gone", path)
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["file", *people])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [prose(300, seed=seed) for seed in range(40)]
    return write_lines(tmp_path_factory.mktemp("input") / "a.jsonl", lines)


def leave(folder: Path) -> int:
    """Beside every file half of it, as a killed writer would; how many."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        path.with_name(path.name + LEFT).write_bytes(content[: len(content) // 2])
    return len(files)


def test_a_dataset_that_was_killed_often_has_the_same_files(corpus: Path, tmp_path: Path) -> None:
    config = PrepareConfig(vocab_size=330, val_fraction=0.2, part_bytes=2000, shard_bytes=6000)
    output = tmp_path / "dataset"
    prepare([str(corpus)], output, config, workers=1)
    expected = tree(output)
    assert leave(output) == len(expected) > 8
    # Nobody reads them, and a dataset that is finished is left as it is.
    assert verify(output, full=True).problems == ()
    assert prepare([str(corpus)], output, config, workers=1).was_complete
    assert len(tree(output)) == 2 * len(expected)
    # Killed before its manifest was written: who finishes it leaves the same files.
    (output / MANIFEST).unlink()
    prepare([str(corpus)], output, config, workers=1)
    assert tree(output) == expected


def test_what_was_left_beside_kept_inputs_goes_with_the_drafts(tmp_path: Path) -> None:
    folder = tmp_path / "keep" / "0a"
    folder.mkdir(parents=True)
    (folder / "page.txt").write_text("whole")
    (folder / f"page.txt.fetched.json{LEFT}").write_text("{")
    remove_drafts(tmp_path / "keep")
    assert [path.name for path in folder.iterdir()] == ["page.txt"]
