"""The stored documents of the input as ids, in shards.

A shard holds consecutive parts, so its bytes depend on the input alone; parts are encoded by any
number of workers, which cut and split the text again as the survey did, so that a job carries none.
Cost: reading plus the tokenizer, 4-5 MB/s on one core. Memory per worker: the ids of a part and
about 6 times its longest stored document (with a tokenizer.json: 50 times).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.cleaning import Cleaned, read_cleaned
from data.config import DataError, PrepareConfig
from data.documents import place_name
from data.manifest import ShardEntry, dtype_for
from data.pool import Pool, Progress
from data.readers import Document, Part, Reading, reading_of
from data.shards import Named, finished_shard, write_shard
from data.split import SIDES, Run, Side, SplitRule
from data.survey import Survey, Surveyed
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

SOURCE = "main"
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

    def documents(self) -> Iterator[NDArray[np.uint32]]:
        """Every document as a view."""
        end = 0
        for length in self.lengths.tolist():
            yield self.ids[end : end + length]
            end += length

    def named(self) -> Iterator[Named]:
        """Every document with its id."""
        return (Named(ids, name) for ids, name in zip(self.documents(), self.names, strict=True))


@dataclass
class ShardPlan:
    """A shard to write: the jobs whose documents it holds, in order, and how many those are."""

    path: Path
    jobs: list[EncodeJob] = field(default_factory=list)
    num_documents: int = 0
    text_bytes: int = 0


def write_shards(
    dataset: Path,
    surveyed: Surveyed,
    config: PrepareConfig,
    tokenizer: Path,
    pool: Pool,
    progress: Progress,
    cleaned: Cleaned | None = None,
) -> list[ShardEntry]:
    """Write every shard that is not finished; returns all, training side first."""
    plans = _plan(dataset, surveyed, config, tokenizer, cleaned)
    dtype = dtype_for(load_tokenizer(tokenizer).vocab_size)
    num_bytes = done = surveyed.total.text_bytes.total()
    entries = {plan.path: _left_over(plan) for plan in plans}
    todo = [plan for plan in plans if entries[plan.path] is None]
    done -= sum(plan.text_bytes for plan in todo)
    # One stream over all shards: workers encode the next shard while this one is finished.
    stream = pool.map(encode_part, chain.from_iterable(plan.jobs for plan in todo))

    def documents(plan: ShardPlan) -> Iterator[Any]:
        nonlocal done
        for encoded in islice(stream, len(plan.jobs)):
            yield from encoded.named() if config.id_field else encoded.documents()
            done += encoded.text_bytes
            progress("encode", done, num_bytes)

    for plan in todo:
        entry = write_shard(plan.path, documents(plan), dtype)
        if entry.documents != plan.num_documents:
            raise DataError(
                f"{plan.path} got {entry.documents} documents where the survey counted "
                f"{plan.num_documents}: the input changed in between; remove {dataset} and run "
                "the command again"
            )
        entries[plan.path] = entry
    return [entry for entry in entries.values() if entry is not None]


def _left_over(plan: ShardPlan) -> ShardEntry | None:
    """The shard as an interrupted call has left it, if that is all of it."""
    entry = finished_shard(plan.path) if plan.path.exists() else None
    return entry if entry is not None and entry.documents == plan.num_documents else None


def _plan(
    dataset: Path,
    surveyed: Surveyed,
    config: PrepareConfig,
    tokenizer: Path,
    cleaned: Cleaned | None,
) -> list[ShardPlan]:
    """Consecutive jobs of a side make a shard until it holds `shard_bytes` of text."""
    make = partial(
        EncodeJob,
        reading=reading_of(config),
        rule=surveyed.rule,
        tokenizer=tokenizer,
        tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        bos=config.bos,
        cleaned=cleaned,
    )
    plans: list[ShardPlan] = []
    for side in SIDES:
        shards: list[ShardPlan] = []
        for number, (part, found) in enumerate(surveyed.parts):
            for runs, num_documents, text_bytes in _groups(found, side, config.part_bytes):
                if not shards or shards[-1].text_bytes >= config.shard_bytes:
                    shards.append(
                        ShardPlan(dataset / side / SOURCE / f"shard-{len(shards):06d}.tar")
                    )
                shards[-1].jobs.append(make(part=part, number=number, side=side, runs=runs))
                shards[-1].num_documents += num_documents
                shards[-1].text_bytes += text_bytes
        plans += shards
    return plans


def _groups(
    found: Survey, side: Side, part_bytes: int
) -> Iterator[tuple[tuple[Run, ...], int, int]]:
    """(runs, documents, bytes) of each job of a part on one side; a long text makes several."""
    if not found.runs:
        if found.documents[side]:
            yield (), found.documents[side], found.text_bytes[side]
        return
    group: list[Run] = []
    size = 0
    for run in found.runs:
        if run.side != side:
            continue
        group.append(run)
        size += run.stop - run.start
        if size >= part_bytes:
            yield tuple(group), len(group), size
            group, size = [], 0
    if group:
        yield tuple(group), len(group), size


def encode_part(job: EncodeJob) -> Encoded:
    """Encode the documents of a job in order. Raises DataError for an id that cannot be."""
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
            arrays.append(array)
            lengths.append(len(array))
    kept = tuple(names) if job.reading.id_field else ()
    return Encoded(np.concatenate(arrays), np.array(lengths, np.uint32), text_bytes, kept)


def _texts(job: EncodeJob, names: list[str]) -> Iterator[str]:
    """The text of every stored document; its id goes to `names`."""
    if job.runs:
        with open(job.part[0].file.path, "rb") as stream:
            for run in job.runs:
                names.append(job.part[0].file.name)
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
