"""Token shards v1: a tar that WebDataset and `tar` read, and an index that makes it addressable.

    shard-000000.tar        000000-00000.lens.npy (<u4 document lengths), 000000-00000.tokens.npy
                            and, only where ids are kept, 000000-00000.ids.txt (data/names.py)
    shard-000000.idx.json   per chunk: where its arrays lie, counts, xxh3; sha256 of the tar

A chunk holds whole documents, at least 1 Mi tokens but for the last one. Equal documents make equal
bytes (mtime 0, no owner). A shard appears under its name only when it is whole; its
index follows and makes it finished. Memory: one chunk plus one document.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.config import DataError
from data.durable import file_sha256, publish, write_sealed, writing
from data.manifest import Dtype, ShardEntry
from data.names import lines_of
from data.shard_index import (
    INDEX_FORMAT,
    INDEX_VERSION,
    Chunk,
    ShardIndex,
    index_path,
    read_index,
)

CHUNK_TOKENS = 2**20


@dataclass(frozen=True)
class Named:
    """A document with the id that is kept beside its tokens."""

    ids: NDArray[Any]
    name: str


def write_shard(
    path: Path,
    documents: Iterable[NDArray[Any]] | Iterable[Named],
    dtype: Dtype,
    vouch: Callable[[str], None] = lambda sha256: None,
) -> ShardEntry:
    """Write one shard DATASET/SPLIT/SOURCE/shard-NNNNNN.tar and then its index.

    A kill leaves no shard, or a shard without index, which the next call replaces. `vouch` is
    called with the sha256 of the whole tar before that has its name. DataError when an id does not
    fit `dtype` or there is no document.
    """
    shard = _OpenShard(path, dtype)
    try:
        for document in documents:
            if isinstance(document, Named):
                shard.add(document.ids, document.name)
            else:
                shard.add(document)
        return shard.close(vouch)
    except BaseException:
        shard.abandon()
        raise


def finished_shard(path: Path) -> ShardEntry | None:
    """The entry of a shard that was written before, after reading all of it; None when it must be
    written (again).
    """
    try:
        index = read_index(index_path(path))
        if path.stat().st_size != index.bytes or file_sha256(path) != index.tar_sha256:
            return None
    except (DataError, OSError):
        return None
    return _entry(path, index, file_sha256(index_path(path)))


class _OpenShard:
    """A shard while it is written, under a temporary name."""

    def __init__(self, path: Path, dtype: Dtype) -> None:
        # Imported here: webdataset imports torch, which neither readers nor a login node need.
        from webdataset.writer import TarWriter

        with writing(path):
            # An index of an earlier attempt must not vouch for the new tar.
            index_path(path).unlink(missing_ok=True)
        self._path = path
        self._dtype = dtype
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = _HashingFile(self._temporary)
        self._tar = TarWriter(
            cast(BinaryIO, self._file), encoder=False, mtime=0, user="", group="", mode=0o444
        )
        self._documents: list[NDArray[Any]] = []
        self._names: list[str] = []
        self._buffered = 0
        self._chunks: list[Chunk] = []
        self.token_bytes = 0

    def add(self, ids: NDArray[Any], name: str | None = None) -> None:
        assert ids.ndim == 1 and len(ids) > 0, "a document holds at least its end-of-text id"
        limit = np.iinfo(self._dtype).max
        if int(ids.min()) < 0 or int(ids.max()) > limit:
            raise DataError(
                f"{self._path}: a document holds token id {int(ids.max())}, but ids of type "
                f"{self._dtype} reach from 0 to {limit}; is this the dataset's tokenizer?"
            )
        self._documents.append(ids.astype(self._dtype))
        if name is not None:
            self._names.append(name)
        self._buffered += len(ids)
        self.token_bytes += len(ids) * np.dtype(self._dtype).itemsize
        if self._buffered >= CHUNK_TOKENS:
            self._write_chunk()

    def close(self, vouch: Callable[[str], None]) -> ShardEntry:
        if self._documents:
            self._write_chunk()
        self._tar.close()
        self._file.close()
        if not self._chunks:
            raise DataError(f"{self._path}: a shard needs at least one document, there was none")
        index = ShardIndex(
            dtype=self._dtype,
            bytes=self._temporary.stat().st_size,
            tar_sha256=self._file.sha256.hexdigest(),
            chunks=self._chunks_with_offsets(),
        )
        vouch(index.tar_sha256)
        publish(self._temporary, self._path)
        content = {
            "format": INDEX_FORMAT,
            "version": INDEX_VERSION,
            "dtype": index.dtype,
            "bytes": index.bytes,
            "tar_sha256": index.tar_sha256,
            "chunks": [chunk.to_json() for chunk in index.chunks],
        }
        return _entry(self._path, index, write_sealed(index_path(self._path), content))

    def abandon(self) -> None:
        self._file.abandon()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _write_chunk(self) -> None:
        lens = np.array([len(ids) for ids in self._documents], dtype="<u4")
        tokens = np.concatenate(self._documents)
        key = f"{self._path.stem.rpartition('-')[2]}-{len(self._chunks):05d}"
        members: dict[str, Any] = {"lens.npy": _npy(lens), "tokens.npy": _npy(tokens)}
        assert len(self._names) in (0, len(lens)), "all documents of a shard have an id, or none"
        if self._names:
            members["ids.txt"] = lines_of(self._names)
        self._tar.write({"__key__": key, **members})
        self._chunks.append(
            Chunk(
                key=key,
                documents=len(lens),
                tokens=len(tokens),
                lens_offset=-1,
                tokens_offset=-1,
                lens_xxh3=xxhash.xxh3_64_hexdigest(lens.tobytes()),
                tokens_xxh3=xxhash.xxh3_64_hexdigest(tokens.tobytes()),
                **(_ids_entry(members["ids.txt"]) if self._names else {}),
            )
        )
        self._documents, self._names = [], []
        self._buffered = 0

    def _chunks_with_offsets(self) -> tuple[Chunk, ...]:
        """The offsets as a reader of tar files finds them, so that no layout is assumed here."""
        with tarfile.open(self._temporary, "r:") as tar:
            end = {member.name: member.offset_data + member.size for member in tar}
        width = np.dtype(self._dtype).itemsize
        return tuple(
            Chunk(
                **{
                    **vars(chunk),
                    "ids_offset": None
                    if chunk.ids_offset is None
                    else end[f"{chunk.key}.ids.txt"] - chunk.ids_bytes,
                    "lens_offset": end[f"{chunk.key}.lens.npy"] - 4 * chunk.documents,
                    "tokens_offset": end[f"{chunk.key}.tokens.npy"] - width * chunk.tokens,
                }
            )
            for chunk in self._chunks
        )


class _HashingFile:
    """A file that is only written, with the sha256 of what was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        self._is_abandoned = False
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        if self._is_abandoned:
            # tarfile ends its archive when it is collected, wherever that may go.
            return len(data)
        self.sha256.update(data)
        with writing(self._path):
            return self._file.write(data)

    def close(self) -> None:
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        self._is_abandoned = True
        # A full disk refuses what is still buffered once more.
        with suppress(OSError):
            self._file.close()


def _ids_entry(lines: bytes) -> dict[str, Any]:
    digest = xxhash.xxh3_64_hexdigest(lines)
    return {"ids_offset": -1, "ids_bytes": len(lines), "ids_xxh3": digest}


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _entry(path: Path, index: ShardIndex, idx_sha256: str) -> ShardEntry:
    return ShardEntry(
        path="/".join(path.parts[-3:]),
        bytes=index.bytes,
        sha256=index.tar_sha256,
        idx_sha256=idx_sha256,
        tokens=index.tokens,
        documents=index.documents,
    )
