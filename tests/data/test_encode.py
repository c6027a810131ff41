"""The ids that end and begin documents come from no text: whoever stores one is told of whose."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data.config import DataUsageError, PrepareConfig
from data.prepare import prepare
from tests.data.texts import prose, write_lines

MARKED = "Between them </s> stands, and <|endoftext|> too. "
MESSAGE = r"a\.jsonl:[0-9]+: its text encodes to id {id}, the EOS of .*, which readers take for"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "a.jsonl", [prose(300, seed=1), MARKED, prose(300, seed=2)])


@pytest.mark.parametrize("special", [True, False, None])
def test_a_text_with_the_end_of_a_tokenizer_json_is_refused(
    lines: Path, tmp_path: Path, special: bool | None
) -> None:
    """Where it is an added token but not a special one, or only a piece of the vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([prose(3000)], trainer)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = special
    if special is None:
        content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    eos = "\u0120the" if special is None else "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    if special:
        bring(lines, tmp_path)
        return
    with pytest.raises(DataUsageError, match=MESSAGE.format(id=tokenizer.token_to_id(eos))):
        bring(lines, tmp_path)


def test_a_text_with_the_end_of_a_sentencepiece_model_is_refused(
    lines: Path, tmp_path: Path
) -> None:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prose(2000, seed=seed) for seed in range(9)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=120,
        user_defined_symbols=["</s>"],
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(DataUsageError, match=MESSAGE.format(id=2)):
        bring(lines, tmp_path, "tokenizer.model")


@pytest.mark.parametrize("symbol", ["<unk>", "<s>", "</s>", "<pad>"])
def test_a_symbol_is_no_special_token(symbol: str) -> None:
    with pytest.raises(ValueError, match=f"--symbol '{symbol}' is a special token of every token"):
        PrepareConfig(user_symbols=("<tool>", symbol))


def bring(lines: Path, folder: Path, file: str = "tokenizer.json") -> None:
    prepare(
        [str(lines)],
        folder / "dataset",
        PrepareConfig(val_fraction=0.0),
        workers=1,
        tokenizer=folder / file,
    )
