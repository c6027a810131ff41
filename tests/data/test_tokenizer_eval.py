"""Tokenizers are compared on the same texts, and what they lose is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from data.config import DataUsageError, PrepareConfig
from data.tokenizer import load_tokenizer, train_tokenizer, write_huggingface_tokenizer
from data.tokenizer_eval import evaluate_tokenizers
from data.vocabulary import train_file
from tests.data.texts import prose

TEXT = prose(40_000)
SENTENCES = [TEXT[start : start + 4000] for start in range(0, len(TEXT), 4000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "small.model").write_bytes(train_tokenizer(SENTENCES, 320))
    (folder / "large.model").write_bytes(train_tokenizer(SENTENCES, 640))
    (folder / "texts").mkdir()
    (folder / "texts/a.txt").write_text(TEXT)
    (folder / "texts/b.txt").write_text("\u4e09\u5341\u4e00 unlike anything in training: \u00df")
    return folder


def test_a_larger_vocabulary_needs_fewer_tokens(folder: Path) -> None:
    models = [folder / "small.model", folder / "large.model"]
    small, large = evaluate_tokenizers(models, [str(folder / "texts/a.txt")])
    assert small.bytes == large.bytes == len(TEXT.encode())
    assert large.bytes_per_token > 1.05 * small.bytes_per_token
    assert small.bytes_per_token == small.bytes / small.tokens
    assert (small.changed, large.changed) == (0, 0)


def test_characters_without_a_piece_are_counted_as_bytes(folder: Path) -> None:
    (score,) = evaluate_tokenizers([folder / "large.model"], [str(folder / "texts/b.txt")])
    vendor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "large.model"))
    ids = vendor.encode((folder / "texts/b.txt").read_text())
    expected = sum(vendor.is_byte(id_) for id_ in ids) / len(ids)
    assert score.unknown_share == pytest.approx(expected) and expected > 0.2
    assert score.changed == 0


def test_bytes_are_counted_in_a_tokenizer_json_as_in_the_model_of_equal_ids(
    folder: Path, tmp_path: Path
) -> None:
    write_huggingface_tokenizer(folder / "large.model", tmp_path / "hf")
    both = [folder / "large.model", tmp_path / "hf/tokenizer.json"]
    model, twin = evaluate_tokenizers(both, [str(folder / "texts/b.txt")])
    assert twin.tokens == model.tokens
    assert twin.unknown_share == model.unknown_share > 0.2
    # Where bytes are no way out, pieces that look like them are pieces.
    content = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "hf/tokenizer.json").byte_ids == frozenset()


def test_a_missing_field_is_told_with_the_keys_that_are_there(folder: Path, tmp_path: Path) -> None:
    web = tmp_path / "web.jsonl"
    web.write_text('{"content": "a", "url": "b"}\n')
    with pytest.raises(DataUsageError) as refused:
        evaluate_tokenizers([folder / "small.model"], [str(web)])
    assert str(refused.value) == (
        f"{web} holds no text; the first record that gives none:\n"
        f"  {web}:1: no field 'text': its keys are 'content', 'url'\n"
        "mend them, or name the field that holds the text with --text-field"
    )
    (score,) = evaluate_tokenizers([folder / "small.model"], [str(web)], text_field="content")
    assert score.bytes == 1


def test_every_input_is_a_source_of_its_own(folder: Path) -> None:
    inputs = [str(folder / "texts/a.txt"), str(folder / "texts/b.txt")]
    found = evaluate_tokenizers([folder / "small.model"], inputs)
    assert [score.source for score in found] == inputs
    assert [score.documents for score in found] == [1, 1]


def test_a_tokenizer_that_changes_text_is_told(folder: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "squeezing"),
        vocab_size=450,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "a.txt").write_text("two  spaces")
    (score,) = evaluate_tokenizers([tmp_path / "squeezing.model"], [str(tmp_path / "a.txt")])
    assert score.changed == 1


def test_an_input_without_text_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataUsageError, match=r"empty\.txt holds no text; name files"):
        evaluate_tokenizers([folder / "small.model"], [str(tmp_path / "empty.txt")])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_a_file_gives_the_same_bytes_for_any_workers(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    config = PrepareConfig(
        vocab_size=380,
        tokenizer_type=kind,  # type: ignore[arg-type]
        user_symbols=("<sep>",),
        val_fraction=0,
        part_bytes=5000,
    )
    for workers in (1, 2):
        output = tmp_path / f"{kind}-{workers}.model"
        train_file([str(folder / "texts")], output, config, workers=workers)
    assert (tmp_path / f"{kind}-1.model").read_bytes() == output.read_bytes()
    vendor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert vendor.encode("a<sep>b", out_type=str).count("<sep>") == 1
    text = TEXT[:5000] + "  two  spaces\n\ttab"
    assert vendor.decode(vendor.encode(text)) == text
    with pytest.raises(DataUsageError, match="exists already; name a new file"):
        train_file([str(folder / "texts")], output, config, workers=1)
