"""Characters that a tokenizer does not know are told, wherever in the text they stand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data.config import PrepareConfig
from data.prepare import STAGES, Summary, prepare, prepare_task
from data.vocabulary import CHECKED_BYTES
from tests.data.prepared import stored
from tests.data.texts import prose, write_lines

CONFIG = PrepareConfig(val_fraction=0, part_bytes=400_000, shard_bytes=800_000)
STRANGE = "\u4e2d\u6587\u5b57 "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prose(400, seed=seed) for seed in range(50)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=150,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "sp.model"
    path.write_bytes(model.getvalue())
    return path


def run(tokenizer: Path, folder: Path, strange: str) -> Summary:
    texts = [prose(2000, seed=seed) for seed in range(CHECKED_BYTES // 2000 * 2)]
    path = write_lines(folder / "a.jsonl", [*texts, strange] if strange else texts)
    return prepare([str(path)], folder / "out", CONFIG, workers=1, tokenizer=tokenizer)


def test_unknown_tokens_are_counted_over_all_text(tokenizer: Path, tmp_path: Path) -> None:
    summary = run(tokenizer, tmp_path, STRANGE * 3)
    ids = np.concatenate([np.array(ids) for ids in stored(tmp_path / "out", "train")])
    count = int((ids == 0).sum())
    assert count >= 3
    assert summary.manifest.preparation["unknown_tokens"] == count
    [warning] = [text for text in summary.warnings if "unknown token" in text]
    assert warning.startswith(f"{count} tokens of the dataset are the tokenizer's unknown token")


def test_nothing_is_said_where_all_is_known(tokenizer: Path, tmp_path: Path) -> None:
    summary = run(tokenizer, tmp_path, "")
    assert not [text for text in summary.warnings if "unknown token" in text]
    assert "unknown_tokens" not in summary.manifest.preparation


def test_a_shard_that_is_taken_over_has_its_count(tokenizer: Path, tmp_path: Path) -> None:
    path, output = write_lines(tmp_path / "a.jsonl", [STRANGE * 5, "more"]), tmp_path / "out"

    def go(stage: str) -> None:
        prepare_task([str(path)], output, CONFIG, stage=stage, workers=1, tokenizer=tokenizer)

    for stage in STAGES[:-1]:
        go(stage)
    [result] = output.glob("headrace.work/encode-*/000000.json")
    before, shard = result.read_bytes(), output / "train/main/shard-000000.tar"
    written = shard.stat().st_mtime_ns
    result.unlink()
    go("encode")
    assert (result.read_bytes(), shard.stat().st_mtime_ns) == (before, written)
    assert b'"unknown":5' in before or b'"unknown":15' in before
