"""`headrace status` where there is much to ask, or little that can be read: each run by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.queue import jobs
from launcher.show_status import paragraph
from launcher.status import job_of, status_of, statuses

START = {
    "attempt": 1, "event": "start", "time": 1.0, "slurm_job": "77", "world_size": 2,
    "config": {"steps": 10},
}  # fmt: skip
ROW = {"step": 1, "attempt": 1, "data_hash": "x", "loss": 2.0, "tokens_per_second": 5.0,
       "step_seconds": 1.0}  # fmt: skip


def made_by_hand(run: Path, *rows: object, **files: object) -> Path:
    """A run of one step; with further rows of attempts.jsonl, and of other files."""
    (run / "logs").mkdir(parents=True)
    lines = {"attempts": [START, *rows], "metrics": [ROW]} | {
        name: [START if name == "attempts" else ROW, row] for name, row in files.items()
    }
    for name, told in lines.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return run


@pytest.mark.parametrize(
    ("row", "file", "told"),
    [
        (5, "attempts", "gone"),
        (None, "events", "gone"),
        ([1], "metrics", "gone"),
        ({}, "attempts", "gone"),
        ({"event": "end"}, "attempts", "unreadable"),
        ({"event": "x", "time": "y"}, "events", "unreadable"),
        ({"data_hash": 1}, "metrics", "unreadable"),
    ],
)
def test_one_run_that_cannot_be_read_does_not_hide_the_others(
    row: object, file: str, told: str, tmp_path: Path
) -> None:
    made_by_hand(tmp_path / "good")
    made_by_hand(tmp_path / "bad", **{file: row})
    (tmp_path / "other").mkdir()
    found = statuses([tmp_path / name for name in ("bad", "good", "other")])
    assert [status.state for status in found] == [told, "gone", "no run"]
    assert found[1].step == 1
    if told == "unreadable":
        text = "\n".join(paragraph(found[0]))
        assert re.search(r"bad: unreadable\n  its files do not hold what a run writes \(", text)


def test_a_copy_of_a_checkpoint_beside_the_others_is_none(tmp_path: Path) -> None:
    run = made_by_hand(tmp_path / "run")
    for name in ("step-000000001", "step-000000001.bak", "step-000000002.tmp"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "manifest.json").touch()
    status = status_of(run)
    assert (status.checkpoint_step, status.num_checkpoints) == (1, 1)


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for squeue: what it is to do; `asked` beside it grows by a line a question."""
    script = tmp_path / "bin" / "squeue"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    return script


def test_slurm_is_asked_twice_however_many_runs_there_are(squeue: Path, tmp_path: Path) -> None:
    squeue.write_text(f'#!/bin/bash\necho "${{@: -1}}" >>{tmp_path}/asked\n')
    runs = [made_by_hand(tmp_path / f"run{n}", START | {"slurm_job": str(n)}) for n in range(200)]
    assert jobs(number for number in map(job_of, runs) if number is not None) == []
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "--me" and len(asked) == 2
    assert set(asked[1].removeprefix("--jobs=").split(",")) == {str(n) for n in range(200)}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("a|b|c|d|x|y|z", ["a"]),
        ("1|RUNNING|None|1|0|n|/caf\\351|", ["1"]),
        ("Welcome\\n|||\\n", []),
    ],
)
def test_what_squeue_says_need_not_make_sense(squeue: Path, said: str, found: list[str]) -> None:
    squeue.write_text(f"#!/bin/bash\nprintf '{said}\\n'\n")
    assert [job.id for job in jobs()] == found
