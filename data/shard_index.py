"""The index of a shard: where the arrays of its chunks lie in the tar, how long they are, their
hashes.

shard-000000.idx.json is sealed and small, and read lazily; its sha256 is in the manifest. What it
says of an array is all that a reader asks a place for (data/places.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import Field, TypeAdapter, ValidationError

from data.config import DataError
from data.durable import parsed, unsealed
from data.folder import Array, Folder, Kind, damaged, read_at
from data.manifest import Dtype, Sha256
from data.names import names_of
from data.places import Place

INDEX_FORMAT = "headrace-shard-index"
INDEX_VERSION = 1

Count = Annotated[int, Field(strict=True, ge=0, lt=2**48)]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


@dataclass(frozen=True)
class Chunk:
    """One chunk of a shard. Offsets are of the first array element, in bytes of the tar."""

    key: str
    documents: Count
    tokens: Count
    lens_offset: Count
    tokens_offset: Count
    lens_xxh3: Xxh3
    tokens_xxh3: Xxh3
    ids_offset: Count | None = None
    """Of the document ids; None, like what follows, where the shard keeps none."""
    ids_bytes: Count = 0
    ids_xxh3: Xxh3 | None = None

    def to_json(self) -> dict[str, Any]:
        """As in the index: shards without document ids have the index that they always had."""
        ids = ("ids_offset", "ids_bytes", "ids_xxh3")
        has_ids = self.ids_offset is not None
        return {key: value for key, value in vars(self).items() if has_ids or key not in ids}

    def array(self, kind: Kind, *, shard: str, number: int, index: ShardIndex) -> Array:
        """One of its arrays, as a place is asked for it."""
        start, num_bytes, xxh3 = {
            "tokens": (
                self.tokens_offset,
                self.tokens * np.dtype(index.dtype).itemsize,
                self.tokens_xxh3,
            ),
            "lens": (self.lens_offset, 4 * self.documents, self.lens_xxh3),
            "ids": (self.ids_offset or 0, self.ids_bytes, self.ids_xxh3 or ""),
        }[kind]
        return Array(
            shard=shard,
            shard_bytes=index.bytes,
            shard_sha256=index.tar_sha256,
            number=number,
            key=self.key,
            kind=kind,
            start=start,
            num_bytes=num_bytes,
            xxh3=xxh3,
        )

    def alone(self) -> Chunk:
        """The chunk where each of its arrays is a file of its own."""
        ids_offset = None if self.ids_offset is None else 0
        return replace(self, lens_offset=0, tokens_offset=0, ids_offset=ids_offset)


@dataclass(frozen=True)
class ShardIndex:
    """The content of an index file."""

    dtype: Dtype
    bytes: Count
    tar_sha256: Sha256
    """By which the cache of what comes from elsewhere names its files."""
    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the shard."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def documents(self) -> int:
        """Documents of the shard."""
        return sum(chunk.documents for chunk in self.chunks)


_INDEX = TypeAdapter(ShardIndex)


def index_path(shard: Path) -> Path:
    """shard-000000.tar -> shard-000000.idx.json"""
    return shard.with_suffix(".idx.json")


def read_index(path: Path, *, sha256: str | None = None) -> ShardIndex:
    """The index of a shard. DataError when it is missing, damaged, or has another sha256."""
    with Folder(path.parent).open(path.name, "") as file:
        return _index_from(file.read(), str(path), sha256)


def index_of(place: Place, shard: str, sha256: str, *, original: bool = False) -> ShardIndex:
    """The index of a shard of a dataset, wherever that is, and no copy if `original`; as
    `read_index`.
    """
    name = index_path(Path(shard)).as_posix()
    with place.open(name, sha256, original=original) as file:
        return _index_from(file.read(), place.path(name), sha256)


def _index_from(raw: bytes, path: str, sha256: str | None) -> ShardIndex:
    found = parsed(unsealed(raw, path), path)
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(
            f"{path} is an intact index, but not the one that the manifest lists; "
            "restore it from a copy of this dataset"
        )
    if (found.get("format"), found.get("version")) != (INDEX_FORMAT, INDEX_VERSION):
        raise DataError(
            f"{path} is no shard index that this headrace reads: "
            f"format {found.get('format')!r}, version {found.get('version')!r}"
        )
    try:
        return _INDEX.validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{path} holds what no headrace writes: {'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}; restore it from a copy of this dataset"
        ) from None


def read_names(file: int, path: str | Path, chunk: Chunk) -> list[str] | None:
    """The id of every document of a chunk, checked; None where the shard keeps none.

    DataError naming the shard and the chunk.
    """
    if chunk.ids_offset is None:
        return None
    raw = read_at(file, chunk.ids_bytes, chunk.ids_offset, path)
    if xxhash.xxh3_64_hexdigest(raw) != chunk.ids_xxh3:
        raise DataError(damaged(path, chunk.key, "ids"))
    return names_of(raw)
