"""Fixtures that several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import ranks  # noqa: F401  (sets the environment of ranks before torch starts threads)
from train.world import World, join_world


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A process group with only this process in it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_world() as world:
        yield world
