"""One source of a dataset as one long array of tokens, read by `os.pread` in exact ranges.

A chunk is read whole the first time it is touched: its xxh3 and its largest id are checked, and it
stays in a bounded cache. Later reads take their range from the cache or straight from the file. A
read may cross chunks and shards. Not for use by several threads at once; a copy sent to another
process opens its own files.
Memory: 64 MiB of chunks, 1,024 parsed indexes and 8 bytes per shard; 128 open files.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.config import DataError, DataUsageError
from data.manifest import Manifest, read_table
from data.recent import Recent
from data.shards import Chunk, ShardIndex, index_path, read_index, read_names

CACHE_BYTES = 2**26
LARGEST_CACHED_CHUNK = 2**24
MAX_INDEXES = 1024
MAX_FILES = 128
_PIECE_BYTES = 2**22


@dataclass(frozen=True)
class Document:
    """A document, or the part of it that lies in a range of tokens."""

    shard: str
    """SPLIT/SOURCE/FILE, relative to the dataset."""
    number: int
    """Position of the document in its shard."""
    first_token: int
    """Where the part begins, counted from the start of the document."""
    num_tokens: int
    id: str | None = None
    """What its input called it; None where the dataset keeps no ids."""


class TokenSource:
    """The tokens of one source of one split, shard after shard in manifest order."""

    def __init__(self, dataset: Path, manifest: Manifest, split: str, source: str) -> None:
        self.name = source
        self._dataset = dataset
        self._vocab_size = manifest.vocab_size
        self._dtype = np.dtype(manifest.dtype)
        shards = manifest.source_shards(split, source)
        self._row = manifest.shards.index(shards[0])
        # bisect in a plain array takes a fifth of numpy's searchsorted for one value.
        self._ends = array("q", accumulate(entry.tokens for entry in shards))
        self.bytes_read = 0
        """Bytes of tokens that were asked of files."""
        self._reset()

    @property
    def num_tokens(self) -> int:
        """Tokens of the source."""
        return self._ends[-1]

    def read_rows(
        self,
        starts: Sequence[int],
        rows: NDArray[np.uint32],
        places: Sequence[int],
        damaged: NDArray[np.bool_] | None = None,
    ) -> None:
        """Row places[i] becomes the tokens from starts[i] on. Errors as of `read`.

        With `damaged`, a row that touches a damaged chunk is zeros and marked there instead. Chunks
        are checked as a whole before any of them is used, so which rows that are depends on the
        files alone: not on who reads what, or in which order.
        """
        length = rows.shape[1]
        for start, place in zip(starts, places, strict=True):
            try:
                shard, number, first, room = self._find(start)
                if room >= length:
                    rows[place] = self._read_chunk(shard, number, first, first + length)
                else:
                    rows[place] = self.read(start, start + length)
            except DataError:
                if damaged is None:
                    raise
                rows[place], damaged[place] = 0, True

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Tokens [start, stop), uint32. DataError naming shard and chunk when they are damaged."""
        assert 0 <= start < stop <= self.num_tokens, "a range inside the source"
        parts = [
            self._read_chunk(shard, chunk, first, last)
            for shard, chunk, first, last in self._pieces(start, stop)
        ]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.astype(np.uint32)

    def place(self, token: int) -> tuple[str, str, int]:
        """Shard path, chunk key and token offset inside the shard of a token."""
        shard, number, first, _ = self._find(token)
        index = self._index(shard)
        return self._path(shard), index.chunks[number].key, index.starts[number] + first

    def has_shard(self, shard: str) -> bool:
        """Whether a shard (SPLIT/SOURCE/FILE) is one of this source."""
        return shard in map(self._path, range(len(self._ends)))

    def document_range(self, shard: str, number: int) -> tuple[int, int]:
        """Tokens [start, stop) of a document of a shard. DataUsageError when it has no such one."""
        row = [self._path(i) for i in range(len(self._ends))].index(shard)
        start = int(self._ends[row - 1]) if row else 0
        index, left = self._index(row), number
        for at, chunk in enumerate(index.chunks):
            if 0 <= left < chunk.documents:
                lens = check_lens(self._file(row), self._dataset / shard, chunk)
                start += int(index.starts[at]) + int(lens[:left].sum())
                return start, start + int(lens[left])
            left -= chunk.documents
        held = sum(chunk.documents for chunk in index.chunks)
        raise DataUsageError(f"{shard} holds documents 0 to {held - 1}, and no document {number}")

    def documents(self, start: int, stop: int) -> Iterator[Document]:
        """The documents, whole or in part, that make up tokens [start, stop), in order."""
        for shard, number, first, last in self._pieces(start, stop):
            index = self._index(shard)
            chunk = index.chunks[number]
            before = sum(c.documents for c in index.chunks[:number])
            lens = check_lens(self._file(shard), self._dataset / self._path(shard), chunk)
            names = read_names(self._file(shard), self._dataset / self._path(shard), chunk)
            begin = 0
            for i, length in enumerate(lens.tolist()):
                low, high = max(begin, first), min(begin + length, last)
                if low < high:
                    name = names[i] if names else None
                    yield Document(self._path(shard), before + i, low - begin, high - low, name)
                begin += length

    def __getstate__(self) -> dict[str, Any]:
        own = ("_cache", "_files", "_indexes", "_checked", "_bad", "_table")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._table = read_table(self._dataset)
        self._cache: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._cached_bytes = 0
        self._files: Recent[int] = Recent(MAX_FILES, drop=os.close)
        self._indexes: Recent[_Index] = Recent(MAX_INDEXES)
        self._checked: dict[int, bytearray] = {}
        self._bad: dict[tuple[int, int], str] = {}

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, chunk, first, last) of each piece, the tokens counted inside the chunk."""
        while start < stop:
            shard, number, first, room = self._find(start)
            size = min(stop - start, room)
            yield shard, number, first, first + size
            start += size

    def _find(self, token: int) -> tuple[int, int, int, int]:
        """Shard, chunk, place inside the chunk, and how many tokens the chunk has from there."""
        shard = bisect_right(self._ends, token)
        inside = token - (self._ends[shard - 1] if shard else 0)
        index = self._index(shard)
        number = bisect_right(index.ends, inside)
        return shard, number, inside - index.starts[number], index.ends[number] - inside

    def _read_chunk(self, shard: int, number: int, first: int, last: int) -> NDArray[Any]:
        whole = self._cache.get((shard, number))
        if whole is not None:
            self._cache.move_to_end((shard, number))
            return whole[first:last]
        index, file = self._index(shard), self._file(shard)
        chunk = index.chunks[number]
        checked = self._checked.get(shard)
        if checked is None:
            checked = self._checked[shard] = bytearray(len(index.chunks))
        if not checked[number]:
            if (shard, number) in self._bad:
                raise DataError(self._bad[shard, number])
            self.bytes_read += chunk.tokens * self._dtype.itemsize
            try:
                whole = check_tokens(file, index.shard, chunk, self._dtype, self._vocab_size)
            except DataError as error:
                self._bad[shard, number] = str(error)
                raise
            checked[number] = 1
            if whole is not None:
                self._remember((shard, number), whole)
                return whole[first:last]
        width = self._dtype.itemsize
        offset = chunk.tokens_offset + first * width
        self.bytes_read += (last - first) * width
        raw = _read_exactly(file, index.shard, chunk, offset, (last - first) * width)
        return np.frombuffer(raw, dtype=self._dtype)

    def _remember(self, place: tuple[int, int], tokens: NDArray[Any]) -> None:
        self._cache[place] = tokens
        self._cached_bytes += tokens.nbytes
        while self._cached_bytes > CACHE_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.nbytes

    def _path(self, shard: int) -> str:
        return bytes(self._table[self._row + shard]["path"]).decode()

    def _index(self, shard: int) -> _Index:
        return self._indexes.get(shard, self._open_index)

    def _file(self, shard: int) -> int:
        return self._files.get(shard, self._open_file)

    def _open_index(self, shard: int) -> _Index:
        row = self._table[self._row + shard]
        tar = self._dataset / self._path(shard)
        path = index_path(tar)
        index = read_index(path, sha256=row["idx_sha256"].tobytes().hex())
        expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        if index.tokens != expected:
            raise DataError(
                f"{path} lists {index.tokens} tokens, the manifest {expected}: one of them was "
                "edited; restore both from a copy of the dataset"
            )
        return _Index(tar, index)

    def _open_file(self, shard: int) -> int:
        path = self._dataset / self._path(shard)
        return open_shard(path, int(self._table[self._row + shard]["bytes"]))


class _Index:
    """The chunks of a shard with their places in its tokens."""

    def __init__(self, shard: Path, index: ShardIndex) -> None:
        self.shard = shard
        self.chunks = index.chunks
        self.ends = list(accumulate(chunk.tokens for chunk in index.chunks))
        self.starts = [0, *self.ends[:-1]]


def open_shard(path: Path, num_bytes: int) -> int:
    """A file descriptor of a shard. DataError when it is missing or not `num_bytes` long."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; restore it from a copy of the dataset"
        ) from error
    found = os.fstat(descriptor).st_size
    if found != num_bytes:
        os.close(descriptor)
        raise DataError(
            f"{path} is damaged: {found} bytes, the manifest says {num_bytes}; restore it from a "
            "copy of the dataset, and run `headrace data verify --full` to see what else is"
        )
    return descriptor


def check_tokens(
    file: int, path: Path, chunk: Chunk, dtype: np.dtype[Any], vocab_size: int
) -> NDArray[Any] | None:
    """Read the tokens of a chunk once and check hash and ids; None when too many to keep in memory.

    DataError naming the shard and the chunk.
    """
    num_bytes = chunk.tokens * dtype.itemsize
    keep = num_bytes <= LARGEST_CACHED_CHUNK
    piece_bytes = num_bytes if keep else _PIECE_BYTES
    digest = xxhash.xxh3_64()
    tokens: NDArray[Any] = np.empty(0, dtype=dtype)
    largest = 0
    for at in range(0, num_bytes, piece_bytes):
        size = min(piece_bytes, num_bytes - at)
        raw = _read_exactly(file, path, chunk, chunk.tokens_offset + at, size)
        digest.update(raw)
        tokens = np.frombuffer(raw, dtype=dtype)
        largest = max(largest, int(tokens.max()))
    if digest.hexdigest() != chunk.tokens_xxh3:
        raise DataError(_damaged(path, chunk, "tokens"))
    if largest >= vocab_size:
        raise DataError(
            f"{path}, chunk {chunk.key}: token id {largest} is outside the vocabulary of "
            f"{vocab_size} ids; the shard was written with another tokenizer, prepare the "
            "dataset again"
        )
    return tokens if keep else None


def hash_tokens(
    file: int, path: Path, chunk: Chunk, dtype: np.dtype[Any], begin: int, length: int
) -> xxhash.xxh3_128:
    """The hash over `length` tokens of a chunk from `begin` on, read in pieces."""
    digest = xxhash.xxh3_128()
    offset, end = (chunk.tokens_offset + n * dtype.itemsize for n in (begin, begin + length))
    while offset < end:
        size = min(_PIECE_BYTES, end - offset)
        digest.update(_read_exactly(file, path, chunk, offset, size))
        offset += size
    return digest


def check_lens(file: int, path: Path, chunk: Chunk) -> NDArray[Any]:
    """The document lengths of a chunk, checked. DataError naming the shard and the chunk."""
    raw = _read_exactly(file, path, chunk, chunk.lens_offset, 4 * chunk.documents)
    lens = np.frombuffer(raw, dtype="<u4")
    if xxhash.xxh3_64_hexdigest(raw) != chunk.lens_xxh3 or int(lens.sum()) != chunk.tokens:
        raise DataError(_damaged(path, chunk, "document lengths"))
    return lens


def _read_exactly(file: int, path: Path, chunk: Chunk, offset: int, size: int) -> bytes:
    raw = os.pread(file, size, offset)
    while len(raw) < size:
        more = os.pread(file, size - len(raw), offset + len(raw))
        if not more:
            raise DataError(
                f"{path}, chunk {chunk.key}: the file ends {size - len(raw)} bytes too early, it "
                "was cut while it was in use; restore the shard from a copy"
            )
        raw += more
    return raw


def _damaged(path: Path, chunk: Chunk, array: str) -> str:
    return (
        f"{path}, chunk {chunk.key}: its {array} are damaged (xxh3 differs from the index); "
        "restore the shard from a copy, and run `headrace data verify --full` on the dataset to "
        "see what else is"
    )
