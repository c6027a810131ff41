"""How far ahead of its limit a job is asked to save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli import run_command
from launcher.lead import lead_of


def rows_in(run: Path, *rows: dict[str, float]) -> None:
    run.mkdir(exist_ok=True)
    lines = [json.dumps({"step": number, **row}) for number, row in enumerate(rows, 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_run_without_a_save_gets_five_minutes(tmp_path: Path) -> None:
    assert lead_of(tmp_path / "none").seconds == 300
    rows_in(tmp_path / "run", {"step_seconds": 2.0})
    assert lead_of(tmp_path / "run").seconds == 300


def test_what_was_measured_counts_twice(tmp_path: Path) -> None:
    rows_in(
        tmp_path / "run",
        {"step_seconds": 2.0, "checkpoint_lag_seconds": 40.0},
        {"step_seconds": 4.0},
        {"step_seconds": 3.0, "checkpoint_lag_seconds": 30.0},
    )
    lead = lead_of(tmp_path / "run")
    assert lead.seconds == 120  # 2 * (4 + 40) + 30 = 118, in tens
    assert lead.reason == f"twice the slowest step, 4.0 s, and save, 40.0 s, of {tmp_path / 'run'}"
    assert lead_of(tmp_path / "run", 75).seconds == 75


def test_what_is_no_duration_is_not_counted(tmp_path: Path) -> None:
    rows_in(tmp_path / "run", {"step_seconds": 4.0, "checkpoint_lag_seconds": 40.0})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        for value in ("NaN", "Infinity", "-1e9", '"x"', "null"):
            file.write(f'{{"step_seconds": {value}, "checkpoint_lag_seconds": {value}}}\n')
        file.write("5\n[]\n")
    assert lead_of(tmp_path / "run").seconds == 120


def test_submit_writes_it_into_the_script_or_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    rows_in(run, {"step_seconds": 5.0, "checkpoint_lag_seconds": 240.0})
    argv = ["submit", "tiny-cpu", "data=x", "--run", str(run), "--dry-run"]
    run_command(argv, standalone=False)
    assert "#SBATCH --signal=B:USR1@520\n" in capsys.readouterr().out
    refusal = (
        r"--time 20 is 1200 s: the job is asked to save and stop 520 s before its limit \(twice "
        r"the slowest step, 5\.0 s, and save, 240\.0 s, of .*/run\), which is more than a third"
    )
    with pytest.raises(ValueError, match=refusal):
        run_command([*argv, "--time", "20"], standalone=False)
    run_command([*argv, "--time", "20", "--lead", "90"], standalone=False)
    assert "#SBATCH --signal=B:USR1@90\n" in capsys.readouterr().out
