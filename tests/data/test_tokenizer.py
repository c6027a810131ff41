"""Tokenizers: lossless, deterministic, one protocol for two formats, an exact twin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from data.config import DataError, DataUsageError
from data.piece_model import SPACE, read_piece_model
from data.tokenizer import (
    copy_tokenizer,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    write_huggingface_tokenizer,
)
from tests.data.texts import probes, prose

CORPUS = prose(60_000) + "def f(x):\n        return [\n                x\n        ]\n" * 200


def sentences(text: str = CORPUS) -> list[str]:
    return [text[start : start + 5000] for start in range(0, len(text), 5000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(sentences(), 600))
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json in the style of GPT-2, which nobody has told where documents end."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_decoding_gives_the_text_back(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    for text in probes(1500, CORPUS):
        # U+2581 is sentencepiece's own sign for a space: the one character that does not survive.
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")


def test_ids_are_those_of_sentencepiece_however_long_the_text(model: Path) -> None:
    vendor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [*probes(1500, CORPUS, seed=1), CORPUS, "x" * 5000, " " * 5000, f" {SPACE}" * 3000]
    assert load_tokenizer(model).encode_batch(texts) == vendor.encode(texts)


def test_special_ids_are_fixed_and_text_never_yields_them(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 600
    ids = tokenizer.encode("<unk><s></s><pad>")
    assert not {0, 1, 2, 3} & set(ids)


def test_runs_of_spaces_are_pieces(model: Path) -> None:
    assert len(load_tokenizer(model).encode(" " * 8)) == 1


def test_training_writes_the_same_bytes_and_depends_on_the_text() -> None:
    once = train_tokenizer(sentences(), 400)
    assert train_tokenizer(iter(sentences()), 400) == once
    assert train_tokenizer(sentences(CORPUS[:-3000]), 400) != once


def test_no_sentence_is_dropped_in_training() -> None:
    # The vendor drops a sentence that holds U+2585, and every one over 4,192 bytes by default.
    text = "\u2585 zebra quagga\n" * 400
    pieces = [piece for piece, _, _ in read_piece_model(train_tokenizer([text], 290)).pieces]
    assert f"{SPACE}zebra" in pieces


def test_a_vocabulary_below_the_alphabet_names_the_minimum() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(300)) * 3
    with pytest.raises(DataUsageError) as refused:
        train_tokenizer([text], 400)
    minimum = 300 + 256 + 4
    assert "--vocab-size 400 is smaller than the alphabet" in str(refused.value)
    assert f"need at least --vocab-size {minimum}" in str(refused.value)
    with pytest.raises(DataUsageError, match=f"at least --vocab-size {minimum}$"):
        train_tokenizer([text], minimum - 1)
    assert len(read_piece_model(train_tokenizer([text], minimum)).pieces) == minimum
    with pytest.raises(DataUsageError, match=f"at least --vocab-size {minimum}$"):
        train_tokenizer([text], 3)


def test_a_vocabulary_beyond_the_text_names_the_maximum() -> None:
    text = "one two three\n" * 5
    with pytest.raises(DataUsageError, match="too large for this text, which has only") as refused:
        train_tokenizer([text], 5000)
    maximum = int(str(refused.value).partition("give at most --vocab-size ")[2].split(",")[0])
    assert len(read_piece_model(train_tokenizer([text], maximum)).pieces) == maximum
    with pytest.raises(DataUsageError, match=f"at most --vocab-size {maximum},"):
        train_tokenizer([text], maximum + 1)


def test_a_lone_surrogate_is_named(model: Path, byte_level: Path) -> None:
    for path in (model, byte_level):
        with pytest.raises(DataError, match=r"lone surrogate \(\\ud800\) at character 2"):
            load_tokenizer(path).encode("ab\ud800")


def test_the_huggingface_twin_has_the_same_ids(model: Path, tmp_path: Path) -> None:
    write_huggingface_tokenizer(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "tokenizer.model").read_bytes() == model.read_bytes()
    texts = probes(3000, CORPUS, seed=2)
    expected = load_tokenizer(model).encode_batch(texts)
    twin = load_tokenizer(tmp_path / "tokenizer.json")
    assert twin.encode_batch(texts) == expected
    assert [twin.decode(ids) for ids in expected] == [text.replace(SPACE, " ") for text in texts]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts)["input_ids"] == expected
    assert loaded.batch_decode(expected[:200]) == [t.replace(SPACE, " ") for t in texts[:200]]
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (2, 1, 3)


def test_the_twin_of_a_model_with_a_space_in_front_has_the_same_ids(tmp_path: Path) -> None:
    # The settings of Llama 2.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        max_sentence_length=10_000,
    )
    model = tmp_path / "tokenizer.model"
    write_huggingface_tokenizer(model, tmp_path / "hf")
    vendor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = probes(1500, CORPUS, seed=3)
    expected = vendor.encode(texts)
    assert load_tokenizer(model).encode_batch(texts) == expected
    twin = load_tokenizer(tmp_path / "hf" / "tokenizer.json")
    assert twin.encode_batch(texts) == expected
    assert [twin.decode(ids) for ids in expected] == [text.replace(SPACE, " ") for text in texts]


def test_the_twin_puts_bos_in_front_only_when_training_did(model: Path, tmp_path: Path) -> None:
    write_huggingface_tokenizer(model, tmp_path / "plain")
    write_huggingface_tokenizer(model, tmp_path / "bos", bos=True)
    ids = load_tokenizer(model).encode("the river")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("the river")["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "bos")("the river")["input_ids"] == [1, *ids]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model_type": "unigram"}, "it is a unigram model"),
        ({"model_type": "bpe"}, "it rewrites text before cutting it"),
    ],
)
def test_a_model_without_a_twin_is_refused(
    tmp_path: Path, settings: dict[str, str], why: str
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_prefix=str(tmp_path / "other"),
        vocab_size=100,
        minloglevel=2,
        **settings,
    )
    model = tmp_path / "other.model"
    assert load_tokenizer(model).eos_id == 2
    with pytest.raises(DataUsageError, match=rf"{why}.*; give its tokenizer\.json instead"):
        write_huggingface_tokenizer(model, tmp_path / "hf")


def test_a_tokenizer_json_goes_through_the_same_protocol(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    texts = probes(500, CORPUS, seed=4)
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert encoded == [tokenizer.encode(text) for text in texts]
    # Neither cut nor padded, though the file asks for both.
    assert max(map(len, encoded)) > 8
    assert tokenizer.encode("a") == encoded[0] + tokenizer.encode("a")
    assert tokenizer.vocab_size == 500
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, None)
    assert tokenizer.decode([0]) == ""
    assert 0 not in tokenizer.encode("<|endoftext|>")


def test_special_tokens_are_taken_from_the_file_beside_a_tokenizer_json(
    byte_level: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    names = {"eos_token": {"content": "\u0120river"}, "bos_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.eos_id] == tokenizer.encode(" river")
    copied = tmp_path / "copy"
    copied.mkdir()
    assert copy_tokenizer(tmp_path / "tokenizer.json", copied) == copied / "tokenizer.json"
    copy = load_tokenizer(copied)
    assert (copy.eos_id, copy.bos_id) == (tokenizer.eos_id, tokenizer.bos_id)


def test_a_tokenizer_json_is_exported_without_what_training_did_not_do(
    byte_level: Path, tmp_path: Path
) -> None:
    write_huggingface_tokenizer(byte_level, tmp_path)
    texts = probes(200, CORPUS, seed=5)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts)["input_ids"] == load_tokenizer(byte_level).encode_batch(texts)
    assert loaded.eos_token == "<|endoftext|>"
    with pytest.raises(DataUsageError, match="no begin-of-sequence token to put in front"):
        write_huggingface_tokenizer(byte_level, tmp_path, bos=True)


def test_merges_are_never_left_out_at_random(byte_level: Path, tmp_path: Path) -> None:
    expected = load_tokenizer(byte_level).encode(CORPUS[:20_000])
    content = json.loads(byte_level.read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode(CORPUS[:20_000]) == expected
    write_huggingface_tokenizer(tmp_path / "tokenizer.json", tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded(CORPUS[:20_000])["input_ids"] == expected


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataUsageError, match=r'no end-of-sequence token.*"eos_token": "\.\.\."'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("beside", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_end_of_sequence_that_is_no_token_is_named_with_its_file(
    byte_level: Path, tmp_path: Path, beside: str
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(byte_level.read_bytes())
    (tmp_path / beside).write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    with pytest.raises(DataUsageError) as refused:
        load_tokenizer(tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / beside}: eos_token is '<|im_end|>', which is none of")
    assert f"of the 500 tokens of {file}, so no document could end with it" in message
    assert 'write the one that the tokenizer has, perhaps "eos_token": "<|endoftext|>"' in message
    assert "or fetch both files again from one place, or add '<|im_end|>' to its added" in message
    (tmp_path / beside).write_text('{"eos_token": "<|endoftext|>"}')
    assert load_tokenizer(tmp_path).eos_id == 0


def test_the_model_is_preferred_to_the_json(model: Path, byte_level: Path, tmp_path: Path) -> None:
    with pytest.raises(DataUsageError, match=r"holds no tokenizer \(tokenizer\.model or"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    assert tokenizer_file(tmp_path) == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    assert tokenizer_file(tmp_path) == tmp_path / "tokenizer.model"
    assert load_tokenizer(tmp_path).vocab_size == 600


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataUsageError, match=r"x\.model: no such tokenizer file"):
        load_tokenizer(tmp_path / "x.model")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\xff", b"\x0a\x02\x12\x00"])
def test_a_damaged_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model cannot be read as a sentencepiece mod"):
        load_tokenizer(tmp_path)


def test_a_cut_model_is_named(model: Path, tmp_path: Path) -> None:
    raw = model.read_bytes()
    for size in range(1, len(raw), len(raw) // 40):
        (tmp_path / "tokenizer.model").write_bytes(raw[:size])
        with pytest.raises(DataError, match=r"cannot be read|no end-of-sequence"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": '])
def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read as a tokenizer\.json"):
        load_tokenizer(tmp_path)
