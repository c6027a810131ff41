"""An output directory belongs to one command, and to one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from data.claim import (
    LOCK,
    WITHOUT_OPTION,
    differences,
    holding,
    is_abandoned,
    read_claim,
    write_claim,
)
from data.config import DataError, DataUsageError, PrepareConfig
from launcher.cli import app


def test_a_missing_or_empty_directory_is_free(tmp_path: Path) -> None:
    assert read_claim(tmp_path / "new", "dataset") is None
    assert read_claim(tmp_path, "dataset") is None
    # What a kill leaves between making the directory and renaming the lock.
    (tmp_path / f"{LOCK}.0123abcd.tmp").write_text("{")
    assert read_claim(tmp_path, "dataset") is None
    (tmp_path / "other.json.0123abcd.tmp").write_text("{")
    with pytest.raises(DataUsageError, match=r"it holds other\.json\.0123abcd\.tmp"):
        read_claim(tmp_path, "dataset")


def test_a_claim_is_read_back(tmp_path: Path) -> None:
    write_claim(tmp_path / "a", "dataset", {"config": {"seed": 1}})
    claim = read_claim(tmp_path / "a", "dataset")
    assert claim is not None and claim["config"] == {"seed": 1}


def test_anything_else_is_refused(tmp_path: Path) -> None:
    write_claim(tmp_path / "run", "run", {})
    with pytest.raises(DataUsageError, match="holds a run of format 1, not a dataset"):
        read_claim(tmp_path / "run", "dataset")
    with pytest.raises(DataUsageError, match=r"is not empty and was not begun .* \(it holds run\)"):
        read_claim(tmp_path, "dataset")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataUsageError, match="exists and is no directory"):
        read_claim(tmp_path / "file", "dataset")


def test_a_damaged_lock_is_named(tmp_path: Path) -> None:
    write_claim(tmp_path, "dataset", {"seed": 1})
    lock = tmp_path / LOCK
    lock.write_text(lock.read_text().replace('"seed":1', '"seed":2'))
    with pytest.raises(DataError, match=r"headrace\.lock\.json is damaged or was edited"):
        read_claim(tmp_path, "dataset")


def test_a_directory_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    again = pytest.raises(DataUsageError, match="another process is writing")
    with holding(folder), again, holding(folder):
        pass
    with holding(folder):
        pass


def test_a_directory_is_abandoned_when_nobody_holds_it(tmp_path: Path) -> None:
    with holding(tmp_path / "made"):
        assert not is_abandoned(tmp_path / "made")
    assert is_abandoned(tmp_path / "made")
    assert not is_abandoned(tmp_path / "gone")


def test_differences_name_the_key_and_both_values() -> None:
    then = {"same": 1, "val_fraction": 0.2, "user_symbols": (), "exclude": ["*.a b"], "bos": True}
    now = {"same": 1, "val_fraction": 0.3, "user_symbols": ("x",), "bos": False, "seed": 1}
    assert differences(then, now) == [
        "--bos: was on, is off",
        "--exclude: was '*.a b', is not given",
        "seed: was not given, is 1",
        "--symbol: was not given, is x",
        "--val-fraction: was 0.2, is 0.3",
    ]


def test_every_difference_is_told_by_an_option_that_there_is() -> None:
    command = typer.main.get_command(app).commands["prepare"]  # type: ignore[attr-defined]
    known = {name for option in command.params for name in option.opts}
    for key in PrepareConfig().settings():
        (line,) = differences({key: 1}, {key: 2})
        name = line.removesuffix(": was 1, is 2")
        assert (name in known) == (key not in WITHOUT_OPTION), line
