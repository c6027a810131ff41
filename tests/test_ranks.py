"""What keeps the tests quick: ranks import little and start nothing, and long files come first."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.conftest import LONGEST
from tests.ranks import ROOT, run_ranks
from tests.train.test_pretrain import config, train_run
from train.config import RunConfig
from train.world import World


def what_a_run_adds(world: World, made: RunConfig, run: Path) -> tuple[set[str], list[str]]:
    """Modules that it imports, and programs that it starts."""
    started: list[str] = []
    sys.addaudithook(lambda event, args: _note(started, event, args))
    before = set(sys.modules)
    train_run(world, made, run)
    return set(sys.modules) - before, started


def _note(started: list[str], event: str, args: tuple[object, ...]) -> None:
    if event == "subprocess.Popen":
        started.append(str(args[0]))


def test_a_rank_imports_little_and_starts_nothing(dataset: Path, tmp_path: Path) -> None:
    ((modules, started),) = run_ranks(
        1, what_a_run_adds, config(dataset, "steps=1"), tmp_path / "run"
    )
    assert started == []
    assert not [name for name in modules if name.startswith("torch._")], "no compiler"
    assert len(modules) < 100, "each rank would pay for them"


def test_the_files_that_come_first_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / name).is_file()] == []
