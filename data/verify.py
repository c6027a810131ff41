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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data.arrays import check_lens, check_tokens
from data.config import AccessError, DataError, MissingError
from data.durable import file_sha256
from data.folder import Folder
from data.manifest import MANIFEST, TABLE, Manifest, ShardEntry, read_manifest, read_table
from data.pack import pack_shard
from data.places import Kind, Place, place_of
from data.plans import command, open_plan_file, plan_name, planned_lengths, read_plan
from data.shard_index import ShardIndex, index_of, index_path, read_names
from data.tokenizer import load_tokenizer, special_ids, tokenizer_file
from data.tokenizer_json import CONFIG_FILE, JSON_FILE


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
    dataset: str | Path | Place,
    *,
    full: bool = False,
    progress: Callable[[ShardEntry], None] | None = None,
) -> Verification:
    """Check every shard; `progress` is told of each when it is done.

    Damage of shards is reported, all of it; DataError is raised when there is no manifest to check
    against. Of what lies elsewhere all is fetched; copies in the cache are not looked at.
    """
    place = place_of(dataset)
    manifest = read_manifest(place)
    problems = [*_contradictions(place, manifest), *_stray_files(place, manifest)]
    problems += _tokenizer_problems(place, manifest)
    num_chunks = 0
    for entry in manifest.shards:
        found, chunks = _check_shard(place, manifest, entry, full=full)
        problems += found
        num_chunks += chunks
        if progress is not None:
            progress(entry)
    for seq_len in planned_lengths(place):
        problems += _check_plan(place, manifest, seq_len, full=full and not problems)
    return Verification(
        dataset=str(place),
        full=full,
        num_shards=len(manifest.shards),
        num_chunks=num_chunks,
        tokens=sum(entry.tokens for entry in manifest.shards),
        documents=sum(entry.documents for entry in manifest.shards),
        fingerprint=manifest.fingerprint,
        problems=tuple(problems),
    )


def tokenizer_of(place: Place, file: str, sha256: str, special: Mapping[str, int]) -> Path:
    """The folder, on this machine, with the tokenizer of a dataset, checked."""
    folder = place.tokenizer(file, sha256)
    check_tokenizer(folder, sha256, special)
    return folder


def check_tokenizer(dataset: Path, sha256: str, special: Mapping[str, int]) -> None:
    """DataError when the tokenizer beside the shards is not the one that made them: its file has
    another hash, or what stands beside a tokenizer.json names other special tokens.
    """
    file = tokenizer_file(dataset)
    found = file_sha256(file)
    if found != sha256:
        raise DataError(
            f"{file} is not the tokenizer that {dataset} was made with: its sha256 is "
            f"{found[:16]}, the manifest says {sha256[:16]}; put the right file back, or prepare "
            "the text again with `headrace prepare`"
        )
    if file.name == JSON_FILE:
        _check_special(file, special)


def _check_special(file: Path, expected: Mapping[str, int]) -> None:
    beside = file.with_name(CONFIG_FILE)
    try:
        found = special_ids(load_tokenizer(file))
    except DataError as error:
        raise DataError(
            f"{beside} is missing or damaged: {error}; restore it from a copy of the dataset"
        ) from error
    # Whoever wrote a dataset of integer arrays may have named fewer than the tokenizer has.
    if any(found.get(name) != id_ for name, id_ in expected.items()):
        raise DataError(
            f"{beside} is missing or was edited: with it the special ids are {found}, the manifest "
            f"says {dict(expected)}; restore it from a copy of the dataset"
        )


def _tokenizer_problems(place: Place, manifest: Manifest) -> Iterator[Problem]:
    name = manifest.tokenizer_file
    try:
        file = place.tokenizer(name, manifest.tokenizer_sha256) / name
    except DataError as error:
        _raise_unless_damage(error)
        yield Problem(name, None, str(error))
        return
    if not file.is_file() or file_sha256(file) != manifest.tokenizer_sha256:
        message = f"{file} is missing or not the tokenizer that the manifest names"
        yield Problem(name, None, message)
    elif name == JSON_FILE:
        try:
            _check_special(file, manifest.special_ids)
        except DataError as error:
            yield Problem(CONFIG_FILE, None, str(error))


def _check_shard(
    place: Place, manifest: Manifest, entry: ShardEntry, *, full: bool
) -> tuple[list[Problem], int]:
    """What is wrong with a shard, and how many of its chunks were read."""
    path = place.path(entry.path)
    try:
        place.check_size(entry.path, entry.bytes)
    except DataError as error:
        _raise_unless_damage(error)
        return [Problem(entry.path, None, str(error))], 0
    problems: list[Problem] = []
    num_chunks = 0
    try:
        index = index_of(place, entry.path, entry.idx_sha256, original=True)
        problems += _differences(place, manifest, entry, index)
        for number, chunk in enumerate(index.chunks):
            num_chunks += 1
            try:
                for kind in get_args(Kind):
                    _check_array(place, manifest, entry, index, number, kind)
            except DataError as error:
                _raise_unless_damage(error)
                problems.append(Problem(entry.path, chunk.key, str(error)))
    except DataError as error:
        _raise_unless_damage(error)
        problems.append(Problem(index_path(Path(entry.path)).as_posix(), None, str(error)))
    if full and not problems and place.sha256(entry.path, entry.bytes) != entry.sha256:
        message = (
            f"{path} is damaged outside its arrays (a tar header or padding): the tokens are "
            "right, but its sha256 differs from the manifest; restore it from a copy"
        )
        problems.append(Problem(entry.path, None, message))
    return problems, num_chunks


def _check_plan(place: Place, manifest: Manifest, seq_len: int, *, full: bool) -> Iterator[Problem]:
    """What is wrong with the packing plan of a length."""
    try:
        plan = read_plan(place, manifest, seq_len)
    except DataError as error:
        _raise_unless_damage(error)
        yield Problem(plan_name(seq_len), None, str(error))
        return
    for entry, shard in zip(manifest.shards, plan.shards, strict=True):
        name = plan_name(seq_len, entry.path)
        try:
            os.close(open_plan_file(place, seq_len, entry.path, shard.sha256))
        except DataError as error:
            _raise_unless_damage(error)
            yield Problem(name, None, str(error))
            continue
        if full and pack_shard(place, entry, seq_len)[1] != shard:
            message = (
                f"{place.path(name)} is not what the lengths of the documents give; make the plan "
                f"again with {command(place, seq_len)}"
            )
            yield Problem(name, None, message)


def _raise_unless_damage(error: DataError) -> None:
    """A file that is not there is a problem of the dataset; what is out of reach is none."""
    if isinstance(error, AccessError) and not isinstance(error, MissingError):
        raise error


def _check_array(
    place: Place,
    manifest: Manifest,
    entry: ShardEntry,
    index: ShardIndex,
    number: int,
    kind: Kind,
) -> None:
    chunk, path = index.chunks[number], place.path(entry.path)
    if kind == "ids" and chunk.ids_offset is None:
        return
    file = place.open_original(chunk.array(kind, shard=entry.path, number=number, index=index))
    chunk = chunk.alone() if place.by_chunk else chunk
    try:
        if kind == "lens":
            check_lens(file, path, chunk)
        elif kind == "ids":
            read_names(file, path, chunk)
        else:
            check_tokens(file, path, chunk, np.dtype(manifest.dtype), manifest.vocab_size)
    finally:
        os.close(file)


def _contradictions(place: Place, manifest: Manifest) -> Iterator[Problem]:
    """Where a manifest with a right seal denies its table: one was edited and sealed again."""
    table, shards = read_table(place, manifest.table_sha256), manifest.shards
    same = len(table) == len(shards)
    for name in ("bytes", "tokens", "documents"):
        same = same and table[name].tolist() == [getattr(entry, name) for entry in shards]
    same = same and table["path"].tolist() == [entry.path.encode() for entry in shards]
    hashes = [bytes.fromhex(entry.idx_sha256) for entry in shards]
    if not same or [row.tobytes() for row in table["idx_sha256"]] != hashes:
        message = (
            f"{place.path(TABLE)} lists other shards than {MANIFEST}; restore both from a copy of "
            "the dataset"
        )
        yield Problem(TABLE, None, message)


def _differences(
    place: Place, manifest: Manifest, entry: ShardEntry, index: ShardIndex
) -> Iterator[Problem]:
    """What an intact index says otherwise than the manifest."""
    pairs = {
        "bytes": (index.bytes, entry.bytes),
        "tokens": (index.tokens, entry.tokens),
        "documents": (index.documents, entry.documents),
        "sha256": (index.tar_sha256, entry.sha256),
        "dtype": (index.dtype, manifest.dtype),
    }
    name = index_path(Path(entry.path)).as_posix()
    for what, (found, expected) in pairs.items():
        if found != expected:
            message = (
                f"{place.path(name)} says {what} {found}, {MANIFEST} says {expected}; "
                "restore both from a copy of the dataset"
            )
            yield Problem(name, None, message)


def _stray_files(place: Place, manifest: Manifest) -> Iterator[Problem]:
    if not isinstance(place, Folder):
        # A URL cannot always be listed, and nobody reads what is not in the manifest.
        return
    dataset = place.folder
    listed = {entry.path for entry in manifest.shards}
    listed |= {index_path(Path(name)).as_posix() for name in listed}
    for split in ("train", "val"):
        for path in sorted((dataset / split).glob("*/*")):
            name = path.relative_to(dataset).as_posix()
            if name not in listed and name.endswith((".tar", ".idx.json")):
                message = f"{path} is not in the manifest; no reader looks at it, remove it"
                yield Problem(name, None, message)
