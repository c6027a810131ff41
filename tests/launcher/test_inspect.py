"""A step is inspected as its run trained it, and a dataset that is not the run's is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.inspect import (
    InspectError,
    InspectUsageError,
    find_document,
    inspect_sample,
    inspect_step,
)
from train.config import RunConfig
from train.run import open_run

CONFIG = RunConfig(seed=3, seq_len=32, batch_tokens=128)
ARGUMENTS = ("seed=3", "seq_len=32", "batch_tokens=128")


def write_metrics(run: Path, *rows: tuple[int, str]) -> None:
    """A run's metrics: (step, data_hash) of every row."""
    text = "".join(
        json.dumps({"step": step, "loss": 1.0, "data_hash": data_hash}) + "\n"
        for step, data_hash in rows
    )
    (run / "metrics.jsonl").write_text(text)


def test_a_run_and_a_recipe_with_its_values_give_the_same_step(
    dataset: Path, tmp_path: Path
) -> None:
    by_recipe = inspect_step(dataset, step=2, run=None, recipe="tiny-cpu", overrides=ARGUMENTS)
    assert (by_recipe.first, by_recipe.last, by_recipe.seed) == (4, 8, 3)
    run = tmp_path / "run"
    open_run(run, CONFIG, {})
    by_run = inspect_step(dataset, step=2, run=run, recipe="tiny-cpu", overrides=())
    assert by_run == by_recipe


def test_a_hash_that_the_run_did_not_record_is_an_error(dataset: Path, tmp_path: Path) -> None:
    found = inspect_step(dataset, step=2, run=None, recipe="tiny-cpu", overrides=ARGUMENTS)
    run = tmp_path / "run"
    open_run(run, CONFIG, {})
    # Of several rows of a step the last one counts: an attempt may repeat what was lost.
    write_metrics(run, (1, "0" * 16), (2, "f" * 16), (2, found.data_hash))
    inspect_step(dataset, step=2, run=run, recipe="tiny-cpu", overrides=())
    with pytest.raises(InspectError, match=r"it is not the dataset of that run, or it was changed"):
        inspect_step(dataset, step=1, run=run, recipe="tiny-cpu", overrides=())


def test_a_step_after_the_last_one_is_refused(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run(run, CONFIG, {})
    last = CONFIG.steps
    with pytest.raises(InspectUsageError, match=f"the last step of {run} is {last}$") as refused:
        inspect_step(dataset, step=last + 1, run=run, recipe="tiny-cpu", overrides=())
    assert refused.value.exit_code == 2
    with pytest.raises(InspectUsageError, match=r"of tiny-cpu is 9; write steps=N to look at a"):
        inspect_step(
            dataset, step=10, run=None, recipe="tiny-cpu", overrides=(*ARGUMENTS, "steps=9")
        )


def test_a_sample_and_its_documents_lead_to_each_other(dataset: Path) -> None:
    given = {"run": None, "recipe": "tiny-cpu", "overrides": (*ARGUMENTS, "steps=9")}
    step = inspect_step(dataset, step=2, **given)
    found = inspect_sample(dataset, sample=6, **given)
    assert (found.step, found.samples) == (2, step.samples[2:3])
    for piece in found.samples[0].pieces:
        document = find_document(dataset, document=f"{piece.shard}:{piece.number}", **given)
        places = {place.sample: place.step for place in document.occurrences}
        assert places[6] == 2
        assert {step for sample, step in places.items() if sample >= 36} <= {None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "1", "--sample", "1"], "write one of --step N, --sample N and --document"),
        (["--document", "here"], "--document 'here' is not of the form SHARD:NUMBER, such as"),
        (["--document", "train/x.tar:1"], "no dataset of training has a shard 'train/x.tar'"),
    ],
)
def test_what_cannot_be_inspected_is_told(dataset: Path, argv: list[str], message: str) -> None:
    command = [sys.executable, "-m", "launcher", "data", "inspect", str(dataset), *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_data_must_be_named_once(dataset: Path, tmp_path: Path) -> None:
    source = f'data.sources=[{{name="web", path="{dataset}", weight=1}}]'
    with pytest.raises(InspectUsageError, match=r"tiny-cpu mixes 1 sources, .* leave out"):
        inspect_step(dataset, step=1, run=None, recipe="tiny-cpu", overrides=[source])
    assert inspect_step(None, step=1, run=None, recipe="tiny-cpu", overrides=[source]).last == 16
    with pytest.raises(InspectUsageError, match="names no data; write the DATASET to look into"):
        inspect_step(None, step=1, run=None, recipe="tiny-cpu", overrides=())
