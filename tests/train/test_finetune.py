"""Fine-tuning learns from any folder, sees the same samples in any world, and resumes."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataError
from tests.ranks import run_ranks
from tests.train.folders import CONTEXT, SHAPES, make_folder
from train import hf
from train.config import ConfigError, FinetuneConfig
from train.decode import load_config
from train.evaluate import evaluate
from train.examples import read_files, tokenize
from train.finetune import finetune_on, finetuning, learning_rate_for, prepare_examples
from train.generate import generate
from train.job import Task
from train.metrics import read_metrics
from train.run import open_run
from train.world import World

RECIPE = """
task = "classify"
steps = 12
batch_size = 5
precision = "fp32"
optim = { lr = 1e-2, weight_decay = 0.0 }
zero.stage = 2
"""
WORDS = {"hill": "up", "river": "down", "stone": "none"}
SPELLS = {"the mill": "the wheel turns", "the hill": "water", "a stone": "it runs over the stone"}


def config(*overrides: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, RECIPE, overrides)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    fillers = ("the", "a", "old", "water", "mill")
    rows = [
        {"text": f"{first} {second} {word}", "label": label}
        for first, second in itertools.product(fillers, fillers)
        for word, label in WORDS.items()
    ]
    return write(tmp_path / "labelled.jsonl", rows)


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    rows = [{"prompt": prompt, "response": response} for prompt, response in SPELLS.items()]
    return write(tmp_path / "spoken.jsonl", rows)


def finetune_many(world: World, jobs: list[tuple[FinetuneConfig, Path, int | None]]) -> list[str]:
    return [finetune_on(world, made, run, stop_at=stop_at) for made, run, stop_at in jobs]


def steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if "loss" in row]


def numbers(run: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["data_hash"], row["loss"], row["grad_norm"]) for row in steps(run)]


def test_a_classifier_learns_from_any_folder_at_any_stage(tmp_path: Path, labelled: Path) -> None:
    layouts = zip(SHAPES, ("bf16", "fp32", "bf16"), (1, 2, 3), strict=True)
    runs = [tmp_path / "runs" / shape for shape in SHAPES]
    jobs = [
        (
            config(
                f"model={make_folder(tmp_path / shape, shape)}",
                f"data={labelled}",
                f"precision={precision}",
                f"zero.stage={stage}",
                "steps=40",
                "batch_size=15",
            ),
            run,
            None,
        )
        for run, (shape, precision, stage) in zip(runs, layouts, strict=True)
    ]
    assert run_ranks(1, finetune_many, jobs) == [["complete"] * 3]
    for run in runs:
        rows = read_metrics(run)
        assert evaluate(run / "hf", labelled, split="train")["accuracy"] > 0.9
        assert rows[-1]["val_loss"] < rows[0]["val_loss"] * 0.6
        assert steps(run)[-1]["tokens"] == 40 * 15
        assert hf.labels_of(run / "hf") == sorted(WORDS.values())
        held_out = evaluate(run / "hf", labelled, split="val")
        assert held_out["accuracy"] == pytest.approx(rows[-1]["val_accuracy"])
        assert held_out["f1_macro"] == pytest.approx(rows[-1]["val_f1_macro"])
        provenance = json.loads((run / "hf" / "headrace.json").read_text())
        assert (provenance["step"], provenance["config"]["seq_len"]) == (40, CONTEXT)


def test_another_model_in_the_same_folder_is_refused(tmp_path: Path, labelled: Path) -> None:
    folder, run = make_folder(tmp_path / "model"), tmp_path / "run"
    made, examples = prepare_examples(config(f"model={folder}", f"data={labelled}"))

    def reopen() -> None:
        open_run(run, made, finetuning(made, examples, num_ranks=1).identity)

    reopen()
    reopen()
    described = (folder / "config.json").read_text()
    (folder / "config.json").write_text(described.replace('"gelu_new"', '"relu"'))
    told = r"config\.json\.activation_function: 'gelu_new' in the run, 'relu' now"
    with pytest.raises(ConfigError, match=told):
        reopen()
    (folder / "config.json").write_text(described)
    with (folder / "model.safetensors").open("ab") as weights:
        weights.write(b"more")
    with pytest.raises(ConfigError, match=r"bytes\.model\.safetensors: \d+ in the run, \d+ now"):
        reopen()
    # A run from before folders were described.
    (tmp_path / "old").mkdir()
    table = json.loads((run / "config.json").read_text()) | {"identity": {}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(table))
    run = tmp_path / "old"
    reopen()


def test_any_world_sees_the_same_samples_and_losses(
    tmp_path: Path, labelled: Path, spoken: Path
) -> None:
    folder = make_folder(tmp_path / "model", "qwen3")
    tasks = [("classify", labelled), ("instruct", spoken)]

    def jobs(name: str, *overrides: str) -> list[tuple[FinetuneConfig, Path, int | None]]:
        common = [f"model={folder}", "steps=5", *overrides]
        return [
            (config(f"task={task}", f"data={data}", *common), tmp_path / f"{name}-{task}", None)
            for task, data in tasks
        ]

    run_ranks(1, finetune_many, jobs("one"))
    several = jobs("two", "micro_batch=2") + jobs("three", "zero.stage=3", "micro_batch=1")
    assert run_ranks(2, finetune_many, several) == [["complete"] * 4] * 2
    for task, _ in tasks:
        expected = numbers(tmp_path / f"one-{task}")
        for name in ("two", "three"):
            found = numbers(tmp_path / f"{name}-{task}")
            assert [row[:2] for row in found] == [row[:2] for row in expected]
            # fp32 sums of other shapes, five steps of Adam.
            np.testing.assert_allclose(
                [row[2:] for row in found], [row[2:] for row in expected], rtol=2e-4
            )
            val = [read_metrics(tmp_path / f"{n}-{task}")[0]["val_loss"] for n in ("one", name)]
            assert val[0] == pytest.approx(val[1], rel=1e-5)


def test_an_overfitted_model_gives_the_responses_and_stops(tmp_path: Path, spoken: Path) -> None:
    folder = make_folder(tmp_path / "model")
    run = tmp_path / "run"
    made = config(
        "task=instruct",
        f"model={folder}",
        f"data={spoken}",
        f"data.val={spoken}",
        "steps=60",
        "batch_size=3",
    )
    assert run_ranks(1, finetune_many, [(made, run, None)]) == [["complete"]]
    tokenizer = hf.load_tokenizer(folder)
    num_targets = sum(len(tokenizer.encode(response)) + 1 for response in SPELLS.values())
    assert steps(run)[0]["tokens"] == num_targets
    assert read_metrics(run)[-1]["val_loss"] < 0.05
    for prompt, response in SPELLS.items():
        assert generate(run / "hf", prompt + "\n", max_tokens=20, temperature=0) == response


def test_a_stopped_run_continues_to_the_bit(tmp_path: Path, labelled: Path) -> None:
    # GPT-2 with its usual dropout: a resumed step draws what the uninterrupted one drew.
    folder = make_folder(tmp_path / "model", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    made = config(f"model={folder}", f"data={labelled}", "precision=bf16")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_ranks(1, finetune_many, [(made, whole, None), (made, parts, 5)]) == [
        ["complete", "stopped"]
    ]
    assert not (parts / "hf").exists()
    assert run_ranks(1, finetune_many, [(made, parts, None)]) == [["complete"]]
    assert numbers(parts) == numbers(whole)
    assert steps(parts)[5]["resumed_from"] == 5
    weights = [(run / "hf" / "model.safetensors") for run in (whole, parts)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    assert run_ranks(1, finish_again, made, parts) == [(True, True)]


def finish_again(world: World, made: FinetuneConfig, run: Path) -> tuple[bool, bool]:
    """Whether a finished run writes its folder again when it is missing, else leaves it alone."""
    file = run / "hf" / "model.safetensors"
    content = file.read_bytes()
    shutil.rmtree(run / "hf")
    finetune_on(world, made, run)
    is_again, written = file.read_bytes() == content, file.stat().st_mtime_ns
    finetune_on(world, made, run)
    return is_again, file.stat().st_mtime_ns == written


def test_other_examples_are_refused_at_resume(tmp_path: Path, labelled: Path) -> None:
    made = config(f"model={make_folder(tmp_path / 'model')}", f"data={labelled}")

    def task(made: FinetuneConfig) -> Task:
        return finetuning(*prepare_examples(made), num_ranks=1).task

    state = json.loads(json.dumps(task(made).data_state(4)))
    assert state["consumed_samples"] == 20
    task(made).check_data_state(state)
    with pytest.raises(DataError, match=r"are not those that .* started with: seed 0 in the chec"):
        task(made.model_copy(update={"seed": 1})).check_data_state(state)
    labelled.write_text("\n".join(labelled.read_text().splitlines()[::-1]))
    with pytest.raises(DataError, match=r"started with: fingerprint '\w+' in the checkpoint"):
        task(made).check_data_state(state)


def test_epochs_become_steps(tmp_path: Path, labelled: Path) -> None:
    folder = make_folder(tmp_path / "model")
    made = config(f"model={folder}", f"data={labelled}", "steps=0", "epochs=3")
    num_train = len(read_files(made)[0])
    assert prepare_examples(made)[0].steps == -(-3 * num_train // 5)
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps=900 must be shorter"):
        prepare_examples(
            config(f"model={folder}", f"data={labelled}", "steps=0", "schedule.warmup_steps=900")
        )


def test_a_classifier_goes_on_with_its_own_labels(tmp_path: Path, labelled: Path) -> None:
    base = make_folder(tmp_path / "base")
    model = hf.load_classifier(base, ["none", "up", "down", "never"])
    hf.save_folder(model, tmp_path / "hf", tokenizer_from=base)
    made = config(f"model={tmp_path / 'hf'}", f"data={labelled}")
    assert prepare_examples(made)[1].labels == ["none", "up", "down", "never"]
    write(labelled, [{"text": str(i), "label": f"new {i}"} for i in range(2)])
    with pytest.raises(hf.ModelFolderError, match=r"without the labels \['new 0', 'new 1'\]"):
        prepare_examples(made)


def test_what_cannot_be_trained_is_refused(tmp_path: Path, labelled: Path) -> None:
    folder = make_folder(tmp_path / "model")
    named = f"model={folder}"
    same = write(tmp_path / "same.jsonl", [{"text": str(i), "label": "a"} for i in range(9)])
    refusals: list[tuple[type[ValueError], list[str], str]] = [
        (ConfigError, [f"data={labelled}"], r"no model is named; write model=DIR"),
        (ConfigError, [named], r"no examples are named; write data=FILE"),
        (ConfigError, [named, f"data={same}"], r"every example has the label 'a'.*label_column"),
        (ConfigError, [named, f"data={labelled}", "seq_len=1"], r"seq_len=1 leaves no room"),
        (DataError, [named, f"data={labelled}", "task=instruct"], r"no column 'prompt'; the colum"),
        (hf.ModelFolderError, [f"model={tmp_path}", f"data={labelled}"], r"no Hugging Face folder"),
    ]
    for kind, overrides, message in refusals:
        with pytest.raises(kind, match=message):
            prepare_examples(config(*overrides))


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    data = tmp_path / "renamed.csv"
    data.write_text("query,intent\nhill,up\nriver,down\n")
    made = config(
        f"model={make_folder(tmp_path / 'model')}",
        f"data={data}",
        f"data.val={data}",
        "data.text_column=query",
        "data.label_column=intent",
    )
    examples = tokenize(made, *read_files(made))
    assert examples.labels == ["down", "up"]
    assert [int(example.labels) for example in examples.train] == [1, 0]


def test_a_learning_rate_of_zero_follows_the_size_of_the_model(
    tmp_path: Path, labelled: Path
) -> None:
    assert learning_rate_for(1_000_000) == 1.5e-3
    assert learning_rate_for(7_000_000_000) == pytest.approx(1.2e-5)
    folder = make_folder(tmp_path / "model", "gpt2")
    size = sum(p.numel() for p in hf.load_causal(folder).parameters())
    assert hf.num_parameters(folder) == size
    resolved, _ = prepare_examples(config(f"model={folder}", f"data={labelled}", "optim.lr=0"))
    assert resolved.optim.lr == learning_rate_for(size)
    resolved, _ = prepare_examples(config(f"model={folder}", f"data={labelled}"))
    assert resolved.optim.lr == 1e-2
