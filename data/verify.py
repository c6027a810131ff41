"""Check a dataset on disk against its manifest and name whatever is damaged.

Fast: manifest, table, tokenizer, indexes, file sizes, and the xxh3 of every chunk; token ids inside
the vocabulary; what manifest, table and indexes say of each other; the hash of every packing plan.
Full adds the sha256 of every shard, which also covers the tar headers between the arrays, and makes
the plans again.
Cost: fast reads all tokens once, full twice, at about 1.5 GB per CPU-second. Memory: one piece of a
chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataError
from data.manifest import MANIFEST, TABLE, Manifest, ShardEntry, read_manifest, read_table
from data.pack import pack_shard
from data.plans import (
    PLAN,
    command,
    open_plan_file,
    plan_file,
    plan_folder,
    planned_lengths,
    read_plan,
)
from data.shards import ShardIndex, file_sha256, index_path, read_index, read_names
from data.tokenizer import tokenizer_file
from data.tokens import check_lens, check_tokens, open_shard


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """Relative to the dataset."""
    chunk: str | None
    """Key of the damaged chunk, None when the whole file is meant."""
    message: str


@dataclass(frozen=True)
class Verification:
    """What a verification read and found."""

    dataset: str
    full: bool
    num_shards: int
    num_chunks: int
    tokens: int
    documents: int
    fingerprint: str
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    dataset: Path, *, full: bool = False, progress: Callable[[ShardEntry], None] | None = None
) -> Verification:
    """Check every shard; `progress` is told of each when it is done.

    Damage of shards is reported, all of it; DataError is raised when there is no manifest to check
    against.
    """
    manifest = read_manifest(dataset)
    problems = [*_contradictions(dataset, manifest), *_stray_files(dataset, manifest)]
    tokenizer = dataset / manifest.tokenizer_file
    if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer_sha256:
        message = f"{tokenizer} is missing or not the tokenizer that the manifest names"
        problems.append(Problem(manifest.tokenizer_file, None, message))
    num_chunks = 0
    for entry in manifest.shards:
        found, chunks = _check_shard(dataset, manifest, entry, full=full)
        problems += found
        num_chunks += chunks
        if progress is not None:
            progress(entry)
    for seq_len in planned_lengths(dataset):
        problems += _check_plan(dataset, manifest, seq_len, full=full and not problems)
    return Verification(
        dataset=str(dataset),
        full=full,
        num_shards=len(manifest.shards),
        num_chunks=num_chunks,
        tokens=sum(entry.tokens for entry in manifest.shards),
        documents=sum(entry.documents for entry in manifest.shards),
        fingerprint=manifest.fingerprint,
        problems=tuple(problems),
    )


def check_tokenizer(dataset: Path, expected: str) -> None:
    """DataError when the tokenizer beside the shards is not the one that made them."""
    file = tokenizer_file(dataset)
    found = file_sha256(file)
    if found != expected:
        raise DataError(
            f"{file} is not the tokenizer that {dataset} was made with: its sha256 is "
            f"{found[:16]}, the manifest says {expected[:16]}; put the right file back, or prepare "
            "the text again with `headrace prepare`"
        )


def _check_shard(
    dataset: Path, manifest: Manifest, entry: ShardEntry, *, full: bool
) -> tuple[list[Problem], int]:
    """What is wrong with a shard, and how many of its chunks were read."""
    path = dataset / entry.path
    try:
        file = open_shard(path, entry.bytes)
    except DataError as error:
        return [Problem(entry.path, None, str(error))], 0
    problems: list[Problem] = []
    num_chunks = 0
    try:
        index = read_index(index_path(path), sha256=entry.idx_sha256)
        problems += _differences(dataset, manifest, entry, index)
        for chunk in index.chunks:
            num_chunks += 1
            try:
                check_lens(file, path, chunk)
                read_names(file, path, chunk)
                check_tokens(file, path, chunk, np.dtype(manifest.dtype), manifest.vocab_size)
            except DataError as error:
                problems.append(Problem(entry.path, chunk.key, str(error)))
    except DataError as error:
        name = str(index_path(path).relative_to(dataset))
        problems.append(Problem(name, None, str(error)))
    finally:
        os.close(file)
    if full and not problems and file_sha256(path) != entry.sha256:
        message = (
            f"{path} is damaged outside its arrays (a tar header or padding): the tokens are "
            "right, but its sha256 differs from the manifest; restore it from a copy"
        )
        problems.append(Problem(entry.path, None, message))
    return problems, num_chunks


def _check_plan(
    dataset: Path, manifest: Manifest, seq_len: int, *, full: bool
) -> Iterator[Problem]:
    """What is wrong with the packing plan of a length."""
    try:
        plan = read_plan(dataset, manifest, seq_len)
    except DataError as error:
        name = (plan_folder(dataset, seq_len) / PLAN).relative_to(dataset).as_posix()
        yield Problem(name, None, str(error))
        return
    for entry, shard in zip(manifest.shards, plan.shards, strict=True):
        path = plan_file(dataset, seq_len, entry.path)
        name = path.relative_to(dataset).as_posix()
        try:
            os.close(open_plan_file(path, shard.sha256))
        except DataError as error:
            yield Problem(name, None, str(error))
            continue
        if full and pack_shard(dataset, entry, seq_len)[1] != shard:
            message = (
                f"{path} is not what the lengths of the documents give; make the plan again with "
                f"{command(dataset, seq_len)}"
            )
            yield Problem(name, None, message)


def _contradictions(dataset: Path, manifest: Manifest) -> Iterator[Problem]:
    """Where a manifest with a right seal denies its table: one was edited and sealed again."""
    table, shards = read_table(dataset), manifest.shards
    same = len(table) == len(shards)
    for name in ("bytes", "tokens", "documents"):
        same = same and table[name].tolist() == [getattr(entry, name) for entry in shards]
    same = same and table["path"].tolist() == [entry.path.encode() for entry in shards]
    hashes = [bytes.fromhex(entry.idx_sha256) for entry in shards]
    if not same or [row.tobytes() for row in table["idx_sha256"]] != hashes:
        message = (
            f"{dataset / TABLE} lists other shards than {MANIFEST}; restore both from a copy of "
            "the dataset"
        )
        yield Problem(TABLE, None, message)


def _differences(
    dataset: Path, manifest: Manifest, entry: ShardEntry, index: ShardIndex
) -> Iterator[Problem]:
    """What an intact index says otherwise than the manifest."""
    pairs = {
        "bytes": (index.bytes, entry.bytes),
        "tokens": (index.tokens, entry.tokens),
        "documents": (index.documents, entry.documents),
        "sha256": (index.tar_sha256, entry.sha256),
        "dtype": (index.dtype, manifest.dtype),
    }
    path = index_path(dataset / entry.path)
    for what, (found, expected) in pairs.items():
        if found != expected:
            message = (
                f"{path} says {what} {found}, {MANIFEST} says {expected}; restore both from a copy "
                "of the dataset"
            )
            yield Problem(str(path.relative_to(dataset)), None, message)


def _stray_files(dataset: Path, manifest: Manifest) -> Iterator[Problem]:
    listed = {entry.path for entry in manifest.shards}
    listed |= {index_path(Path(name)).as_posix() for name in listed}
    for split in ("train", "val"):
        for path in sorted((dataset / split).glob("*/*")):
            name = path.relative_to(dataset).as_posix()
            if name not in listed and name.endswith((".tar", ".idx.json")):
                message = f"{path} is not in the manifest; no reader looks at it, remove it"
                yield Problem(name, None, message)
