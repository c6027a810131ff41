"""Any token stream: handwritten digits as tokens, trained like text and generated class by class.

An image of scikit-learn's digits (8 x 8 pixels, 17 grey levels) is a document: the digit that it
shows, 64 levels from left to right and from top to bottom, end of text. Nothing in data/, model/ or
train/ knows that these are pictures.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from data.manifest import dtype_for, write_manifest
from data.shards import write_shard
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_json import CONFIG_FILE
from model.gpt import GPT, init_weights
from tests.ranks import run_ranks
from tests.train.test_pretrain import train_run
from train.checkpoint import committed, open_checkpoint
from train.config import RunConfig
from train.decode import load_config
from train.metrics import read_metrics
from train.run import read_config

PIXELS = 64
LEVELS = string.ascii_lowercase[:17]
"""One letter per grey level, from white to black."""
DOCUMENT = PIXELS + 2
NUM_VAL = 197
NUM_EACH = 10
STEPS = 250
ROWS = 10
RECIPE = f"""
steps = {STEPS}
seq_len = {2 * DOCUMENT}
batch_tokens = {ROWS * 2 * DOCUMENT}
precision = "fp32"
optim.lr = 6e-3
optim.clip_norm = 1.0
schedule.warmup_steps = 10
data.boundaries = "attention"
eval.samples = 64
# Wavelengths of an image instead of a book, and weights that a model this narrow can learn from.
model.rope_theta = 100.0
model.init_std = 0.1
model.num_layers = 3
model.hidden_size = 64
model.num_heads = 4
model.ffn_size = 128
"""


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """1,797 real images as levels [N, 64], and the digit of each."""
    found = load_digits()
    return found.data.astype(np.int64), found.target


@pytest.fixture(scope="module")
def dataset(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "dataset"
    folder.mkdir()
    tokenizer = load_tokenizer(_write_tokenizer(folder))
    texts = [
        str(digit) + "".join(LEVELS[level] for level in levels)
        for levels, digit in zip(*digits, strict=True)
    ]
    documents = [np.array([*ids, tokenizer.eos_id]) for ids in tokenizer.encode_batch(texts)]
    assert {len(ids) for ids in documents} == {DOCUMENT}
    dtype = dtype_for(tokenizer.vocab_size)
    parts = {"train": documents[NUM_VAL:], "val": documents[:NUM_VAL]}
    write_manifest(
        folder,
        [write_shard(folder / s / "digits/shard-000000.tar", p, dtype) for s, p in parts.items()],
        tokenizer=folder / "tokenizer.json",
        vocab_size=tokenizer.vocab_size,
        special_ids={"eos": tokenizer.eos_id},
        preparation={"made by": "tests/train/test_digits.py"},
        split_rule=f"the first {NUM_VAL} images are held out",
        # Samples then begin with an image, and none is cut.
        block_tokens=500 * 2 * DOCUMENT,
    )
    return folder


def _write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of one piece per digit and per level; the order of both is that of ids."""
    pieces = ["</s>", "<unk>", *string.digits, *LEVELS]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": id_, "content": pieces[id_], "special": True, **special} for id_ in (0, 1)
        ],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {piece: id_ for id_, piece in enumerate(pieces)},
            "unk_token": "<unk>",
        },
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    names = {"eos_token": "</s>", "unk_token": "<unk>"}
    (folder / CONFIG_FILE).write_text(json.dumps(names))
    return path


def test_generated_digits_are_recognised(digits: Any, dataset: Path, tmp_path: Path) -> None:
    config = load_config(RunConfig, RECIPE, [f"data={dataset}"])
    run = tmp_path / "run"
    assert run_ranks(1, train_run, config, run) == ["complete"]
    rows = read_metrics(run)
    steps = [row for row in rows if "loss" in row]
    # The digit of an image is no target: 65 of 66 tokens are.
    assert steps[-1]["tokens"] == STEPS * ROWS * 2 * (DOCUMENT - 1)
    before, after = (row["val_loss"] for row in rows if "val_loss" in row)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    settings = read_config(run)
    assert isinstance(settings, RunConfig)
    untrained = GPT(settings.model)
    init_weights(untrained, settings.seed)
    judge = SVC().fit(*digits)
    truth = np.repeat(np.arange(10), NUM_EACH)
    accuracy = {}
    for name, model in (("untrained", untrained), ("trained", _trained(run, settings))):
        images = _generate(model, tokenizer, truth)
        accuracy[name] = float((judge.predict(images) == truth).mean())
    print(f"val_loss {before:.3f} -> {after:.3f} nats per token; recognised: {accuracy}")
    # Chance is 0.1.
    assert accuracy["untrained"] < 0.25
    assert accuracy["trained"] > 0.6
    assert after < 0.6 * before


def _trained(run: Path, settings: RunConfig) -> GPT:
    """The model of the newest checkpoint."""
    saved = open_checkpoint(run, committed(run)[0])
    reader = saved.reader
    model = GPT(settings.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = reader.read(name, "param", 0, parameter.numel())
            parameter.copy_(torch.from_numpy(flat).view(parameter.shape))
    return model


@torch.no_grad()
def _generate(model: GPT, tokenizer: Tokenizer, truth: NDArray[Any]) -> NDArray[Any]:
    """An image per digit, sampled pixel by pixel: levels [N, 64]."""
    (first_level,) = tokenizer.encode(LEVELS[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(tokenizer.encode_batch([str(digit) for digit in truth]))
    for _ in range(PIXELS):
        # Only levels can follow: an image is never shorter than it is.
        chances = model(ids)[:, -1, first_level:].div(0.8).softmax(-1)
        ids = torch.cat([ids, first_level + torch.multinomial(chances, 1, generator=generator)], 1)
    images: NDArray[Any] = (ids[:, 1:] - first_level).numpy()
    return images
