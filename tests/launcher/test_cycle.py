"""The life cycle through the command line alone, in the order a person meets it, with torchrun.

Each stage is a process; what the commands print, leave behind and exit with is their surface.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.num_kv_heads=1",
    "model.ffn_size=64", "seq_len=64", "batch_tokens=512", "eval.samples=8",
)  # fmt: skip


class Shell:
    """A folder in which `headrace` commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def headrace(self, *argv: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """`headrace ARGV`, which must leave with `code` and without a traceback."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *map(str, argv)],
            cwd=self.folder,
            env=environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def rows(self, file: str) -> list[dict[str, object]]:
        """Rows of a JSON lines file."""
        return [json.loads(line) for line in (self.folder / file).read_text().splitlines()]


@pytest.fixture(scope="module")
def shell(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with a dataset and a finished run of two ranks, stopped and continued once."""
    shell = Shell(tmp_path_factory.mktemp("cycle"))
    made = shell.headrace(
        "prepare", "--input", *sorted(corpus.glob("*.txt")), "--output", "DATASET",
        "--vocab-size", 400, "--val-fraction", 0.1, "--workers", 1,
    )  # fmt: skip
    assert "vocabulary 400, fingerprint " in made.stdout
    shell.headrace(*pretrain(), "--stop-at", 4, code=3)
    assert [row["step"] for row in shell.rows("RUN/metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    shell.headrace(*pretrain())
    return shell


def pretrain(*overrides: str) -> list[str]:
    """The command that starts and continues the run."""
    return [
        "pretrain", "tiny-cpu", "data=DATASET", "--run", "RUN", "--nproc", "2", *SMALL, "steps=8",
        "zero.stage=2", "checkpoint.every=4", *overrides,
    ]  # fmt: skip


def test_a_stopped_run_continues_with_the_same_command(shell: Shell) -> None:
    rows = [row for row in shell.rows("RUN/metrics.jsonl") if "loss" in row]
    assert [(row["step"], row["attempt"]) for row in rows] == [
        *((step, 1) for step in (1, 2, 3, 4)),
        *((step, 2) for step in (5, 6, 7, 8)),
    ]
    assert rows[4]["resumed_from"] == 4
    assert rows[-1]["loss"] < rows[0]["loss"]  # type: ignore[operator]


def test_a_finished_run_says_so_and_leaves_with_0(shell: Shell) -> None:
    before = (shell.folder / "RUN/metrics.jsonl").read_bytes()
    assert "is complete: 8 of 8 steps" in shell.headrace(*pretrain()).stderr
    assert (shell.folder / "RUN/metrics.jsonl").read_bytes() == before


def test_a_run_of_another_config_is_refused_key_by_key(shell: Shell) -> None:
    done = shell.headrace(*pretrain("optim.lr=0.1", "seed=3"), code=2)
    assert "optim.lr: 0.004 in the run, 0.1 now" in done.stderr
    assert "seed: 0 in the run, 3 now" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("repeat the command")


def test_the_data_of_a_step_can_be_proven(shell: Shell) -> None:
    assert ": ok, " in shell.headrace("data", "verify", "--full", "DATASET").stdout
    done = shell.headrace("data", "inspect", "DATASET", "--step", 5, "--run", "RUN", "--json")
    found = json.loads(done.stdout)
    row = next(row for row in shell.rows("RUN/metrics.jsonl") if row["step"] == 5)
    assert found["data_hash"] == row["data_hash"]
    assert [found["first"], found["last"]] == row["samples"]
    argv = ("data", "inspect", "DATASET", "--step", 5, "seq_len=64", "batch_tokens=512")
    assert shell.headrace(*argv).stdout.rstrip().endswith(f"data_hash {row['data_hash']}")


def test_another_dataset_is_noticed_by_its_hash(shell: Shell) -> None:
    rows = (shell.folder / "RUN/metrics.jsonl").read_text()
    other = shell.folder / "OTHER"
    other.mkdir()
    (other / "config.json").write_bytes((shell.folder / "RUN/config.json").read_bytes())
    (other / "metrics.jsonl").write_text(rows.replace('"data_hash": "', '"data_hash": "x'))
    argv = ("data", "inspect", "DATASET", "--step", 5, "--run", "OTHER")
    assert "it is not the dataset of that run" in shell.headrace(*argv, code=1).stderr


def test_a_model_leaves_as_a_folder_and_is_measured_and_heard(shell: Shell) -> None:
    shell.headrace("export", "RUN", "OUT")
    scores = json.loads(shell.headrace("evaluate", "OUT", "--data", "DATASET", "--json").stdout)
    assert sorted(scores) == ["bits_per_byte", "loss", "num_tokens", "perplexity"]
    argv = ("generate", "OUT", "import ", "--max-tokens", 8, "--temperature", 0, "--seed", 1)
    assert shell.headrace(*argv).stdout


def test_a_folder_is_fine_tuned_and_measured(shell: Shell) -> None:
    with (shell.folder / "labelled.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "label"])
        words = {"low": "a few words", "high": "MANY LOUD WORDS"}
        writer.writerows([f"{words[label]} {n}", label] for n in range(40) for label in words)
    if not (shell.folder / "OUT").exists():
        shell.headrace("export", "RUN", "OUT")
    shell.headrace(
        "finetune", "classify", "model=OUT", "data=labelled.csv", "data.text_column=body", "--run",
        "TUNED", "steps=3", "batch_size=8", "zero.stage=1",
    )  # fmt: skip
    argv = ("evaluate", "TUNED/hf", "--data", "labelled.csv", "--text-column", "body", "--json")
    scores = json.loads(shell.headrace(*argv).stdout)
    assert sorted(scores) == [
        "accuracy", "confusion_matrix", "f1_macro", "per_class", "precision_macro", "recall_macro",
    ]  # fmt: skip
    assert list(scores["per_class"]) == ["high", "low"]
