"""A tokenizer that a person brings is used as it is, and what it loses of the text is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from data.config import DataUsageError, PrepareConfig
from data.prepare import Summary, prepare
from data.tokenizer import load_tokenizer
from tests.data.prepared import corpus as corpus
from tests.data.prepared import dataset as dataset
from tests.data.prepared import run, stored
from tests.data.texts import prose, write_lines


def bring(corpus: Path, output: Path, tokenizer: Path, **settings: object) -> Summary:
    config = PrepareConfig.model_validate({"val_fraction": 0.2} | settings)
    return prepare([str(corpus)], output, config, workers=1, tokenizer=tokenizer)


def test_a_brought_sentencepiece_model_is_used_as_it_is(
    corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    model = dataset / "tokenizer.model"
    summary = bring(corpus, tmp_path / "brought", model)
    assert (tmp_path / "brought" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert stored(tmp_path / "brought", "val") == stored(dataset, "val")
    assert summary.warnings == ()
    assert not summary.manifest.preparation["tokenizer"]["is_trained_here"]
    assert bring(corpus, tmp_path / "brought", model).was_complete


def test_a_brought_tokenizer_json_is_used_through_the_same_protocol(
    corpus: Path, tmp_path: Path
) -> None:
    vocabulary = {f"word{i}": i for i in range(70_000)} | {chr(i): 70_000 + i for i in range(10)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    letters = sorted(set("".join(path.read_text() for path in corpus.iterdir())))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(letters)
    tokenizer.save(str(tmp_path / "mine.json"))
    summary = bring(corpus, tmp_path / "dataset", tmp_path / "mine.json")
    assert (tmp_path / "dataset" / "tokenizer.json").is_file()
    assert summary.manifest.dtype == "<u4"
    assert summary.manifest.special_ids == {"eos": 70_010}
    own = load_tokenizer(tmp_path / "dataset")
    assert own.eos_id == 70_010
    ids = stored(tmp_path / "dataset", "val")
    assert all(document[-1] == 70_010 for document in ids)
    assert np.concatenate(ids).min() > 70_010 - 1


def test_a_tokenizer_that_loses_text_is_told(corpus: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((corpus / "long.txt").read_text().split("\n")),
        model_prefix=str(tmp_path / "other"),
        vocab_size=200,
        model_type="unigram",
        max_sentence_length=100_000,
        minloglevel=2,
    )
    summary = bring(corpus, tmp_path / "dataset", tmp_path / "other.model")
    lossy, unexportable = summary.warnings
    assert "the tokenizer is not lossless" in lossy
    assert "cannot be exported" in unexportable and "unigram" in unexportable


def test_a_tokenizer_and_a_vocabulary_size_contradict_each_other(
    corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataUsageError, match="give only one of them"):
        bring(corpus, tmp_path / "dataset", dataset / "tokenizer.model", vocab_size=300)


def test_the_sign_for_a_space_is_told(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [prose(500, seed=s) + "\u2581" for s in range(9)])
    summary = run(path, tmp_path / "dataset", vocab_size=350)
    assert summary.warnings == (
        "the text holds 9 characters U+2581, sentencepiece's sign for a space: they come back as "
        "spaces",
    )
