"""SIGKILL at every I/O call of a save: a whole checkpoint is always there, and no step before the
last commit is lost.

The points are recorded from a save that is not disturbed and are no round number: how many there
are is printed (-s) and asserted. A sample runs by default, all of them in soak.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.checkpoints import SHAPES, values, write
from tests.train.crash_points import GAVE_UP, Case, as_line, save
from train import slices
from train.checkpoint import begin, committed, step_folder
from train.choice import choose

ROOT = Path(__file__).parent.parent.parent
STEP = 40
EARLIER = (10, 20, 30)
SAMPLE = 60
LEFT = "manifest.json.0123abcd.tmp"
"""What a commit that was killed leaves."""


@dataclass(frozen=True)
class Variant:
    """A save in one situation."""

    name: str
    num_ranks: int = 2
    chunk_bytes: int = slices.CHUNK_BYTES
    keep: int = 2
    every_steps: int = 0
    earlier: tuple[int, ...] = EARLIER
    leftovers: tuple[int, ...] = ()
    """Steps of saves that were cut before their commit."""
    damaged: tuple[int, ...] = ()
    """Committed steps with a flipped bit, which the attempt has passed over."""


@dataclass(frozen=True)
class Point:
    """A moment of a save."""

    rank: int
    number: int
    when: str
    what: str
    is_committed: bool


VARIANTS = [
    Variant("first checkpoint of a run", earlier=()),
    Variant("one rank", num_ranks=1),
    Variant("two ranks"),
    Variant("four ranks", num_ranks=4),
    Variant("eight ranks", num_ranks=8),
    Variant("files of two chunks", chunk_bytes=192),
    Variant("keep one", keep=1),
    Variant("keep one of four ranks", num_ranks=4, keep=1),
    Variant("nothing to prune", keep=9),
    Variant("milestones stay", keep=1, every_steps=20),
    Variant("over leftovers of the same step", leftovers=(STEP,)),
    Variant("over leftovers, four ranks", num_ranks=4, leftovers=(STEP,), keep=1),
    Variant("leftovers of other steps", leftovers=(15, 25)),
    Variant("leftovers, eight ranks", num_ranks=8, leftovers=(15, STEP), keep=1),
    Variant("went on from an earlier one", earlier=(10, 30, 50), damaged=(50,)),
    Variant("over a damaged one of the same step", earlier=(10, 30, STEP), damaged=(STEP,)),
    Variant("over a damaged one, four ranks", 4, earlier=(10, 30, STEP, 50), damaged=(STEP, 50)),
    Variant("many ranks and many to prune", num_ranks=12, keep=1, leftovers=(5, 15, STEP)),
    Variant("sixteen ranks", num_ranks=16, keep=1, chunk_bytes=128),
    Variant("sixteen ranks over leftovers", num_ranks=16, keep=1, leftovers=(STEP,)),
]


class Stage:
    """Plays cases of one variant, each on a fresh copy of its run."""

    def __init__(self, folder: Path, variant: Variant, ranks: subprocess.Popen[str]) -> None:
        self.variant = variant
        self._folder = folder
        self._ranks = ranks
        self._base = folder / "base"
        self._monkey = pytest.MonkeyPatch()
        self._monkey.setattr(slices, "CHUNK_BYTES", variant.chunk_bytes)
        for step in variant.earlier:
            write(self._base, step, num_ranks=variant.num_ranks)
        for step in variant.leftovers:
            begin(self._base, step)
            for name in ("rank-00000.safetensors", "rank-00001.safetensors", LEFT):
                (step_folder(self._base, step) / name).write_bytes(b"cut")
        for step in variant.damaged:
            path = step_folder(self._base, step) / "rank-00000.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    def close(self) -> None:
        self._monkey.undo()
        shutil.rmtree(self._folder, ignore_errors=True)

    def play(self, **how: Any) -> dict[str, Any]:
        """One save; leaves its outcome in `run`."""
        shutil.rmtree(self._folder / "run", ignore_errors=True)
        shutil.rmtree(self._folder / "control", ignore_errors=True)
        (self._folder / "control").mkdir(parents=True)
        if self._base.exists():
            shutil.copytree(self._base, self._folder / "run")
        case = Case(
            run=str(self._folder / "run"),
            control=str(self._folder / "control"),
            step=STEP,
            num_ranks=self.variant.num_ranks,
            chunk_bytes=self.variant.chunk_bytes,
            keep=self.variant.keep,
            every_steps=self.variant.every_steps,
        )
        assert self._ranks.stdin is not None and self._ranks.stdout is not None
        self._ranks.stdin.write(as_line(replace(case, **how)))
        self._ranks.stdin.flush()
        answer: dict[str, Any] = json.loads(self._ranks.stdout.readline())
        self.case = replace(case, **how)
        return answer

    def points(self) -> list[Point]:
        """Every point of an undisturbed save."""
        found = self.play()["points"]
        rows = []
        for rank in range(self.variant.num_ranks):
            calls = found[str(rank)]
            renames = [number for number, call in enumerate(calls) if call.startswith("rename")]
            for number, call in enumerate([*calls, "the end"]):
                # Of another rank's point nobody knows how far rank 0 is.
                done = rank == 0 and number > renames[0]
                rows.append(Point(rank, number, "before", call, done))
                if call.startswith("write"):
                    rows.append(Point(rank, number, "middle", call, done))
        return rows

    def check(self, *, is_committed: bool) -> None:
        """What any other process finds after the crash, and that the next attempt goes on."""
        run = self._folder / "run"
        choice = choose(run)
        last = max((s for s in self.variant.earlier if s not in self.variant.damaged), default=None)
        # Nothing that was committed is damaged by a crash.
        assert {passed.step for passed in choice.passed_over} <= set(self.variant.damaged)
        if choice.taken is None:
            assert last is None and not is_committed, "no whole checkpoint is left"
        else:
            step = choice.taken.step
            assert step in (last, STEP), "more than one interval is lost"
            assert step == STEP or not is_committed, "a committed checkpoint is lost"
            for name, shape in SHAPES.items():
                expected = values(step)[f"param/{name}"].reshape(shape)
                assert np.array_equal(choice.taken.read(name), expected)
        entries: list[Any] = []
        case = replace(self.case, num_ranks=1, kill=None, prune_first=False)
        save(case, 0, lambda _, value: entries.append(value) or [value])
        choice = choose(run)
        assert choice.taken is not None and choice.taken.step == STEP and not choice.passed_over
        folders = {int(path.name[5:]) for path in (run / "checkpoints").iterdir()}
        assert folders == set(committed(run)) == self.left()

    def left(self) -> set[int]:
        """Steps that are there when all is done."""
        before = sorted({s for s in self.variant.earlier if s < STEP} | {STEP})
        every = self.variant.every_steps
        milestones = {step for step in before if every and step % every == 0}
        return set(before[-self.variant.keep :]) | milestones


@pytest.fixture(scope="module")
def ranks() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.crash_points"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def stages(tmp_path: Path, ranks: subprocess.Popen[str]) -> Iterator[Any]:
    made: list[Stage] = []

    def stage(variant: Variant) -> Stage:
        made.append(Stage(tmp_path / str(len(made)), variant, ranks))
        return made[-1]

    yield stage
    for one in reversed(made):
        one.close()


def crash(stage: Stage, point: Point, *, whole_node: bool) -> None:
    """Kill there, and look."""
    answer = stage.play(kill=(point.rank, point.number, point.when), whole_node=whole_node)
    assert answer["codes"][str(point.rank)] == -9, "the point was not reached"
    others = {code for other, code in answer["codes"].items() if int(other) != point.rank}
    assert others <= {-9, GAVE_UP, 0}
    try:
        stage.check(is_committed=point.is_committed)
    except AssertionError as error:
        raise AssertionError(f"{stage.variant.name}: SIGKILL at {point}: {error}") from error


def test_a_save_is_cut_at_a_sample_of_its_io_calls(stages: Any) -> None:
    chosen = random.Random(0)
    for variant in VARIANTS:
        stage = stages(variant)
        points = stage.points()
        # One in the middle of a write, one of rank 0's in commit or prune, one anywhere.
        groups = [
            [point for point in points if point.when == "middle"],
            [point for point in points if point.rank == 0][-12:],
            points,
        ]
        for group in groups:
            crash(stage, chosen.choice(group), whole_node=chosen.random() < 0.5)
        stage.close()
    assert 3 * len(VARIANTS) == SAMPLE


@pytest.mark.slow
def test_a_save_is_cut_at_every_one_of_its_io_calls(stages: Any) -> None:
    counts: Counter[str] = Counter()
    for variant in VARIANTS:
        stage = stages(variant)
        points = stage.points()
        print(f"{variant.name}: {len(points)} points")
        for point in points:
            for whole_node in (False, True):
                crash(stage, point, whole_node=whole_node)
            counts[point.what.split()[0]] += 1
        stage.close()
    print(f"{counts.total()} points, each with one rank killed and with all: {dict(counts)}")
    assert counts.total() >= 1000


def test_the_points_are_the_calls_that_are_known(stages: Any) -> None:
    """Rank 0 of two that overwrites leftovers and prunes a checkpoint: the order is the promise."""
    stage = stages(Variant("listed", keep=3, leftovers=(STEP,)))
    folder = f"checkpoints/step-{STEP:09d}"
    points = [point for point in stage.points() if point.rank == 0 and point.when == "before"]
    told = [point.what for point in points]
    for line in told:
        print(line)
    cut = [line for line in told if not line.startswith(("remove", "rmdir"))]
    removed = [line for line in told if line.startswith("remove")]
    assert cut[0] == f"mkdir {folder}"
    assert cut[1:-1] == [
        f"open {folder}/rank-00000.safetensors",
        *(line for line in cut if line.startswith("write") and "rank-" in line),
        f"fsync {folder}/rank-00000.safetensors",
        f"fsync {folder}",
        "fsync checkpoints",
        "fsync .",
        f"open {folder}/manifest.json.tmp",
        next(line for line in cut if line.startswith("write") and "manifest" in line),
        f"fsync {folder}/manifest.json.tmp",
        f"rename {folder}/manifest.json.tmp",
        f"fsync {folder}",
    ]
    # The manifest goes first, then three files of leftovers; of the pruned one three in all.
    assert removed[0] == f"remove {folder}/manifest.json"
    assert removed[4] == "remove checkpoints/step-000000010/manifest.json"
    assert len(removed) == 1 + 3 + 1 + 2


def test_a_protocol_that_prunes_before_it_commits_is_caught(stages: Any) -> None:
    stage = stages(Variant("wrong on purpose"))
    stage.play(prune_first=True)
    (fsync,) = [
        number
        for number, line in enumerate(stage.play(prune_first=True)["points"]["0"])
        if line.startswith("rename")
    ]
    stage.play(prune_first=True, kill=(0, fsync, "before"))
    with pytest.raises(AssertionError, match="no whole checkpoint is left"):
        stage.check(is_committed=False)
