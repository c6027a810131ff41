"""The manifest of a dataset: what it holds, proven by hashes; the commit point of a preparation.

manifest.json is written last. It and every shard index are sealed (data/durable.py), so that a
flipped bit anywhere in them is found before one value is believed. shards.npy repeats the list of
shards as a table that processes map instead of parsing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from data.config import AccessError, DataError, DataUsageError, MissingError
from data.durable import is_sealed, parsed, remove_leftovers, unsealed, write_durably, write_sealed
from data.places import MANIFEST as MANIFEST
from data.places import Place, place_of

TABLE = "shards.npy"
FORMAT = "headrace-dataset"
VERSION = 1
BLOCK_TOKENS = 2**19
"""Tokens per block of the sample order; a seq_len is at most this long."""

Dtype = Literal["<u2", "<u4"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**44)]
"""Of one shard: those of 100,000 shards add up in 64 bits."""
# split/source/file: no part may be empty or start with a dot, so no path can leave the dataset.
ShardPath = Annotated[str, Field(pattern=r"^(train|val)/[^/.\x00][^/\x00]*/[^/.\x00][^/\x00]*$")]


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One shard as the manifest lists it.

    A dataclass: as a model each of 100,000 entries would carry 1 KB of bookkeeping.
    """

    path: ShardPath
    """SPLIT/SOURCE/FILE, relative to the dataset."""
    bytes: Count
    sha256: Sha256
    idx_sha256: Sha256
    """Of the whole index file beside the shard."""
    tokens: Count
    documents: Count

    @property
    def split(self) -> str:
        """train or val."""
        return self.path.split("/")[0]

    @property
    def source(self) -> str:
        """Name of the source, part of every key of the sample order."""
        return self.path.split("/")[1]


class Manifest(BaseModel):
    """What a dataset holds. Shards are sorted by path: that is the order of a source's tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    version: int
    tokenizer_file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
    tokenizer_sha256: Sha256
    vocab_size: int
    special_ids: dict[str, int]
    dtype: Dtype
    block_tokens: int
    preparation: dict[str, Any]
    split_rule: str
    counts: dict[str, int]
    shards: tuple[ShardEntry, ...]
    table_sha256: Sha256
    fingerprint: Sha256
    """sha256 over everything that decides the samples; no path of a machine, no time."""

    def source_names(self, split: str) -> list[str]:
        """Sources of a split, sorted."""
        within = f"{split}/"
        return sorted({s.path.split("/", 2)[1] for s in self.shards if s.path.startswith(within)})

    def source_shards(self, split: str, source: str) -> tuple[ShardEntry, ...]:
        """Shards of one source in the order of their tokens."""
        within = f"{split}/{source}/"
        return tuple(s for s in self.shards if s.path.startswith(within))

    def num_tokens(self, split: str) -> int:
        """Tokens of a split over all its sources."""
        return sum(entry.tokens for entry in self.shards if entry.split == split)

    def source_fingerprint(self, split: str, source: str) -> str:
        """sha256 over what decides the samples of one source."""
        return _fingerprint(self, self.source_shards(split, source))


def dtype_for(vocab_size: int) -> Dtype:
    """The type of stored token ids: two bytes where every id fits."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_manifest(
    dataset: Path,
    shards: Iterable[ShardEntry],
    *,
    tokenizer: Path,
    vocab_size: int,
    special_ids: Mapping[str, int],
    preparation: Mapping[str, Any],
    split_rule: str,
    counts: Mapping[str, int] | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> Manifest:
    """Commit a dataset whose shards and tokenizer are on disk, and nobody else writes to. Equal
    arguments leave equal bytes, however often the work before was killed.

    `tokenizer` is the file in the dataset; `preparation` and `counts` are only recorded.
    """
    entries = tuple(sorted(shards, key=lambda entry: entry.path))
    assert entries, "a dataset has at least one shard"
    assert len({entry.path for entry in entries}) == len(entries), "a shard is listed twice"
    remove_leftovers(dataset, *{(dataset / entry.path).parent for entry in entries})
    table = _table_bytes(entries)
    write_durably(dataset / TABLE, table)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        tokenizer_file=tokenizer.name,
        tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        vocab_size=vocab_size,
        special_ids=dict(special_ids),
        dtype=dtype_for(vocab_size),
        block_tokens=block_tokens,
        preparation=dict(preparation),
        split_rule=split_rule,
        counts=dict(counts or {}),
        shards=entries,
        table_sha256=hashlib.sha256(table).hexdigest(),
        fingerprint="0" * 64,
    )
    manifest = manifest.model_copy(update={"fingerprint": _fingerprint(manifest, entries)})
    write_sealed(dataset / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def read_manifest(dataset: Path | Place) -> Manifest:
    """The manifest of a dataset, its own sha256 and that of the shard table checked.

    DataUsageError when this is no dataset, DataError when the dataset is damaged, AccessError when
    that cannot be told.
    """
    place = place_of(dataset)
    path = place.path(MANIFEST)
    raw = place.manifest()
    if not (is_sealed(raw) or FORMAT.encode() in raw):
        raise DataUsageError(_foreign_manifest(place))
    body = unsealed(raw, path)
    del raw
    refused: ValidationError | None = None
    try:
        # Straight from the text: 100,000 shards as dictionaries would take 100 MB more.
        manifest = Manifest.model_validate_json(body)
        found: Mapping[str, Any] = {"format": manifest.format, "version": manifest.version}
    except ValidationError as error:
        refused, found = error, parsed(body, path)
    if found.get("format") != FORMAT:
        raise DataUsageError(_foreign_manifest(place))
    if found.get("version") != VERSION:
        raise DataUsageError(
            f"{path} has format version {found.get('version')}, this headrace reads {VERSION}; "
            "use the headrace that wrote it, or prepare the text again"
        )
    if refused is not None:
        first = refused.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path} holds what no headrace writes: {key}: {first['msg']}; restore it from a copy"
        ) from refused
    if manifest.fingerprint != _fingerprint(manifest, manifest.shards):
        raise DataError(
            f"{path} was edited and sealed again: its fingerprint is not the one of what it lists; "
            "restore it from a copy of the dataset"
        )
    read_table(place, manifest.table_sha256)
    return manifest


def read_table(dataset: Path | Place, sha256: str) -> NDArray[np.void]:
    """The shards as a mapped table in manifest order. DataError when it is not the manifest's.

    Held against its hash whenever it is opened, through the file that is then mapped: in a loader
    process the same path may lead to another dataset by now. Cost: 83 bytes per shard are read.
    """
    place = place_of(dataset)
    try:
        with place.open(TABLE, sha256) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return _mapped(file)
    except MissingError:
        pass
    except AccessError:
        raise
    except DataError:
        pass
    raise DataError(
        f"{place.path(TABLE)} is missing or damaged (its sha256 is not the one in {MANIFEST}); "
        "restore it from a copy, or run the same `headrace prepare` into a new directory"
    )


def _mapped(file: BinaryIO) -> NDArray[np.void]:
    file.seek(0)
    version = np.lib.format.read_magic(file)
    assert version == (1, 0), "as it was written"
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    table: NDArray[np.void] = np.memmap(
        file, dtype=dtype, mode="r", offset=file.tell(), shape=shape
    )
    return table


def _foreign_manifest(place: Place) -> str:
    return (
        f"{place} is not a dataset: its {MANIFEST} was not written by `headrace prepare`; "
        "name the directory given to `headrace prepare --output`"
    )


def _fingerprint(manifest: Manifest, shards: Iterable[ShardEntry]) -> str:
    """sha256 over canonical JSON, whose long list is hashed entry by entry."""
    identity = {
        "version": VERSION,
        "tokenizer": manifest.tokenizer_sha256,
        "vocab_size": manifest.vocab_size,
        "special_ids": manifest.special_ids,
        "dtype": manifest.dtype,
        "block_tokens": manifest.block_tokens,
        "shards": [],
    }
    body = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    head, empty, tail = body.partition('"shards":[]')
    digest = hashlib.sha256((head + empty[:-1]).encode())
    comma = ""
    for place, entries in groupby(shards, key=lambda entry: entry.path.rpartition("/")[0]):
        # The source's name is part of the keys of the order, so it is content here.
        start = json.dumps(place.split("/"), separators=(",", ":"))[:-1]
        for entry in entries:
            digest.update(f'{comma}{start},"{entry.sha256}"]'.encode())
            comma = ","
    digest.update(("]" + tail).encode())
    return digest.hexdigest()


def _table_bytes(shards: tuple[ShardEntry, ...]) -> bytes:
    paths = [entry.path.encode() for entry in shards]
    table = np.zeros(
        len(shards),
        dtype=[
            ("path", f"S{max(map(len, paths))}"),
            ("bytes", "<u8"),
            ("tokens", "<u8"),
            ("documents", "<u8"),
            ("idx_sha256", "u1", (32,)),
        ],
    )
    table["path"] = paths
    for name in ("bytes", "tokens", "documents"):
        table[name] = [getattr(entry, name) for entry in shards]
    table["idx_sha256"] = [list(bytes.fromhex(entry.idx_sha256)) for entry in shards]
    file = io.BytesIO()
    np.save(file, table, allow_pickle=False)
    return file.getvalue()
