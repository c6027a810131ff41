"""Runs with a mirror: what they lose comes back, and a mirror that fails costs them nothing."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import train.saver
import train.step
from data.durable import read_rows
from data.store import FolderStore
from tests.disks import fill, small_disk
from tests.ranks import run_ranks
from tests.train.test_pretrain import config, losses, train_run
from train.attempts import attempts
from train.checkpoint import committed, open_checkpoint, step_folder
from train.config import RunConfig
from train.listing import list_checkpoints, verify
from train.mirror import Mirror
from train.pretrain import pretrain_on
from train.world import World


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two ranks, without a mirror."""
    run = tmp_path_factory.mktemp("mirror") / "run"
    assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    return run


def to_step(world: World, made: RunConfig, run: Path, stop_at: int) -> str:
    return pretrain_on(world, made, run, stop_at=stop_at)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_run_goes_on_from_its_mirror(dataset: Path, whole: Path, tmp_path: Path) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    made = config(dataset, f"checkpoint.mirror={far}", "checkpoint.keep=2")
    run_ranks(2, to_step, made, run, 6)
    mirror = Mirror(str(far), run)
    assert mirror.steps() == committed(run) == [6, 3]
    rows = read_rows(run / "metrics.jsonl")
    assert {row["mirror_step"] for row in rows if "mirror_step" in row} <= {3}
    listed = list_checkpoints(run).checkpoints
    assert [(row.step, row.mirror) for row in listed] == [
        (6, None),
        (3, None),
        (6, mirror.location),
        (3, mirror.location),
    ]
    assert [row.bytes for row in listed[:2]] == [row.bytes for row in listed[2:]]
    # Damaged here, whole there: taken from there.
    flip(step_folder(run, 6) / "rank-00001.safetensors")
    found = verify(run)
    assert found.mirror == mirror.location and found.to_json()["resume_takes"] == 6
    run_ranks(2, to_step, made, run, 7)
    assert read_rows(run / "metrics.jsonl")[-1]["resumed_from"] == 6
    open_checkpoint(run, 6).verify()
    # Lost as a whole, and the newest copy is damaged.
    shutil.rmtree(run)
    flip(far / "run/step-000000007/rank-00000.safetensors")
    assert run_ranks(2, pretrain_on, made, run) == ["complete"] * 2
    assert losses(run) == [row for row in losses(whole) if row[0] > 6]
    assert committed(run) == [8, 6] and mirror.steps() == [8, 7]
    # Nothing is newer there than here.
    before = (run / "metrics.jsonl").read_bytes()
    assert run_ranks(2, pretrain_on, made, run) == ["complete"] * 2
    assert (run / "metrics.jsonl").read_bytes() == before


def beside_a_mirror_that_hangs(
    world: World, made: RunConfig, run: Path, act: str, rank: int
) -> str:
    """Train; copies take for ever. A stop is asked of one rank at the end of step 5, or while the
    run waits for its mirror.
    """
    agreed, leave = train.step._agreed, train.saver.wait_for_all
    Mirror.copy_out = lambda self, step: time.sleep(3600)  # type: ignore[method-assign]

    def ask() -> None:
        if world.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def at_a_step(job: Any, step: int, *rest: Any) -> Any:
        if (act, step) == ("in a step", 5):
            ask()
        return agreed(job, step, *rest)

    def at_the_end(*args: Any, **options: Any) -> bool:
        if (act, options["place"]) == ("at the end", "mirror"):
            threading.Timer(0.3, ask).start()
        return leave(*args, **options)

    train.step._agreed, train.saver.wait_for_all = at_a_step, at_the_end
    return pretrain_on(world, made, run)


@pytest.mark.parametrize(
    ("act", "rank", "outcome"),
    [
        ("in a step", 0, "stopped"),
        ("in a step", 1, "stopped"),
        ("at the end", 1, "complete"),
        ("nobody asks", 0, "complete"),
    ],
)
def test_a_mirror_that_takes_nothing_holds_up_no_stop_and_no_end(
    dataset: Path, tmp_path: Path, act: str, rank: int, outcome: str
) -> None:
    made = config(dataset, f"checkpoint.mirror={tmp_path / 'far'}", "stall_seconds=4")
    run = tmp_path / "run"
    assert run_ranks(2, beside_a_mirror_that_hangs, made, run, act, rank) == [outcome] * 2
    assert attempts(run)[-1]["outcome"] == outcome
    assert committed(run)[0] == (5 if outcome == "stopped" else 8)


def test_a_mirror_that_is_full_costs_a_run_nothing(
    dataset: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with small_disk(tmp_path / "disk", 100) as disk:
        fill(disk, leave_kilobytes=40)
        made = config(dataset, f"checkpoint.mirror={disk}")
        assert run_ranks(2, pretrain_on, made, run) == ["complete"] * 2
        assert Mirror(str(disk), run).steps() == []
    assert losses(run) == losses(whole)
    events = [row for row in read_rows(run / "events.jsonl") if row["event"] == "mirror failed"]
    assert events[-1]["step"] == 8 and "No space left on device" in events[-1]["reason"]
    rows = read_rows(run / "metrics.jsonl")
    assert {row["mirror_failed_step"] for row in rows if "mirror_failed_step" in row} <= {3, 6}


def beside_a_slow_mirror(world: World, made: RunConfig, run: Path) -> str:
    """Train; the copy of step 3 takes longer than the run."""
    real = FolderStore.read

    def slow(self: FolderStore, name: str, first: int = 0) -> Iterator[bytes]:
        for piece in real(self, name, first):
            while committed(run)[0] < 9 and (step_folder(run, 3) / "manifest.json").exists():
                time.sleep(0.01)
            yield piece

    FolderStore.read = slow  # type: ignore[method-assign]
    return pretrain_on(world, made, run)


def test_a_copy_that_takes_long_gives_way_where_a_save_needs_its_room(
    dataset: Path, tmp_path: Path
) -> None:
    made = config(dataset, f"checkpoint.mirror={tmp_path / 'far'}", "checkpoint.keep=1", "steps=9")
    # Two checkpoints of 570 kB fit, and no third.
    with small_disk(tmp_path / "disk", 1400) as disk:
        run = disk / "run"
        assert run_ranks(1, beside_a_slow_mirror, made, run) == ["complete"]
        assert committed(run)[0] == 9 and Mirror(str(tmp_path / "far"), run).steps() == [9]
        (event,) = [r for r in read_rows(run / "events.jsonl") if r["event"] == "mirror failed"]
    assert event["step"] == 3
    assert event["reason"] == "MirrorError: the run needed its room before it was copied"
