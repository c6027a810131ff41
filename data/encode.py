"""The stored documents of a part as ids.

Parts are encoded by any number of workers, which cut and split the text again as the survey did, so
that a job carries none.
Cost: reading plus the tokenizer, 4-5 MB/s on one core. Memory per worker: the ids of a part and
about 6 times its longest stored document (with a tokenizer.json: 50 times).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.cleaning import Cleaned, read_cleaned
from data.config import DataError
from data.documents import place_name
from data.readers import Document, Part, Reading
from data.shards import Named
from data.split import Run, Side, SplitRule
from data.stamps import steadily, unchanged
from data.tokenizer import SentencePieceTokenizer, Tokenizer, check_own_ids, load_tokenizer

_BATCH_CHARACTERS = 2**18


@dataclass(frozen=True)
class EncodeJob:
    """The stored documents of a part on one side."""

    part: Part
    number: int
    """Of the part among all parts."""
    side: Side
    runs: tuple[Run, ...]
    """Places in the part's one text file, where the survey listed them; else all of the part."""
    reading: Reading
    rule: SplitRule
    tokenizer: Path
    tokenizer_sha256: str
    bos: bool
    cleaned: Cleaned | None


@dataclass(frozen=True)
class Encoded:
    """Documents, one after the other."""

    ids: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    """Ids of each document, BOS and EOS included."""
    text_bytes: int
    names: tuple[str, ...] = ()
    """The id of each document, where ids are kept."""
    num_unknown: int = 0
    """Ids that stand for what the tokenizer does not know."""

    def documents(self) -> Iterator[NDArray[np.uint32]]:
        """Every document as a view."""
        end = 0
        for length in self.lengths.tolist():
            yield self.ids[end : end + length]
            end += length

    def named(self) -> Iterator[Named]:
        """Every document with its id."""
        return (Named(ids, name) for ids, name in zip(self.documents(), self.names, strict=True))


def encode_part(job: EncodeJob) -> Encoded:
    """Encode the documents of a job in order. Raises DataError for an id that cannot be."""
    return steadily(lambda: _encode_part(job))


def _encode_part(job: EncodeJob) -> Encoded:
    tokenizer = _tokenizer(job.tokenizer, job.tokenizer_sha256)
    assert not job.bos or tokenizer.bos_id is not None
    before = np.array([tokenizer.bos_id] if job.bos else [], np.uint32)
    after = np.array([tokenizer.eos_id], np.uint32)
    arrays = [np.zeros(0, np.uint32)]
    lengths: list[int] = []
    names: list[str] = []
    text_bytes = 0
    for texts in _batches(_texts(job, names)):
        text_bytes += sum(len(text.encode()) for text in texts)
        for ids in _encode(tokenizer, texts):
            array = np.concatenate([before, ids, after])
            if array.max() >= tokenizer.vocab_size:
                raise DataError(
                    f"{job.tokenizer} gave id {array.max()}, outside its vocabulary of "
                    f"{tokenizer.vocab_size}; the file is damaged: fetch it again"
                )
            check_own_ids(ids, tokenizer, job.tokenizer, names[len(lengths)])
            arrays.append(array)
            lengths.append(len(array))
    kept = tuple(names) if job.reading.id_field else ()
    ids = np.concatenate(arrays)
    unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(ids == tokenizer.unk_id))
    return Encoded(ids, np.array(lengths, np.uint32), text_bytes, kept, unknown)


def _texts(job: EncodeJob, names: list[str]) -> Iterator[str]:
    """The text of every stored document; its id goes to `names`."""
    if job.runs:
        file = job.part[0].file
        with unchanged(file.path, file.stamp), open(file.path, "rb") as stream:
            for run in job.runs:
                names.append(file.name)
                stream.seek(run.start)
                yield stream.read(run.stop - run.start).decode()
        return
    for file, document in read_cleaned(job.number, job.part, job.reading, job.cleaned):
        if isinstance(document, Document):
            for run in job.rule.runs(file, document):
                if run.side == job.side:
                    names.append(document.id or place_name(file, document))
                    yield document.text[run.start : run.stop].decode()


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Small texts together, a long one alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.uint32]]:
    if len(texts) > 1 or not isinstance(tokenizer, SentencePieceTokenizer):
        for ids in tokenizer.encode_batch(texts):
            yield np.array(ids, np.uint32)
        return
    # A Python list of ids takes 10 times the text; slices keep a book from becoming one.
    slices = tokenizer.slices(texts[0], _BATCH_CHARACTERS)
    yield np.concatenate([np.array(tokenizer.encode(part), np.uint32) for part in slices])


# By content too: a path may hold another tokenizer later in the life of this process.
@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    return load_tokenizer(path)
