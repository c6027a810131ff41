"""`headrace data stats` prints the dataset's numbers, and the epochs of a run on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli import run_command
from train.config import RunConfig
from train.run import open_run


def test_the_report_names_sources_lengths_and_copies(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run_command(["data", "stats", str(dataset), "--seq-len", "64"], standalone=False)
    out = capsys.readouterr().out
    for words in ("bytes per token", "longer than seq_len 64", "exact copies", "train/main", "##"):
        assert words in out
    assert "epochs of the run" not in out


def test_a_run_adds_its_epochs(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(seq_len=32, batch_tokens=128, steps=50)
    open_run(tmp_path / "run", config, {})
    argv = ["data", "stats", str(dataset), "--run", str(tmp_path / "run"), "--json"]
    run_command(argv, standalone=False)
    found = json.loads(capsys.readouterr().out)
    assert found["seq_len"] == 32
    samples = {s["split"]: s["samples_per_epoch"] for s in found["sources"]}
    assert found["epochs"] == {"main": 50 * 4 / samples["train"]}
    assert found["bytes_per_token"] == found["text_bytes"] / found["tokens"]
