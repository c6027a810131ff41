"""Random damage to the cache of a dataset behind a URL: fetched again, and never served."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.places import place_of
from tests.data.servers import FolderServer, serving
from tests.data.test_damage import (
    PLAN,
    READS,
    Bench,
    Damaging,
    Files,
    append,
    bench,
    files_of,
    flip,
    move_block,
    punch,
    truncate,
)

__all__ = ["bench"]

FETCHED_ALWAYS = ("manifest.json", PLAN)
"""They say themselves whether they are whole, and are never kept."""
NUM_DAMAGES, NUM_SOAK_DAMAGES = 400, 3_000


@pytest.fixture
def server(bench: Bench) -> Iterator[FolderServer]:
    with serving(bench.folder) as server:
        yield server


@pytest.mark.parametrize(
    "count", [NUM_DAMAGES, pytest.param(NUM_SOAK_DAMAGES, marks=pytest.mark.slow)]
)
def test_no_damaged_entry_is_served(bench: Bench, server: FolderServer, count: int) -> None:
    """Each damage, alone; whoever reads next gets what the server has, and mends the cache."""
    random = np.random.default_rng(count)
    with tempfile.TemporaryDirectory(dir=bench.folder.parent) as name:
        cache, config = Path(name), DataConfig(cache_dir=name)
        assert read_all(server, config) == bench.truths
        clean = files_of(cache)
        assert {Path(entry).suffix for entry in clean} == {".tokens", ".lens", ".ids", ".file"}
        kinds = list(CACHE_DAMAGES)
        for number in range(count):
            kind = kinds[number % len(kinds)]
            damage = CACHE_DAMAGES[kind](random, clean, clean)
            for entry, content in damage.items():
                (cache / entry).write_bytes(content)
            what = f"damage {number}, {kind} of {sorted(damage)}"
            before = len(server.asked)
            assert read_all(server, config) == bench.truths, f"{what} was served"
            assert files_of(cache) == clean, f"{what} was not mended"
            changed = sum(clean[entry] != content for entry, content in damage.items())
            fetched = sum(path not in FETCHED_ALWAYS for path, _ in server.asked[before:])
            assert fetched == changed, f"{what}: {fetched} were fetched again, not {changed}"


def read_all(server: FolderServer, config: DataConfig) -> list[list[Any]]:
    """By a reader that has just begun."""
    return [read(place_of(server.url, config)) for read in READS.values()]


def _swap(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """Two entries under each other's names."""
    a, b = (str(name) for name in random.choice(sorted(clean), size=2, replace=False))
    return {a: clean[b], b: clean[a]}


def _empty(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """As a power cut leaves a file whose blocks never came."""
    name = str(random.choice(sorted(clean)))
    return {name: bytes(len(clean[name]) if random.random() < 0.5 else 0)}


CACHE_DAMAGES: dict[str, Damaging] = {
    "bit flips": flip,
    "truncation": truncate,
    "hole": punch,
    "appended bytes": append,
    "misplaced block": move_block,
    "swapped entries": _swap,
    "emptied entry": _empty,
}
