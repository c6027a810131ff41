"""The tokenizer of a dataset, trained on its own text or brought along, and what it covers.

Sentences are the pieces of the split's training side in the order of their hash, so the model does
not depend on the order of files, and held-out text has no say in it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataUsageError, PrepareConfig
from data.durable import write_durably
from data.piece_model import NORMAL, SPACE
from data.pool import Pool
from data.readers import cut_parts, find_files
from data.selection import Selection, said
from data.survey import Survey, survey
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from data.tokenizer_json import MODEL_FILE, check_has_twin, copy_tokenizer, special_token_names

log = logging.getLogger(__name__)

CHECKED_BYTES = 2**20


def tokenizer_identity(path: Path, config: PrepareConfig) -> dict[str, Any]:
    """What a brought tokenizer contributes to the bytes of a dataset. Refuses an unusable one."""
    if "vocab_size" in config.model_fields_set:
        raise DataUsageError(
            f"--vocab-size {config.vocab_size} trains a tokenizer and --tokenizer {path} brings "
            "one; give only one of them"
        )
    tokenizer = load_tokenizer(path)
    if config.bos and tokenizer.bos_id is None:
        raise DataUsageError(f"{path} has no begin-of-sequence token; leave out --bos")
    names = special_token_names(path) if path.suffix == ".json" else {}
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **names}


def train(found: Survey, config: PrepareConfig) -> bytes:
    """The model file trained on the sample of a survey."""
    if not found.sample:
        raise DataUsageError(
            f"tokenizer_bytes={config.tokenizer_bytes} leaves no text to train the tokenizer on; "
            "raise it"
        )
    return train_tokenizer(
        (piece.decode() for _, piece in found.sample),
        config.vocab_size,
        kind=config.tokenizer_type,
        user_symbols=config.user_symbols,
    )


def train_file(inputs: Sequence[str], output: Path, config: PrepareConfig, *, workers: int) -> None:
    """Train a tokenizer on the files, folders and patterns in `inputs` and write its model file."""
    if output.exists():
        raise DataUsageError(f"{output} exists already; name a new file")
    selection = Selection(config.exclude)
    parts = cut_parts(find_files(inputs, selection=selection), config.part_bytes)
    if left_out := selection.to_json():
        log.warning("left out of the input: %s", said(left_out))
    with Pool(min(workers, len(parts))) as pool:
        _, found = survey(parts, config, pool, config.tokenizer_bytes)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, train(found, config))


def place(model: bytes | Path, dataset: Path) -> Path:
    """Write the tokenizer into the dataset: a trained model, or a copy of a brought file."""
    if isinstance(model, Path):
        return copy_tokenizer(model, dataset)
    path = dataset / MODEL_FILE
    write_durably(path, model)
    return path


@dataclass(frozen=True)
class Coverage:
    """How well a tokenizer fits the sample of a survey."""

    report: dict[str, Any]
    warnings: tuple[str, ...]


def coverage(path: Path, found: Survey, *, is_trained: bool) -> Coverage:
    """Encode and decode up to 1 MiB of the sample, count its characters."""
    tokenizer = load_tokenizer(path)
    texts: list[str] = []
    size = 0
    for _, piece in found.sample:
        if size + len(piece) > CHECKED_BYTES and texts:
            break
        texts.append(piece.decode())
        size += len(piece)
    encoded = tokenizer.encode_batch(texts)
    differing = sum(
        tokenizer.decode(ids) != text
        for ids, text in zip(encoded, texts, strict=True)
        if SPACE not in text
    )
    report: dict[str, Any] = {
        "is_trained_here": is_trained,
        "checked_texts": len(texts),
        "checked_bytes": size,
        "checked_tokens": sum(map(len, encoded)),
        "differ_after_decoding": differing,
    }
    warnings: list[str] = []
    if differing:
        warnings.append(
            f"the tokenizer is not lossless: {differing} of {len(texts)} sampled texts change when "
            "they are encoded and decoded"
        )
    if is_trained:
        report.update(_alphabet(tokenizer, found.sample))
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            check_has_twin(tokenizer.model, "the tokenizer")
        except DataUsageError as error:
            warnings.append(f"models trained on this dataset cannot be exported: {error}")
    if isinstance(tokenizer, SentencePieceTokenizer) and found.num_spaces:
        warnings.append(
            f"the text holds {found.num_spaces} characters U+2581, sentencepiece's sign for a "
            "space: they come back as spaces"
        )
    return Coverage(report, tuple(warnings))


def _alphabet(tokenizer: Tokenizer, sample: Sequence[tuple[int, bytes]]) -> dict[str, Any]:
    """How many of the sample's characters have a piece of their own; the others become bytes."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    pieces = {piece for piece, _, type_ in tokenizer.model.pieces if type_ == NORMAL}
    known = [ord(" " if piece == SPACE else piece) for piece in pieces if len(piece) == 1]
    counts = np.zeros(0x110000, np.int64)
    for _, piece in sample:
        characters = np.frombuffer(piece.decode().encode("utf-32-le"), "<u4")
        seen, times = np.unique(characters, return_counts=True)
        counts[seen] += times
    return {
        "training_texts": len(sample),
        "training_bytes": sum(len(piece) for _, piece in sample),
        "distinct_characters": int(np.count_nonzero(counts)),
        "alphabet": len(known),
        "character_coverage": round(float(counts[known].sum() / counts.sum()), 6),
    }
