"""Committed checkpoints have a second place, and what it gives back was verified."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data.config import DataUsageError
from data.durable import is_leftover
from data.store import FolderStore, store_of
from tests.train.checkpoints import values, write
from tests.train.mirrors import back, flip, small_run
from train import slices
from train.checkpoint import CheckpointError, committed, open_checkpoint, step_folder
from train.mirror import Mirror, MirrorError
from train.retention import Retention


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slices, "CHUNK_BYTES", 64)
    return small_run(tmp_path / "run")


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and a store behind a URL that fsspec writes to."""
    yield str(tmp_path / "far") if request.param == "folder" else "memory://far"
    fsspec.filesystem("memory").store.clear()


def test_what_is_lost_comes_back_to_the_byte(run: Path, place: str) -> None:
    mirror = Mirror(place, run)
    assert mirror.steps() == [] and mirror.location == f"{place}/run"
    for step in (10, 20):
        mirror.copy_out(step)
    assert mirror.steps() == [20, 10]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shutil.rmtree(run)
    mirror.run_files_back()
    for step in mirror.steps():
        mirror.check_sizes(mirror.open(step))
        back(mirror, run, step)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for step in committed(run):
        saved = open_checkpoint(run, step)
        saved.verify()
        assert np.array_equal(saved.read("b"), values(step)["param/b"])


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "manifest.json"])
def test_a_flipped_bit_in_the_mirror_is_refused_by_name(run: Path, place: str, name: str) -> None:
    mirror = Mirror(place, run)
    mirror.copy_out(20)
    store = store_of(mirror.location)
    flip(store, f"step-000000020/{name}")
    shutil.rmtree(step_folder(run, 20))
    path = f"{mirror.location}/step-000000020/{name}".replace("memory:///", "memory://")
    with pytest.raises(CheckpointError) as refused:
        back(mirror, run, 20)
    assert path in str(refused.value) and committed(run) == [10]
    if name.startswith("rank"):
        assert "chunk 1 (from byte 64) is not what was written" in str(refused.value)
        store.write(f"step-000000020/{name}", [b"cut"])
        with pytest.raises(CheckpointError, match="has 3 bytes, "):
            mirror.check_sizes(mirror.open(20))
        store.remove(f"step-000000020/{name}")
        with pytest.raises(CheckpointError, match=r"rank-00001.safetensors is missing"):
            mirror.check_sizes(mirror.open(20))


def test_a_damaged_checkpoint_is_not_copied(run: Path, place: str) -> None:
    flip(FolderStore(step_folder(run, 20)), "rank-00002.safetensors")
    mirror = Mirror(place, run)
    mirror.copy_out(10)
    with pytest.raises(CheckpointError, match=r"run/checkpoints/step-000000020/rank-00002.*chunk"):
        mirror.copy_out(20)
    assert mirror.steps() == [10]


def test_retention_holds_in_the_mirror(run: Path, place: str) -> None:
    mirror = Mirror(place, run)
    for step in (10, 20, 30, 40, 90):
        write(run, step)
        mirror.copy_out(step)
    # 90 is of a history that was left: the run went on from an earlier one.
    mirror.prune(Retention(2, every_steps=20, every_hours=1e6), newest=40)
    assert mirror.steps() == [40, 30, 20, 10]
    mirror.prune(Retention(1, every_steps=20), newest=40)
    assert mirror.steps() == [40, 20]
    names = {name.partition("/")[0] for name in store_of(mirror.location).names()}
    assert names == {"config.json", "step-000000040", "step-000000020"}


COPIER = """
import sys
from pathlib import Path
from data.store import FolderStore
from train.mirror import Mirror
write = FolderStore.write
def slow(self, name, pieces):
    def one_by_one():
        for piece in pieces:
            yield piece
            if name.endswith(sys.argv[3]):
                print("half", flush=True)
                sys.stdin.read()
    write(self, name, one_by_one())
FolderStore.write = slow
Mirror(sys.argv[2], Path(sys.argv[1])).copy_out(20)
"""


@pytest.mark.parametrize("last", ["rank-00001.safetensors", "manifest.json"])
def test_a_copy_that_is_killed_does_not_exist_and_is_made_again(
    run: Path, tmp_path: Path, last: str
) -> None:
    mirror = Mirror(str(tmp_path / "far"), run)
    mirror.copy_out(10)
    command = [sys.executable, "-c", COPIER, str(run), str(tmp_path / "far"), last]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    left = {path.name for path in (tmp_path / "far/run/step-000000020").iterdir()}
    assert any(is_leftover(name, of=last) for name in left) and "manifest.json" not in left
    assert mirror.steps() == [10]
    mirror.copy_out(20)
    assert mirror.steps() == [20, 10]
    shutil.rmtree(step_folder(run, 20))
    back(mirror, run, 20)
    open_checkpoint(run, 20).verify()
    whole = {path.name for path in step_folder(run, 20).iterdir()}
    assert {path.name for path in (tmp_path / "far/run/step-000000020").iterdir()} == whole


def test_a_run_that_comes_back_has_its_config_last(run: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(run, tmp_path / "mine" / run.name)
    for name in ("events.jsonl", "phases.jsonl", "attempts.jsonl"):
        (mine / name).touch()
    Mirror(str(tmp_path / "far"), mine).copy_out(10)
    lost = tmp_path / "lost" / run.name
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.mirror.write_durably", lambda path, _: written.append(path.name))
        Mirror(str(tmp_path / "far"), lost).run_files_back()
    assert len(written) == 4 and written[-1] == "config.json"


def test_two_runs_of_one_name_do_not_share_a_mirror(run: Path, place: str, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    for folder, name in ((run, "aa"), (other, "bb")):
        (folder / "config.json").write_text(json.dumps({"id": name}))
    Mirror(place, run).copy_out(10)
    with pytest.raises(DataUsageError) as refused:
        Mirror(place, other).copy_out(20)
    assert str(refused.value).startswith(
        f"the mirror {place}/run holds the checkpoints of another run that is called run, too (id "
        f"aa there, bb in {other / 'config.json'}); name another folder with checkpoint.mirror="
    )
    assert Mirror(place, run).steps() == [10]
    # A run that was lost knows no id, and gets its own back.
    (other / "config.json").unlink()
    Mirror(place, other).check_same_run()


def test_a_torn_config_in_the_mirror_is_written_again_by_the_run_of_its_attempts(
    run: Path, place: str
) -> None:
    mirror = Mirror(place, run)
    (run / "attempts.jsonl").write_text('{"attempt": 1, "time": 5}\n')
    mirror.copy_out(10)
    store = store_of(mirror.location)
    store.write("config.json", [b'{"id": "a'])
    (run / "attempts.jsonl").write_text('{"attempt": 1, "time": 5}\n{"attempt": 2}\n')
    mirror.copy_out(20)
    assert b"".join(store.read("config.json")) == b"{}" and mirror.steps() == [20, 10]
    for torn in (b"", b"[]", b"[" * 100_000):
        store.write("config.json", [torn])
        mirror.check_same_run()
    (run / "attempts.jsonl").write_text('{"attempt": 1, "time": 6}\n')
    told = "config.json is damaged, and does not tell whose the copies beside it are; if they are "
    with pytest.raises(MirrorError, match=told):
        mirror.copy_out(20)
    store.remove("config.json")
    mirror.copy_out(20)
    # What is wrong with the run's own is told by those who read it.
    (run / "config.json").write_text("{")
    mirror.check_same_run()


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataUsageError, match="https:// is only read; name a folder"):
        Mirror("https://host/a", tmp_path / "run")
    for url in ("memory://user:secret@host/a", "memory://host/a?token=secret"):
        with pytest.raises(DataUsageError, match="the mirror at memory://host/") as raised:
            Mirror(url, tmp_path / "run")
        assert "secret" not in str(raised.value)
    with pytest.raises(DataUsageError, match="fsspec knows no nothing://; name a folder, or"):
        Mirror("nothing://host/a", tmp_path / "run")
    with pytest.raises(DataUsageError, match=r"is where .*run itself lies; name another folder"):
        Mirror(str(tmp_path), tmp_path / "run")


def test_a_mirror_that_cannot_be_looked_into_is_named(tmp_path: Path) -> None:
    class Away(FolderStore):
        def names(self) -> list[str]:
            raise PermissionError(13, "Permission denied")

    mirror = Mirror(str(tmp_path / "far"), tmp_path / "run")
    mirror._store = Away(tmp_path)
    with pytest.raises(MirrorError, match=r"the mirror .*far/run cannot be read: Permission"):
        mirror.steps()


def test_names_of_a_store_are_relative(place: str) -> None:
    store = store_of(f"{place}/run")
    assert store.names() == []
    store.write("a/b", [b"1", b"23"])
    store.write("c", [])
    assert store.names() == ["a/b", "c"]
    assert (store.size("a/b"), b"".join(store.read("a/b"))) == (3, b"123")
    store.remove("a")
    store.remove("a")
    assert store.names() == ["c"]
