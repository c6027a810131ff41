"""A file server that is away for a moment costs a resume no checkpoint."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.checkpoints import write
from train.checkpoint import open_checkpoint
from train.choice import choose
from train.ownership import own
from train.patience import PAUSES
from train.slices import CheckpointError
from train.stop import LOOK_SECONDS, StopRequest


def failing(call: Callable[..., Any], *errors: int) -> Callable[..., Any]:
    """The call, which fails so often first."""
    left = list(errors)

    def failed(*args: Any, **settings: Any) -> Any:
        if left:
            code = left.pop(0)
            raise OSError(code, os.strerror(code))
        return call(*args, **settings)

    return failed


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long this thread has been told to sleep, which it does not."""
    slept: list[float] = []
    real, own = time.sleep, threading.get_ident()

    def sleep(seconds: float) -> None:
        # Threads that other tests have left sleep on, and not here.
        (slept.append if threading.get_ident() == own else real)(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    return slept


CALLS = [(os, "pread"), (os, "open"), (Path, "read_bytes")]


@pytest.mark.parametrize(("owner", "name"), CALLS)
def test_what_passes_is_asked_again_and_the_newest_checkpoint_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], owner: Any, name: str
) -> None:
    write(tmp_path, 5)
    stored = write(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), errno.EIO, errno.ESTALE))
        saved = open_checkpoint(tmp_path, 10)
        assert saved.read("a").tobytes() == stored["param/a"].tobytes()
    assert pauses == list(PAUSES[:2])


def test_what_stays_is_told_and_what_cannot_pass_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing(os.pread, *[errno.EIO] * (len(PAUSES) + 1)))
        choice = choose(tmp_path)
    assert choice.taken is not None and choice.taken.step == 5
    assert "cannot be read: Input/output error" in choice.passed_over[0].reason
    assert pauses == list(PAUSES)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Permission denied"):
        patch.setattr(Path, "read_bytes", failing(Path.read_bytes, errno.EACCES))
        open_checkpoint(tmp_path, 10)
    assert pauses == list(PAUSES)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_look_for_a_request_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "SAVE").touch()
    (tmp_path / "STOP").touch()
    stop = StopRequest()
    stop.watch(tmp_path, None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing(os.stat, code, code))
        stop.look()
    assert (stop.save, stop.reason) == (False, None)
    stop._looked -= LOOK_SECONDS
    stop.look()
    assert stop.save and stop.reason == f"the file {tmp_path / 'STOP'}"


def test_an_owner_is_asked_for_again_and_stays_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    owner = own(tmp_path)
    owner.release()
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, failing(getattr(os, name), errno.EIO, errno.ESTALE))
    owner.check()
    assert pauses == list(PAUSES[:2])
