"""The commands a person types, in order, through the real torchrun: text to an evaluated model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEADRACE = str(Path(sys.executable).with_name("headrace"))
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_size=128",
    "seq_len=64",
    "batch_tokens=1024",
    "eval.samples=16",
)
PRETRAIN = ("pretrain", "tiny-cpu", "data=ds", "--run", "run", "--nproc", "2", "steps=30", *SMALL)
RESUMABLE = (*PRETRAIN, "zero.stage=2", "checkpoint.every=10")
# Nothing is trained, so nobody need wait for torchrun: the last --nproc counts.
AT_ONCE = ("--nproc", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life")


def headrace(folder: Path, *argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [HEADRACE, *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


def rows(folder: Path, run: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def test_text_becomes_a_verified_dataset(folder: Path, corpus: Path) -> None:
    argv = ("prepare", "--input", str(corpus), "--output", "ds", "--vocab-size", "400")
    headrace(folder, *argv)
    assert json.loads(headrace(folder, "data", "verify", "--full", "ds", "--json").stdout)


def test_a_run_stops_resumes_and_is_complete(folder: Path) -> None:
    headrace(folder, *RESUMABLE, "--stop-at", "10", code=3)
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, 11))
    headrace(folder, *RESUMABLE, "--stop-at", "10", *AT_ONCE, code=3)
    headrace(folder, *RESUMABLE)
    steps = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 31))
    assert steps[10]["resumed_from"] == 10
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert "complete" in headrace(folder, *RESUMABLE, *AT_ONCE).stderr
    refused = headrace(folder, *RESUMABLE, "optim.lr=1e-3", *AT_ONCE, code=2)
    assert "optim.lr: 0.004 in the run, 0.001 now" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_samples_of_a_step_can_be_shown_and_proven(folder: Path) -> None:
    shown = headrace(folder, "data", "inspect", "ds", "--step", "30", "--run", "run", "--json")
    assert json.loads(shown.stdout)["data_hash"] == rows(folder)[-2]["data_hash"]
    again = headrace(folder, "data", "inspect", "ds", "--step", "30", *SMALL[3:5], "--json")
    assert json.loads(again.stdout)["data_hash"] == rows(folder)[-2]["data_hash"]


def test_a_checkpoint_becomes_a_model_that_writes(folder: Path) -> None:
    headrace(folder, "export", "run", "out")
    found = json.loads(headrace(folder, "evaluate", "out", "--data", "ds", "--json").stdout)
    assert set(found) == {"loss", "perplexity", "bits_per_byte", "num_tokens"}
    # Training validated packed samples, this scores whole documents: alike, not equal.
    assert found["loss"] == pytest.approx(rows(folder)[-1]["val_loss"], abs=0.3)
    write = ("generate", "out", "def ", "--max-tokens", "12", "--temperature", "0", "--seed", "1")
    text = headrace(folder, *write).stdout
    assert text and not text.startswith("def ")
    assert headrace(folder, *write).stdout == text


def test_a_classifier_is_tuned_and_scored(folder: Path) -> None:
    lines = ["text,label"]
    lines += [f"{word} {n},{word}s" for n in range(60) for word in ("import", "class", "return")]
    (folder / "labelled.csv").write_text("\n".join(lines) + "\n")
    tune = ("finetune", "classify", "model=out", "data=labelled.csv", "--run", "tuned")
    headrace(folder, *tune, "batch_size=16", "steps=40", "--nproc", "2")
    scores = headrace(folder, "evaluate", "tuned/hf", "--data", "labelled.csv", "--json").stdout
    found = json.loads(scores)
    assert found["accuracy"] > 0.9 and found["f1_macro"] > 0.9
    assert set(found["per_class"]) == {"imports", "classs", "returns"}
    assert len(found["confusion_matrix"]) == 3
    assert {"precision_macro", "recall_macro"} < set(found)
