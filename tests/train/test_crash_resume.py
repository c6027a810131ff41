"""SIGKILL at an I/O call of a real save, then a real resume: the run ends with the bits of one that
nothing happened to.

tests/train/test_crash_points.py cuts at every call of a commit, without an engine. Here DeepSpeed
trains and saves, twenty of those calls are cut, some of each kind, and what every crash has left is
trained to its end. Two calls by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.durable import read_rows
from tests.data.tiny import documents, write_dataset
from tests.ranks import RankFailure, run_ranks
from tests.train.crash_points import Trace
from tests.train.test_pretrain import config, losses, train_many, train_run
from train.checkpoint import committed, open_checkpoint
from train.config import RunConfig
from train.world import World

RANKS, EVERY, STEP = 2, 2, 4
"""The save of step 4 is cut: it is neither the first one nor the last, and it prunes step 2."""
SETTINGS = ("steps=6", f"checkpoint.every={EVERY}", "checkpoint.keep=1", "eval.samples=2")
NEW, OLD = f"step-{STEP:09d}", f"step-{STEP - EVERY:09d}"


@dataclass(frozen=True)
class Cut:
    """Where a rank is killed: at the n-th call of that kind in the save."""

    rank: int
    call: str
    path: str
    number: int = 0
    when: str = "before"
    is_committed: bool = False

    def point(self, points: list[str]) -> tuple[int, int, str]:
        """As the trace counts it."""
        # Rank 1 makes no folder, and its paths tell which save it is.
        begun = points.index(f"mkdir {NEW}") if self.rank == 0 else 0
        found = [
            number
            for number, told in enumerate(points)
            if number >= begun and (told.split()[0], told.split()[-1]) == (self.call, self.path)
        ]
        return self.rank, found[self.number], self.when


def _file(rank: int) -> str:
    return f"{NEW}/rank-{rank:05d}.safetensors"


MANIFEST = f"{NEW}/manifest.json.tmp"
CUTS = [
    Cut(0, "mkdir", NEW),
    Cut(0, "open", _file(0)),
    Cut(0, "write", _file(0)),
    Cut(0, "write", _file(0), 2, "middle"),
    Cut(1, "open", _file(1)),
    Cut(1, "write", _file(1), 0, "middle"),
    Cut(1, "write", _file(1), 1),
    Cut(1, "write", _file(1), 3, "middle"),
    Cut(0, "fsync", _file(0)),
    Cut(1, "fsync", _file(1)),
    Cut(0, "fsync", NEW),
    Cut(0, "fsync", "."),
    Cut(0, "open", MANIFEST),
    Cut(0, "write", MANIFEST, 0, "middle"),
    Cut(0, "fsync", MANIFEST),
    Cut(0, "rename", MANIFEST),
    Cut(0, "fsync", NEW, 1, is_committed=True),
    Cut(0, "remove", f"{OLD}/manifest.json", is_committed=True),
    Cut(0, "remove", "rank-00001.safetensors", is_committed=True),
    Cut(0, "rmdir", f"{OLD}", is_committed=True),
]
DEFAULT = [CUTS[5], CUTS[17]]


def train_traced(
    world: World, made: RunConfig, run: Path, kill: tuple[int, int, str] | None
) -> list[str]:
    """Train; the points of this rank."""
    mine = kill[1:] if kill is not None and kill[0] == world.rank else None
    trace = Trace(str(run / "checkpoints"), mine)
    assert train_run(world, made, run) == "complete"
    return trace.points


def crash(made: RunConfig, run: Path, cut: Cut, points: list[list[str]]) -> None:
    """Train until the cut."""
    with pytest.raises(RankFailure, match=f"rank {cut.rank} died without a word|rank 0 raised"):
        run_ranks(RANKS, train_traced, made, run, cut.point(points[cut.rank]))
    # What a crash has left: the save of this step counts or does not, and no other is missing.
    newest = STEP if cut.is_committed else STEP - EVERY
    assert committed(run)[0] == newest, cut
    open_checkpoint(run, newest).verify()


def everything(run: Path) -> list[Any]:
    """Every loss, norm and hash, and the weights and moments at the end."""
    saved = open_checkpoint(run)
    stored = [saved.read(n, k).tobytes() for n in sorted(saved.parameters) for k in saved.keys]
    return [losses(run), saved.step, saved.scalars, stored]


@pytest.mark.parametrize(
    "cuts", [pytest.param(DEFAULT, id="two"), pytest.param(CUTS, id="all", marks=pytest.mark.slow)]
)
def test_a_real_save_that_is_killed_costs_one_interval_at_most(
    tmp_path: Path, cuts: list[Cut]
) -> None:
    texts = {"train/main": documents(60, seed=1), "val/main": documents(9, seed=2)}
    write_dataset(tmp_path / "dataset", texts)
    made, plain = config(tmp_path / "dataset", *SETTINGS), tmp_path / "plain"
    points = run_ranks(RANKS, train_traced, made, plain, None)
    jobs: list[tuple[RunConfig, Path, int | None]] = []
    for number, cut in enumerate(cuts):
        jobs.append((made, tmp_path / f"run-{number}", None))
        crash(made, jobs[-1][1], cut, points)
    ended = run_ranks(RANKS, train_many, jobs, timeout=600)
    assert ended == [["complete"] * len(jobs)] * RANKS
    for cut, (_, run, _) in zip(cuts, jobs, strict=True):
        (resumed,) = [
            row["resumed_from"] for row in read_rows(run / "metrics.jsonl") if "resumed_from" in row
        ]
        assert resumed == (STEP if cut.is_committed else STEP - EVERY), cut
        assert everything(run) == everything(plain), cut
        # Nothing of the crash is left either.
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000000006"}
    print(f"{len(cuts)} crashes in a real save, {len(jobs)} runs to the same bits")


def test_some_of_each_kind_of_call_are_cut() -> None:
    assert len(CUTS) == len(set(CUTS)) == 20
    assert {cut.call for cut in CUTS} == {
        "mkdir",
        "open",
        "write",
        "fsync",
        "rename",
        "remove",
        "rmdir",
    }
    assert {cut.rank for cut in CUTS} == {0, 1} and len(DEFAULT) == 2
    assert {cut.is_committed for cut in DEFAULT} == {True, False}
