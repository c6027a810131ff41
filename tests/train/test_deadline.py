"""The end of a job is what Slurm says last; where nobody answers, what the job was started with."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from train import deadline
from train.deadline import Deadline, parse_time_left
from train.world import slurm_deadline


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2-03:04:05\n", 183_845),
        ("3:04:05", 11_045),
        ("04:05", 245),
        ("0:00", 0),
        ("1:00:00\n04:05\nUNLIMITED\n", 245),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_every_form_of_squeue_is_read(text: str, seconds: float | None) -> None:
    assert parse_time_left(text) == seconds


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose content a stand-in for squeue says, if it is asked as the real one is."""
    said = tmp_path / "said"
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$*" = "--noheader --job 77 --format %L" ] && cat {said}\n', encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(deadline, "ASK_SECONDS", 0.05)
    return said


def wait_for(found: Deadline, low: float, high: float) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        left = found.seconds_left()
        if left is not None and low < left <= high:
            return
        time.sleep(0.02)
    raise AssertionError(f"{found.seconds_left()} s left, not {low} to {high}")


def test_slurm_is_asked_again_and_again(squeue: Path) -> None:
    squeue.write_text("2:00\n", encoding="utf-8")
    found = Deadline("77")
    wait_for(found, 100, 120)
    squeue.write_text("1-00:00:00\n", encoding="utf-8")
    wait_for(found, 86_000, 86_400)
    # The job is gone from the queue, or the server is: what was known holds.
    squeue.write_text("", encoding="utf-8")
    time.sleep(0.3)
    wait_for(found, 86_000, 86_400)


def test_without_squeue_the_environment_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 300))
    found = slurm_deadline()
    assert found is not None
    wait_for(found, 290, 300)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm_deadline() is None
