"""Who is blamed when a run stands still, and that it is watched from its start."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

import train.watch
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, train_run
from train import faults
from train.config import RunConfig
from train.progress import PLACES, at
from train.watch import EXIT_STALLED, Watch, verdict_of
from train.world import World

HOSTS = ("n0", "n1")


def told(rank: int, phase: str, *, step: int = 7, waits: bool = False) -> dict[str, Any]:
    where = {"rank": rank, "host": f"n{rank}", "pid": 100 + rank}
    return {**where, "phase": phase, "step": step, "seconds": 9.0, "reading": "", "waits": waits}


def test_who_waits_in_a_collective_is_not_to_blame() -> None:
    said = verdict_of([told(0, "reduce", waits=True), told(1, "data")], HOSTS)
    assert said.startswith("rank 1 on n1 (process 101) stands still at data of step 7 for 9.0 s")


def test_a_rank_that_tells_nothing_is_named() -> None:
    said = verdict_of([told(0, "reduce", waits=True)], HOSTS)
    assert said.startswith("rank 1 on n1 no longer answers: ")


@pytest.mark.parametrize("phase", PLACES)
def test_every_place_has_a_verdict(phase: str) -> None:
    said = verdict_of([told(0, phase), told(1, phase, step=8)], HOSTS)
    assert said.startswith(f"rank 0 on n0 (process 100) stands still at {phase} of step 7")


def test_a_rank_that_stands_still_is_ended_although_its_storage_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise OSError(errno.EIO, "no storage")

    def leave(code: int) -> None:
        left.append(code)
        watch._closed.set()

    left: list[int] = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(Path, "glob", fails)
    for name in ("START_SECONDS", "GATHER_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(train.watch, name, 0.0)
    (tmp_path / "attempts").mkdir()
    at("build")
    watch = Watch(
        tmp_path, attempt=1, rank=0, hosts=["n0"], stall_seconds=0.1, reading=lambda step: ""
    )
    watch._thread.join(10)
    assert left == [EXIT_STALLED]
    monkeypatch.undo()
    (own,) = (tmp_path / "attempts").iterdir()
    stacks = json.loads(own.read_bytes())["stacks"]
    assert "Thread MainThread:\n" in stacks and "Thread watch:\n" in stacks
    assert f'  File "{__file__}", line ' in stacks


def train_with(world: World, made: RunConfig, run: Path, fault: str) -> str:
    train.watch.START_SECONDS = 4.0
    faults.arm(fault, world.rank)
    return train_run(world, made, run)


@pytest.mark.parametrize("phase", ["build", "load"])
def test_a_rank_that_never_comes_to_its_first_step_is_named(
    dataset: Path, tmp_path: Path, phase: str
) -> None:
    made = config(dataset, "stall_seconds=4")
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(2, train_with, made, tmp_path, f"{phase}:0:1:hang")
    report = json.loads((tmp_path / "attempts/000001.stall.json").read_bytes())
    assert report["verdict"].startswith("rank 1 on ")
    assert f"stands still at {phase} of step 0 for " in report["verdict"]
