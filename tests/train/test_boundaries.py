"""Training that respects documents: the same loss on every layout, and the one of plain torch."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import PrepareConfig
from data.loader import SampleStream
from data.prepare import prepare
from model.gpt import GPT, init_weights
from model.loss import token_loss_sum
from tests.data.texts import prose, write_lines
from tests.ranks import run_ranks
from tests.train.test_pretrain import config, losses, refuse, train_many, train_run
from train.config import RunConfig
from train.metrics import read_metrics
from train.pretrain import resolve

EOS = 2


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of about 20 tokens behind BOS, so that a sample of 32 holds two ends or so."""
    folder = tmp_path_factory.mktemp("short")
    texts = [prose(20, seed=seed)[:20] for seed in range(1200)]
    write_lines(folder / "texts.jsonl", texts)
    settings = PrepareConfig(vocab_size=330, val_fraction=0.1, bos=True)
    prepare([str(folder / "texts.jsonl")], folder / "dataset", settings, workers=1)
    return folder / "dataset"


@pytest.fixture(scope="module")
def references(short: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One rank, the whole batch at once."""
    folder = tmp_path_factory.mktemp("references")
    runs = {name: folder / name for name in ("ignore", "labels", "attention")}
    run_ranks(1, train_many, [(_config(short, name), run, None) for name, run in runs.items()])
    return runs


def _config(dataset: Path, boundaries: str, *overrides: str) -> RunConfig:
    return config(
        dataset, f"data.boundaries={boundaries}", "steps=4", "checkpoint.every=0", *overrides
    )


@torch.no_grad()
@pytest.mark.parametrize("boundaries", ["labels", "attention"])
def test_the_first_loss_is_that_of_every_document_part_alone(
    short: Path, references: dict[str, Path], boundaries: str
) -> None:
    """The oracle cuts the samples of step 1 at EOS by hand and knows of no mask and no ids."""
    settings = _config(short, boundaries)
    stream = SampleStream(short, seq_len=32, seed=settings.seed)
    model = GPT(resolve(settings, vocab_size=stream.vocab_size).model)
    init_weights(model, settings.seed)
    total, num_targets = 0.0, 0
    for tokens in stream.batch(np.arange(settings.batch_samples)).astype(np.int64):
        edges = [0, *(np.flatnonzero(tokens[:-1] == EOS) + 1).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(edges):
            if end - begin == 1:
                continue  # the cut left one token: an input of no target
            labels = torch.from_numpy(tokens[None, begin + 1 : end])
            if boundaries == "attention":
                logits = model(torch.from_numpy(tokens[None, begin : end - 1]))
            else:
                logits = model(torch.from_numpy(tokens[None, :-1]))[:, begin : end - 1]
            total += float(token_loss_sum(logits, labels))
            num_targets += labels.numel()
    assert num_targets < settings.batch_tokens - 10
    row = next(row for row in read_metrics(references[boundaries]) if "loss" in row)
    assert row["tokens"] == num_targets
    # fp32 sums of some hundred terms in another order.
    assert row["loss"] == pytest.approx(total / num_targets, rel=1e-5)


def test_samples_stay_and_losses_differ(references: dict[str, Path]) -> None:
    found = {name: losses(run) for name, run in references.items()}
    samples = [[row[:3] for row in rows] for rows in found.values()]
    assert samples[0] == samples[1] == samples[2]
    finals = [rows[-1][3] for rows in found.values()]
    assert len({round(loss, 3) for loss in finals}) == 3
    for run in references.values():
        values = [row["val_loss"] for row in read_metrics(run) if "val_loss" in row]
        assert len(values) == 2 and values[1] < values[0] < math.log(330) * 1.1


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_any_world_and_micro_batch_gives_the_same_losses(
    short: Path, references: dict[str, Path], tmp_path: Path, num_ranks: int
) -> None:
    jobs: list[tuple[Any, Path, None]] = []
    for boundaries, micro_batch, stage in (("labels", 1, 1), ("attention", 5, 2)):
        change = (f"micro_batch={micro_batch}", f"zero.stage={stage}")
        jobs.append((_config(short, boundaries, *change), tmp_path / boundaries, None))
    run_ranks(num_ranks, train_many, jobs)
    for name in ("labels", "attention"):
        found, expected = read_metrics(tmp_path / name), read_metrics(references[name])
        for row, wanted in zip(found, expected, strict=True):
            assert row["tokens"] == wanted["tokens"]
            for key in {"loss", "grad_norm", "val_loss"} & wanted.keys():
                # fp32: only the order of additions differs, amplified by four steps.
                assert row[key] == pytest.approx(wanted[key], rel=2e-4)


def test_a_run_keeps_its_boundaries(short: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(1, train_run, _config(short, "labels"), run, 2) == ["stopped"]
    message = run_ranks(1, refuse, _config(short, "attention"), run)[0]
    assert "data.boundaries: 'labels' in the run, 'attention' now" in message


def test_a_run_from_before_the_key_goes_on(
    short: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(references["ignore"], run)
    (run / "phases.jsonl").unlink()
    content = json.loads((run / "config.json").read_text())
    assert content["config"]["data"].pop("boundaries") == "ignore"
    (run / "config.json").write_text(json.dumps(content))
    assert run_ranks(1, train_run, _config(short, "ignore"), run) == ["complete"]
    message = run_ranks(1, refuse, _config(short, "labels"), run)[0]
    assert "data.boundaries: 'ignore' in the run, 'labels' now" in message
