"""Results are of one code, survive a crash, and let a soak go on where it was stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import results
from tests.results import ROOT, VARIABLE, Results, code

THREE = """
import os
import pytest

@pytest.mark.usefixtures("three_times")
@pytest.mark.parametrize("name", ["sound", "frail"])
def test_it(name):
    assert name == "sound" or "MENDED" in os.environ
"""


def test_rows_of_other_code_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "deep"))
    found = Results("one")
    assert found.rows() == [] and found.path == tmp_path / "deep/one.jsonl"
    found.append({"index": 0})
    with found.path.open("a") as file:
        file.write('{"index": 1, "torn')
    found.append({"index": 1})
    assert [row["index"] for row in found.rows()] == [0, 1]
    monkeypatch.setattr(results, "code", lambda: "other")
    assert found.rows() == []


def test_code_is_every_python_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    seen = {code(tmp_path)}
    for name, content, changes in (
        ("data/a.py", "a", True),
        ("data/a.py", "b", True),
        ("data/b.py", "", True),
        ("data/notes.txt", "c", False),
    ):
        (tmp_path / name).write_text(content)
        code.cache_clear()
        found = code(tmp_path)
        assert (found not in seen) == changes, name
        seen.add(found)
    code.cache_clear()
    assert code() == code(ROOT)


def test_results_lie_where_git_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = results.folder().relative_to(ROOT)
    assert f"{folder.parts[0]}/" in (ROOT / ".gitignore").read_text().splitlines()


def test_what_has_passed_is_not_run_again_and_what_has_failed_stays_so(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(THREE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")

    def outcome(*argv: str, **environ: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "tests.results", "-q", *argv, "."]
        paths = {"PYTHONPATH": str(ROOT), VARIABLE: str(tmp_path / "kept")}
        paths["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | paths | environ, capture_output=True, text=True
        )
        return done.stdout

    def summary(*argv: str, **environ: str) -> str:
        return outcome(*argv, **environ).splitlines()[-1]

    assert summary().startswith("3 failed, 3 passed")
    again = outcome(MENDED="1")
    assert again.splitlines()[-1].startswith("3 skipped, 3 errors")
    assert "has failed before: {'code': " in again and "E       AssertionError: assert (" in again
    # Whoever has looked into it may take the rows away.
    kept = tmp_path / "kept/test_three.jsonl"
    rows = [row for row in kept.read_text().splitlines(keepends=True) if '"ok": true' in row]
    assert len(rows) == 3
    kept.write_text("".join(rows))
    assert summary(MENDED="1").startswith("3 passed, 3 skipped")
    # The default run neither looks nor keeps.
    assert summary("-m", "not slow").startswith("1 failed, 1 passed, 4 deselected")
