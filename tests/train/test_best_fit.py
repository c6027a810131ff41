"""Training on a best-fit plan: losses of its parts alone, on every layout, resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataUsageError, PrepareConfig
from data.loader import SampleStream
from data.pack import pack_dataset
from data.prepare import prepare
from launcher.inspect import inspect_step
from model.gpt import GPT, init_weights
from model.loss import token_loss_sum
from tests.data.texts import prose, write_lines
from tests.ranks import run_ranks
from tests.train.test_pretrain import config, losses, train_many, train_run
from train.config import ConfigError, RunConfig
from train.metrics import read_metrics
from train.pretrain import pretraining, resolve
from train.run import open_run

STEPS = 4


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of some 10 to 100 tokens, so that a sample of 32 holds parts and wholes."""
    folder = tmp_path_factory.mktemp("short")
    texts = [prose(90, seed=seed)[: 8 + seed % 90] for seed in range(600)]
    write_lines(folder / "texts.jsonl", texts)
    settings = PrepareConfig(vocab_size=330, val_fraction=0.1)
    prepare([str(folder / "texts.jsonl")], folder / "dataset", settings, workers=1)
    pack_dataset(folder / "dataset", seq_len=32)
    return folder / "dataset"


@pytest.fixture(scope="module")
def references(short: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One rank, the whole batch at once."""
    folder = tmp_path_factory.mktemp("references")
    runs = {name: folder / name for name in ("ignore", "attention")}
    run_ranks(1, train_many, [(_config(short, name), run, None) for name, run in runs.items()])
    return runs


def _config(dataset: Path, boundaries: str, *overrides: str) -> RunConfig:
    given = (f"data.boundaries={boundaries}", f"steps={STEPS}", "data.packing=best_fit")
    return config(dataset, *given, "checkpoint.every=0", *overrides)


@torch.no_grad()
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_first_loss_is_that_of_every_part_alone(
    short: Path, references: dict[str, Path], split: str
) -> None:
    settings = _config(short, "attention")
    stream = SampleStream(
        short, seq_len=32, seed=settings.seed, packing="best_fit", split=split,
        shuffle=split == "train",
    )  # fmt: skip
    model = GPT(resolve(settings, vocab_size=stream.vocab_size).model)
    init_weights(model, settings.seed)
    count = settings.batch_samples if split == "train" else settings.eval.samples
    total, num_targets = 0.0, 0
    for sample in range(count):
        tokens, begin = stream.tokens(sample).astype(np.int64), 0
        for part in stream.documents(sample):
            ids = torch.from_numpy(tokens[None, begin : begin + part.num_tokens])
            total += float(token_loss_sum(model(ids[:, :-1]), ids[:, 1:]))
            num_targets += part.num_tokens - 1
            begin += part.num_tokens
    key = "loss" if split == "train" else "val_loss"
    row = next(row for row in read_metrics(references["attention"]) if key in row)
    assert row["tokens"] == (num_targets if split == "train" else 0)
    # fp32 sums of some hundred terms in another order.
    assert row[key] == pytest.approx(total / num_targets, rel=1e-5)


def test_tokens_count_targets_and_every_step_is_inspected(
    short: Path, references: dict[str, Path]
) -> None:
    tokens = 0
    for row in losses(references["ignore"]):
        run = references["ignore"]
        found = inspect_step(short, step=row[0], run=run, recipe="tiny-cpu", overrides=())
        assert found.data_hash == row[2]
        tokens += sum(p.num_tokens - 1 for sample in found.samples for p in sample.pieces)
    last = [row for row in read_metrics(references["ignore"]) if "loss" in row][-1]
    assert last["tokens"] == tokens < STEPS * 384
    finals = {losses(run)[-1][3] for run in references.values()}
    assert len(finals) == 2


def test_another_world_and_micro_batch_give_the_same_losses(
    short: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    jobs: list[tuple[Any, Path, None]] = []
    for boundaries, change in (("ignore", "zero.stage=2"), ("attention", "data.num_workers=1")):
        settings = _config(short, boundaries, "micro_batch=5", change)
        jobs.append((settings, tmp_path / boundaries, None))
    run_ranks(2, train_many, jobs)
    for name in ("ignore", "attention"):
        found, expected = read_metrics(tmp_path / name), read_metrics(references[name])
        for row, wanted in zip(found, expected, strict=True):
            assert row["tokens"] == wanted["tokens"]
            assert row.get("data_hash") == wanted.get("data_hash")
            for key in {"loss", "grad_norm", "val_loss"} & wanted.keys():
                # fp32: only the order of additions differs, amplified by four steps.
                assert row[key] == pytest.approx(wanted[key], rel=2e-4)


def test_a_run_goes_on_to_the_bit(short: Path, references: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(1, train_run, _config(short, "attention"), run, 2) == ["stopped"]
    assert run_ranks(1, train_run, _config(short, "attention"), run) == ["complete"]
    assert losses(run) == losses(references["attention"])


def test_a_run_from_before_the_key_is_one_of_concatenation(short: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    work = pretraining(config(short), num_ranks=1)
    open_run(run, work.config, work.identity)
    content = json.loads((run / "config.json").read_text())
    assert content["config"]["data"].pop("packing") == "concat"
    (run / "config.json").write_text(json.dumps(content))
    open_run(run, work.config, work.identity)
    packed = pretraining(config(short, "data.packing=best_fit"), num_ranks=1)
    with pytest.raises(ConfigError, match=r"packing: 'concat' in the run, 'best_fit' now"):
        open_run(run, packed.config, packed.identity)
    open_run(tmp_path / "packed", packed.config, packed.identity)
    with pytest.raises(ConfigError, match=r"packing: 'best_fit' in the run, 'concat' now"):
        open_run(tmp_path / "packed", work.config, work.identity)


def test_training_without_a_plan_is_refused_with_the_command(short: Path) -> None:
    with pytest.raises(DataUsageError, match=rf"`headrace data pack {short} --seq-len 64`, or wri"):
        pretraining(_config(short, "ignore", "seq_len=64"), num_ranks=1)


def test_a_dataset_without_bos_brings_a_warning(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretraining(_config(short, "ignore"), num_ranks=1)
    assert "its first token is none, and follows nothing; prepare with --bos" in caplog.text
