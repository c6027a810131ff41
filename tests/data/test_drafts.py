"""Two who fetch the same at once: one is refused, and where locks are unknown each has its file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data.claim import holding
from data.config import DataError, DataUsageError, PrepareConfig
from data.drafts import draft, remove_drafts
from data.inputs import find_files
from data.prepare import prepare, prepare_task
from tests.data.texts import prose

CONFIG = PrepareConfig(vocab_size=400, val_fraction=0)


def command(folder: Path) -> str:
    """An input that notes in a file that it was asked for."""
    (folder / "text").write_text(prose(30_000))
    script = folder / "fetch.py"
    script.write_text(
        f"open({str(folder / 'asked')!r}, 'a').write('x')\n"
        f"print(open({str(folder / 'text')!r}).read())\n"
    )
    return f"pipe:.txt:{sys.executable} {script}"


@pytest.mark.parametrize("is_finished", [False, True])
def test_nothing_is_fetched_while_another_preparation_is_at_it(
    tmp_path: Path, is_finished: bool
) -> None:
    named, output = command(tmp_path), tmp_path / "out"
    if is_finished:
        prepare([named], output, CONFIG, workers=1)
    before = (tmp_path / "asked").exists() and (tmp_path / "asked").read_text()
    with holding(output):
        with pytest.raises(DataUsageError, match="another process is writing"):
            prepare([named], output, CONFIG, workers=1)
        if not is_finished:
            with pytest.raises(DataUsageError, match="another process is writing"):
                prepare_task([named], output, CONFIG, stage="plan", workers=1)
    assert before == ((tmp_path / "asked").exists() and (tmp_path / "asked").read_text())


def test_two_who_write_one_file_write_each_their_own(tmp_path: Path) -> None:
    path = tmp_path / "keep" / "a.txt"
    with draft(path, tmp_path / "keep") as first, first.open("w") as slow:
        slow.write("half of ")
        with draft(path, tmp_path / "keep") as second:
            second.write_text("other")
        assert path.read_text() == "other"
        slow.write("one")
    assert path.read_text() == "half of one"
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_no_draft_and_what_a_kill_left_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyError), draft(tmp_path / "keep" / "a.txt", tmp_path / "keep") as path:
        path.write_text("half")
        raise KeyError
    assert not list((tmp_path / "keep").iterdir())
    (tmp_path / "keep" / ".drafts").mkdir()
    (tmp_path / "keep" / ".drafts" / "1-a.txt").write_text("half")
    remove_drafts(tmp_path / "keep")
    assert not list((tmp_path / "keep").iterdir())


def test_a_refused_input_leaves_no_output(tmp_path: Path) -> None:
    with pytest.raises(DataUsageError, match="no such file"):
        prepare(["gone.txt"], tmp_path / "new" / "out", CONFIG, workers=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError), holding(tmp_path / "out"):
        (tmp_path / "out" / "kept").touch()
        raise DataError
    assert (tmp_path / "out" / "kept").exists()


def test_what_was_kept_is_found_where_it_lies(tmp_path: Path) -> None:
    (file,) = find_files([command(tmp_path)], tmp_path / "keep")
    assert file.path.parent == tmp_path / "keep"
    assert file.path.read_text() == (tmp_path / "text").read_text() + "\n"


@pytest.mark.parametrize("named", [".", "../here", "sub/.."])
def test_the_current_folder_is_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    piped, here = command(tmp_path), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if named == "sub/..":
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "sub")
        (tmp_path / "sub" / "sub").mkdir()
        with pytest.raises(DataUsageError, match="is not empty and was not begun by this command"):
            prepare([piped], Path(named), CONFIG, workers=1)
        return
    assert prepare([piped], Path(named), CONFIG, workers=1).manifest.counts["documents"] == 1
    assert [path.name for path in (tmp_path / "here.inputs").iterdir()]


def test_the_root_of_a_file_system_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(DataUsageError, match="/ is not empty and was not begun"):
        prepare([command(tmp_path)], Path("/"), CONFIG, workers=1)
