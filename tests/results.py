"""What has been shown before: rows in a file, so that a soak that was stopped goes on where it was.

HEADRACE_RESULTS names the folder of the files, build/results without it. A row is about the code
that it was made with: rows of other code count for nothing, and stay in the file. What has failed
keeps its row, too: whoever starts the same code again is told of it, and it is not tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data.durable import RowFile, read_rows

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "HEADRACE_RESULTS"
CODE = ("launcher", "train", "model", "data", "tests")
WHY = 4000
"""Characters that are kept of what a failure has said: its last."""


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

    def fail_again(self, found: Iterable[dict[str, Any]]) -> None:
        """The test fails when one of these rows has, with what was said then."""
        for row in found:
            if not row["ok"]:
                told = {key: value for key, value in row.items() if key != "why"}
                pytest.fail(
                    f"has failed before: {told}\n{row['why']}\nMend what it shows: rows of other "
                    f"code do not count. Was it the machine, remove that row from {self.path}",
                    pytrace=False,
                )

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(RowFile(self.path)) as file:
            file.append({"code": code(), **row})
            file.sync()


_REPORT = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """Remember what became of a test until its fixtures end."""
    report: pytest.TestReport = yield
    if report.when == "call":
        item.stash[_REPORT] = report
    return report


@pytest.fixture(params=[1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def three_times(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whoever uses it runs three times in soak, but for what was tried before; once by default.
    What a test has recorded as its properties stands in its row.
    """
    results, test = Results(request.path.stem), request.node.name
    is_soak = "not slow" not in request.config.option.markexpr
    before = [row for row in results.rows() if row["test"] == test] if is_soak else []
    results.fail_again(before)
    if before:
        pytest.skip(f"has passed before, says {results.path}")
    yield
    report = request.node.stash.get(_REPORT, None)
    # One that was interrupted has none.
    if is_soak and report is not None and not report.skipped:
        row = {"test": test, "ok": report.passed, **dict(request.node.user_properties)}
        results.append(row if report.passed else {**row, "why": report.longreprtext[-WHY:]})
