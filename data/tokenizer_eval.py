"""How tokenizers do on texts: bytes per token, round trips, coverage, speed.

Every input is one source of its own. Of a large one a sample is taken by the hash of its documents,
so the figures depend on the texts alone. Memory: the sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.config import DataUsageError
from data.piece_model import SPACE
from data.readers import (
    MISSING_FIELD,
    Document,
    Dropped,
    InputFile,
    cut_parts,
    find_files,
    read_extent,
)
from data.split import HASH_RANGE, piece_hash
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

SAMPLE_BYTES = 2**23
_PART_BYTES = 2**24


@dataclass(frozen=True)
class Score:
    """One tokenizer on one source."""

    tokenizer: str
    source: str
    vocab_size: int
    documents: int
    bytes: int
    """UTF-8 bytes of the sampled documents."""
    tokens: int
    bytes_per_token: float
    changed: int
    """Documents that decoding does not give back."""
    unknown_share: float
    """Share of tokens that are the unknown token or a single byte of a character without a piece.
    """
    mb_per_cpu_second: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def evaluate_tokenizers(
    tokenizers: Sequence[Path], inputs: Sequence[str], *, text_field: str = "text"
) -> list[Score]:
    """Every tokenizer on every input, inputs outermost.

    DataUsageError for an input without text or a tokenizer that cannot be used.
    """
    loaded = [(path, load_tokenizer(path)) for path in tokenizers]
    scores = []
    for named in inputs:
        texts = _sample(named, text_field)
        scores += [_score(str(path), tokenizer, named, texts) for path, tokenizer in loaded]
    return scores


def _sample(named: str, text_field: str) -> list[str]:
    files = find_files([named])
    share = min(1.0, SAMPLE_BYTES / max(1, sum(file.num_bytes for file in files)))
    sample: list[str] = []
    bad: Dropped | None = None
    for item in _items(files, text_field):
        if isinstance(item, Document):
            if piece_hash(item.text, 0) < share * HASH_RANGE:
                sample.append(item.text.decode())
        elif item.is_bad:
            bad = bad or item
    if not sample:
        raise DataUsageError(_without_text(named, text_field, bad))
    return sample


def _items(files: Sequence[InputFile], text_field: str) -> Iterator[Document | Dropped]:
    for part in cut_parts(files, _PART_BYTES):
        for extent in part:
            yield from read_extent(extent, text_field)


def _without_text(named: str, text_field: str, bad: Dropped | None) -> str:
    if bad is None:
        return f"{named} holds no text; name files that hold some"
    what = f"no field {text_field!r}" if bad.reason == MISSING_FIELD else bad.reason
    return (
        f"{named} holds no text; the first record that gives none:\n"
        f"  {bad.place}: {what}: {bad.detail}\n"
        "mend them, or name the field that holds the text with --text-field"
    )


def _score(name: str, tokenizer: Tokenizer, source: str, texts: Sequence[str]) -> Score:
    started = time.process_time()
    encoded = tokenizer.encode_batch(texts)
    seconds = time.process_time() - started
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(map(len, encoded))
    lossless_sign = isinstance(tokenizer, SentencePieceTokenizer)
    changed = sum(
        # sentencepiece gives its own sign for a space back as a space; nobody can tell.
        tokenizer.decode(ids) != (text.replace(SPACE, " ") if lossless_sign else text)
        for ids, text in zip(encoded, texts, strict=True)
    )
    fallback = {tokenizer.unk_id, *tokenizer.byte_ids}
    return Score(
        tokenizer=name,
        source=source,
        vocab_size=tokenizer.vocab_size,
        documents=len(texts),
        bytes=num_bytes,
        tokens=num_tokens,
        bytes_per_token=num_bytes / num_tokens,
        changed=changed,
        unknown_share=sum(id_ in fallback for ids in encoded for id_ in ids) / num_tokens,
        mb_per_cpu_second=num_bytes / 1e6 / max(seconds, 1e-9),
    )
