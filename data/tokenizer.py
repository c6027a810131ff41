"""Text to ids and back: one protocol for sentencepiece models and tokenizer.json files.

A tokenizer trained here is lossless: decode(encode(x)) == x for every text but one holding U+2581,
sentencepiece's own sign for a space, which comes back as a space. Text that merely looks like a
special token ("</s>") is encoded as text. Training on the same sentences writes the same bytes.
Cost on one core: training 1 s per 6 MB, encoding 4-5 MB/s (long documents are cut at spaces, which
keeps the ids and doubles the speed).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from data.config import DataError, DataUsageError
from data.piece_model import PieceModel, read_piece_model
from data.tokenizer_json import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    check_eos_is_known,
    special_token_names,
)
from data.tokenizer_json import copy_tokenizer as copy_tokenizer
from data.tokenizer_json import export_problem as export_problem
from data.tokenizer_json import write_huggingface_tokenizer as write_huggingface_tokenizer

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
SENTENCE_BYTES = 2**16
"""The longest text that training accepts as one sentence."""
# Stored in the model, and part of what unigram scores depend on: never the number of cores.
_TRAINING_THREADS = 4
_SEGMENT_CHARACTERS = 1000
_BATCH_CHARACTERS = 2**20
# Text cannot hold U+2585 in training: sentencepiece drops such a sentence whole.
_RESERVED = "\u2585"
_SPACE_AFTER_TEXT = re.compile("(?<=[^ \u2581]) ")


class Tokenizer(Protocol):
    """What the rest of headrace needs of a tokenizer."""

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int | None
    unk_id: int | None
    byte_ids: frozenset[int]
    """Ids of single bytes that stand for characters without a piece; empty where there are none."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special id is added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special ids give none."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        try:
            self.model: PieceModel = read_piece_model(raw)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except (ValueError, RuntimeError) as error:
            raise _damaged(path, "a sentencepiece model", error) from error
        if not self.model.pieces:
            raise _damaged(path, "a sentencepiece model", ValueError("it has no pieces"))
        self.vocab_size = len(self.model.pieces)
        special = self.model.special
        self.bos_id, self.pad_id = special.get("bos"), special.get("pad")
        self.unk_id = special.get("unk")
        self.eos_id: int = _require_eos(special.get("eos"), path)
        self.byte_ids = frozenset(self.model.byte_ids)
        self._splits_at_space = self.model.splits_at_space

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        segments: list[str] = []
        counts: list[int] = []
        for text in texts:
            before = len(segments)
            segments.extend(self.slices(text, _SEGMENT_CHARACTERS))
            counts.append(len(segments) - before)
        _check_unicode(segments)
        encoded = iter(self._processor.encode(segments, num_threads=1))
        return [[id_ for _ in range(count) for id_ in next(encoded)] for count in counts]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def slices(self, text: str, num_characters: int) -> Iterator[str]:
        """The text in slices of about `num_characters`, whose ids, joined, are those of the text.

        They end before a space that follows no space, where no piece can cross; text without such
        places, and models that could tell the difference, give longer slices.
        """
        start = 0
        while self._splits_at_space and len(text) - start > num_characters:
            cut = _SPACE_AFTER_TEXT.search(text, start + num_characters)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]


class HuggingFaceTokenizer:
    """A tokenizer.json, with the special tokens of the tokenizer_config.json beside it."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise _damaged(path, "a tokenizer.json", error) from error
        # A file may ask for cut, padded or random output, and special tokens would match in text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None
        self._tokenizer.encode_special_tokens = True
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        check_eos_is_known(path, vocabulary)
        names = special_token_names(path)
        self.bos_id = vocabulary.get(names.get("bos_token", ""))
        self.pad_id = vocabulary.get(names.get("pad_token", ""))
        self.unk_id = vocabulary.get(names.get("unk_token", ""))
        self.eos_id: int = _require_eos(vocabulary.get(names.get("eos_token", "")), path)
        falls_back = getattr(self._tokenizer.model, "byte_fallback", False)
        pieces = (f"<0x{byte:02X}>" for byte in range(256)) if falls_back else ()
        self.byte_ids = frozenset(vocabulary[piece] for piece in pieces if piece in vocabulary)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        _check_unicode(texts)
        encoded: list[list[int]] = []
        for batch in _batches(texts):
            encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            encoded.extend(encoding.ids for encoding in encodings)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def tokenizer_file(folder: str | Path) -> Path:
    """The tokenizer of a dataset, run or Hugging Face folder: tokenizer.model, else .json."""
    for name in (MODEL_FILE, JSON_FILE):
        path = Path(folder, name)
        if path.is_file():
            return path
    raise DataUsageError(
        f"{folder} holds no tokenizer ({MODEL_FILE} or {JSON_FILE}); name a dataset, a run or a "
        "Hugging Face folder that has one"
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds one.

    Raises DataUsageError when there is none or it has no end-of-sequence token, DataError when the
    file is damaged.
    """
    file = tokenizer_file(path) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataUsageError(f"{file}: no such tokenizer file")
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    return SentencePieceTokenizer(file)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special ids that a tokenizer has, as manifests name them."""
    ids = {"unk": tokenizer.unk_id, "bos": tokenizer.bos_id}
    ids |= {"eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return {name: id_ for name, id_ in ids.items() if id_ is not None}


def check_own_ids(ids: NDArray[np.uint32], tokenizer: Tokenizer, path: Path, document: str) -> None:
    """DataUsageError when the text of a document has the id that ends or begins one: whoever looks
    for the borders of documents would find one inside.
    """
    for name, id_ in (("EOS", tokenizer.eos_id), ("BOS", tokenizer.bos_id)):
        if id_ is not None and (ids == id_).any():
            raise DataUsageError(
                f"{document}: its text encodes to id {id_}, the {name} of {path}, which readers "
                "take for the border of a document; give a tokenizer that matches it in no text (a "
                'tokenizer.json marks it "special": true in added_tokens, a sentencepiece model '
                f"has it as a control symbol), or name another token as {name}"
            )


def train_tokenizer(
    sentences: Iterable[str],
    vocab_size: int,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    user_symbols: Sequence[str] = (),
) -> bytes:
    """The model file of a tokenizer trained on `sentences`, each at most SENTENCE_BYTES long.

    The bytes depend on the arguments and the order of the sentences alone. Raises DataUsageError
    when `vocab_size` cannot hold the alphabet or is more than the text has pieces for.
    """
    kept = [part for text in sentences for part in text.split(_RESERVED) if part]
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(kept),
            model_writer=model,
            model_type=kind,
            # Below 4 the vendor stumbles over the special ids before it says what is needed.
            vocab_size=max(vocab_size, 4),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Indentation is most of a program: runs of spaces may be pieces (-38 % tokens there).
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(user_symbols),
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            max_sentence_length=SENTENCE_BYTES,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return model.getvalue()


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in groups of about _BATCH_CHARACTERS: an encoding holds 50 times its text."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= _BATCH_CHARACTERS:
            yield batch
            batch = []
    yield batch


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text holds a lone surrogate ({ascii(text[error.start])[1:-1]}) at character "
                f"{error.start}, which is half of a character; remove it or replace it by U+FFFD"
            ) from None


def _require_eos(eos_id: int | None, path: Path) -> int:
    if eos_id is None:
        raise DataUsageError(
            f"{path} names no end-of-sequence token, which ends every document; give a tokenizer "
            f'that has one, or name it in {CONFIG_FILE} beside it: {{"eos_token": "..."}}'
        )
    return eos_id


def _damaged(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as {kind}: {error}; fetch or write it again")


def _training_error(message: str, vocab_size: int) -> DataError:
    """sentencepiece's refusal, with the flag that mends it."""
    small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if small:
        return DataUsageError(
            f"--vocab-size {vocab_size} is smaller than the alphabet: the characters of this text, "
            f"256 bytes and 4 special tokens need at least --vocab-size {small[1]}"
        )
    large = re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message)
    if large:
        return DataUsageError(
            f"--vocab-size {vocab_size} is too large for this text, which has only {large[1]} "
            f"pieces: give at most --vocab-size {large[1]}, or more text"
        )
    return DataError(f"training the tokenizer failed: {message}")
