"""A file server that is away for a moment costs a resume no checkpoint."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.checkpoints import write
from train.checkpoint import open_checkpoint
from train.choice import choose
from train.patience import PAUSES
from train.slices import CheckpointError


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
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
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
