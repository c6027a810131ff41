"""Copies are made beside the training: one at a time, told when they fail, and none by an attempt
that has lost the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.store import FolderStore
from tests.disks import fill, make_room, small_disk
from tests.train.checkpoints import write
from tests.train.mirrors import back, small_run
from train import checkpoint
from train.attempts import end_attempt
from train.checkpoint import committed, open_checkpoint
from train.events import read_events
from train.mirror import Mirror
from train.mirror_thread import Copied, MirrorThread
from train.ownership import RunInUse, own
from train.retention import Retention
from train.saver import Saver
from train.settings import CheckpointConfig
from train.step import tell_mirrored

KEEP = Retention(2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "run")


def result(thread: MirrorThread) -> Copied:
    """Of the next copy to end."""
    deadline = time.monotonic() + 60
    while not thread.results:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return thread.results.popleft()


def test_one_copy_is_in_flight_and_the_newest_is_next(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(str(tmp_path / "far"), run)
    copied: list[int] = []
    go_on: list[int] = []

    def copy_out(step: int) -> None:
        copied.append(step)
        while step not in go_on:
            time.sleep(0.001)

    monkeypatch.setattr(mirror, "copy_out", copy_out)
    thread = MirrorThread(mirror)
    thread.offer(10, KEEP)
    assert thread.in_flight == 10
    while not copied:
        time.sleep(0.001)
    thread.offer(20, KEEP)
    thread.offer(30, KEEP)
    assert (copied, thread.in_flight) == ([10], 10)
    # What is copied stays in the run.
    checkpoint.remove(checkpoint.retire(run, Retention(1), newest=20, in_use=[10]))
    assert committed(run) == [20, 10]
    go_on.append(10)
    assert result(thread).step == 10
    thread.end()
    assert thread.is_busy
    go_on.append(30)
    assert result(thread).step == 30
    while thread.is_busy:
        time.sleep(0.001)
    assert copied == [10, 30] and thread.in_flight is None


def test_a_full_mirror_is_told_and_tried_again(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job: Any = SimpleNamespace(run=run, attempt=1, saver=SimpleNamespace(mirror=None))
    with small_disk(tmp_path / "disk", 64) as disk:
        mirror = Mirror(str(disk), run)
        thread = MirrorThread(mirror)
        fill(disk, leave_kilobytes=8)
        with caplog.at_level(logging.ERROR):
            thread.offer(10, KEEP)
            failed = result(thread)
        assert failed.step == 10 and "No space left on device; make room" in failed.problem
        job.saver.mirror = thread
        thread.results.append(failed)
        assert tell_mirrored(job) == {"mirror_failed_step": 10}
        (event,) = read_events(run, "mirror failed")
        assert (event["step"], event["reason"]) == (10, failed.problem)
        assert f"is not in the mirror {disk}/run, the next one will be tried again" in caplog.text
        assert mirror.steps() == [] and not list(disk.rglob("*.tmp"))
        make_room(disk)
        thread.offer(20, KEEP)
        done = result(thread)
        assert done.problem == "" and mirror.steps() == [20]
        thread.results.append(done)
        assert tell_mirrored(job) == {"mirror_step": 20, "mirror_seconds": done.seconds}
        assert tell_mirrored(job) == {}
        thread.end()


@pytest.mark.parametrize("last", ["rank-00001.safetensors", "manifest.json"])
def test_an_attempt_that_has_lost_the_run_changes_no_copy(
    run: Path, tmp_path: Path, last: str
) -> None:
    owner = own(run)
    late, mirror = (
        Mirror(str(tmp_path / "far"), run, owner.check),
        Mirror(str(tmp_path / "far"), run),
    )
    late.copy_out(10)
    store = late._store
    left: list[list[str]] = []

    class Slow(FolderStore):
        def write(self, name: str, pieces: Iterable[bytes]) -> None:
            if name.endswith(last):
                end_attempt(run, owner.number, outcome="failed", step=None)
                own(run).release()
                for step in (30, 40):
                    write(run, step)
                    mirror.copy_out(step)
                    mirror.prune(KEEP, newest=step)
                left.append(store.names())
            super().write(name, pieces)

    late._store = Slow(tmp_path / "far/run")
    lost = pytest.raises(RunInUse, match="attempt 1 no longer owns")
    with lost:
        late.copy_out(20)
    late._store = store
    (tmp_path / "far/run/step-000000050").mkdir()
    (tmp_path / "far/run/step-000000050/rank-00000.safetensors.0123abcd.tmp").touch()
    left.append(store.names())
    for change in (lambda: late.copy_out(30), lambda: late.prune(Retention(1), newest=10)):
        with lost:
            change()
    assert mirror.steps() == [40, 30] and store.names() == left[1]
    assert set(left[1]) - set(left[0]) == {"step-000000050/rank-00000.safetensors.0123abcd.tmp"}
    for step in (30, 40):
        back(mirror, run, step)
        open_checkpoint(run, step).verify()
    owner.release()


def test_a_saver_that_has_lost_the_run_copies_nothing(run: Path, tmp_path: Path) -> None:
    rank_0: Any = SimpleNamespace(is_main=True)
    engine: Any = None
    owner = own(run)
    settings = CheckpointConfig(mirror=str(tmp_path / "far"))
    saver = Saver(engine, rank_0, run, config=settings, owner=owner)
    assert saver.mirror is not None
    saver.mirror.offer(10, KEEP)
    assert result(saver.mirror).problem == ""
    end_attempt(run, owner.number, outcome="failed", step=None)
    own(run).release()
    saver.mirror.offer(20, KEEP)
    assert "RunInUse: attempt 1 no longer owns" in result(saver.mirror).problem
    assert Mirror(str(tmp_path / "far"), run).steps() == [10]
    saver.mirror.end()
    saver.close()
    owner.release()
