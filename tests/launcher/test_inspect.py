"""A step is inspected as its run trained it, and a dataset that is not the run's is noticed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import DataConfig, PrepareConfig
from data.phases import first_phase
from data.prepare import prepare
from data.sources import open_datasets
from launcher.cli import run_command
from launcher.inspect import (
    InspectError,
    InspectUsageError,
    find_document,
    inspect_sample,
    inspect_step,
)
from launcher.stats import stats
from train.config import RunConfig
from train.run import open_run, record_phase

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


def test_what_the_run_recorded_is_told(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    open_run(run, CONFIG, {})
    argv = ["data", "inspect", str(dataset), "--run", str(run), "--step", "2"]
    with pytest.raises(InspectUsageError, match="leave out either --run or the overrides"):
        run_command([*argv, "seed=1"], standalone=False)

    def said(*more: str) -> str:
        run_command([*argv, *more], standalone=False)
        return capsys.readouterr().out

    assert said().splitlines()[-1] == f"{run} has recorded no such step yet"
    assert json.loads(said("--json"))["equals_recorded"] is None
    found = inspect_step(dataset, step=2, run=run, recipe="", overrides=())
    write_metrics(run, (2, found.data_hash))
    assert said().splitlines()[-1] == f"data_hash equals what {run} recorded"
    assert json.loads(said("--json"))["equals_recorded"] is True


def test_the_hash_of_a_sample_is_not_called_that_of_a_step(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "inspect", str(dataset), *ARGUMENTS, "--sample", "7"]
    run_command(argv, standalone=False)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("sample 7 of step 2: seed 3, seq_len 32, hash of this sample alone ")
    run_command([*argv, "--json"], standalone=False)
    found = json.loads(capsys.readouterr().out)
    assert "data_hash" not in found
    assert found["sample_hash"] == found["samples"][0]["hash"] == last.split()[-1]


def test_other_data_than_that_of_the_run_is_refused_with_its_path(
    dataset: Path, tmp_path: Path
) -> None:
    run, web = tmp_path / "run", tmp_path / "web"
    (tmp_path / "web.txt").write_text("other words than those of the run, again and again\n" * 400)
    config = PrepareConfig(vocab_size=300)
    prepare([str(tmp_path / "web.txt")], web, config, workers=1)
    trained = open_datasets(str(dataset), seq_len=32)
    phase = first_phase(CONFIG.batch_samples, trained.slots(), trained.fingerprints(), seq_len=32)
    config_of_run = CONFIG.model_copy(update={"data": DataConfig(path=str(dataset))})
    open_run(run, config_of_run, {})
    record_phase(run, config_of_run, {}, phase)
    told = (
        f"{run} was not trained on {web} but on other data, at {dataset}; write {dataset} instead"
    )
    with pytest.raises(InspectUsageError, match=f"^{re.escape(told)}$"):
        inspect_step(web, step=1, run=run, recipe="", overrides=())
    with pytest.raises(InspectUsageError, match=f"^{re.escape(told)}$"):
        stats(web, run=run, seq_len=None)
    assert inspect_step(dataset, step=1, run=run, recipe="", overrides=()).first == 0
