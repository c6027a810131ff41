"""Fixtures that several folders share."""

from __future__ import annotations

import argparse
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.config import PrepareConfig
from data.prepare import prepare
from tests import ranks  # sets the environment of ranks before torch starts threads
from tests.results import pytest_runtest_makereport, three_times  # noqa: F401  (for all folders)
from train.world import World, join_world

# A shell's `&` and nohup have all processes ignore it, those that a test interrupts, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "tests/launcher/test_life_cycle.py",
    "tests/train/test_storage.py",
    "tests/launcher/test_faults.py",
    "tests/launcher/test_soak.py",
    "tests/train/test_resume_runs.py",
    "tests/train/test_fault_matrix.py",
    "tests/train/test_resume.py",
    "tests/launcher/test_spawn.py",
    "tests/train/test_pretrain.py",
    "tests/train/test_killed_readers.py",
    "tests/train/test_finetune.py",
    "tests/data/test_damage.py",
    "tests/train/test_skip.py",
    "tests/train/test_digits.py",
    "tests/train/test_export.py",
    "tests/train/test_schedules.py",
    "tests/launcher/test_look_back.py",
    "tests/data/test_kill_points.py",
    "tests/data/test_prepare.py",
    "tests/train/test_engine.py",
    "tests/data/test_damaged_caches.py",
)
"""Measured; a file runs on one worker, which keeps what its fixtures have made."""


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes stay out of the names of tests: packed ones hold the time, and workers must agree."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left alone with one."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.fixture(scope="session", autouse=True)
def fork_server(request: pytest.FixtureRequest) -> None:
    """Started before anything else needs one, where a test has ranks."""
    if any(hasattr(getattr(item, "module", None), "run_ranks") for item in request.session.items):
        ranks.start_server()


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A process group with only this process in it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_world() as world:
        yield world


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 KB of real text that every Python has: a few modules of its standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    for module in (argparse, textwrap):
        path = Path(module.__file__)
        (folder / path.with_suffix(".txt").name).write_text(path.read_text())
    return folder


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as token shards, with a vocabulary of 400 pieces and 10 % held out."""
    output = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare([str(corpus)], output, PrepareConfig(vocab_size=400, val_fraction=0.1), workers=1)
    return output
