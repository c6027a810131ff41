"""What has been shown before: rows in a file, so that a soak that was stopped goes on where it was.

HEADRACE_RESULTS names the folder of the files, build/results without it. A row is about the code
that it was made with: rows of other code count for nothing, and stay in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data.durable import RowFile, read_rows

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "HEADRACE_RESULTS"
CODE = ("launcher", "train", "model", "data", "tests")


def folder() -> Path:
    """Where results lie; git ignores the default."""
    return Path(os.environ.get(VARIABLE) or ROOT / "build" / "results").absolute()


@cache
def code(root: Path = ROOT) -> str:
    """Twelve digits that change with any Python file of ours."""
    found = hashlib.sha256()
    for path in sorted(path for name in CODE for path in (root / name).rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


class Results:
    """The file NAME.jsonl. Several processes may append to it."""

    def __init__(self, name: str) -> None:
        self.path = folder() / f"{name}.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """What was shown of this code, oldest first."""
        return [row for row in read_rows(self.path) if row["code"] == code()]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(RowFile(self.path)) as file:
            file.append({"code": code(), **row})
            file.sync()


_PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember what became of a test until its fixtures end."""
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


@pytest.fixture(params=[1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def three_times(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whoever uses it runs three times in soak, but for what has passed before; once by default."""
    results, test = Results(request.path.stem), request.node.name
    is_soak = "not slow" not in request.config.option.markexpr
    if is_soak and any(row["test"] == test for row in results.rows()):
        pytest.skip(f"has passed before, says {results.path}")
    yield
    if is_soak and request.node.stash.get(_PASSED, False):
        results.append({"test": test})
