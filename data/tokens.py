"""One source of a dataset as one long array of tokens, read by `os.pread` in exact ranges.

A chunk is read whole the first time it is touched: its xxh3 and its largest id are checked, and it
stays in memory for a while (data/kept.py). Later reads take their range from there or straight from
the file; what files there are, here or in the cache of what comes from elsewhere, is its place's
business. A read may cross chunks and shards. Not for use by several threads at once; a copy sent to
another process opens its own files.
Memory: chunks, 1,024 parsed indexes and 8 bytes per shard; 128 open files.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.arrays import check_lens, check_tokens, read_exactly
from data.config import AccessError, DataError, DataUsageError
from data.kept import KeptChunks
from data.manifest import Manifest, read_table
from data.places import Kind, Place, place_of
from data.recent import Recent
from data.shard_index import ShardIndex, index_of, index_path, read_names

MAX_INDEXES = 1024
MAX_FILES = 128
_WHOLE = -1
"""In the place of a chunk: all of a shard."""


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

    def __init__(
        self,
        dataset: Path | Place,
        manifest: Manifest,
        split: str,
        source: str,
        *,
        kept: KeptChunks | None = None,
    ) -> None:
        """`kept` is shared by the sources that one process reads."""
        self.name = source
        self._kept = kept or KeptChunks()
        self._id = f"{dataset} {split}/{source}"
        self._place = place_of(dataset)
        self._table_sha256 = manifest.table_sha256
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
        damaged: dict[int, str] | None = None,
    ) -> None:
        """Row places[i] becomes the tokens from starts[i] on. Errors as of `read`.

        With `damaged`, a row that touches a damaged chunk is zeros instead, and its place is
        entered there with what is damaged. Chunks are checked as a whole before any of them is
        used, so which rows that are depends on the files alone: not on who reads what, or in which
        order. What cannot be read for another reason is an error all the same.
        """
        length = rows.shape[1]
        for start, place in zip(starts, places, strict=True):
            try:
                shard, number, first, room = self._find(start)
                if room >= length:
                    rows[place] = self._read_chunk(shard, number, first, first + length)
                else:
                    rows[place] = self.read(start, start + length)
            except AccessError:
                raise
            except DataError as error:
                if damaged is None:
                    raise
                rows[place], damaged[place] = 0, str(error)

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Tokens [start, stop), uint32. DataError naming shard and chunk when they are damaged."""
        assert 0 <= start < stop <= self.num_tokens, "a range inside the source"
        parts = [
            self._read_chunk(shard, chunk, first, last)
            for shard, chunk, first, last in self._pieces(start, stop)
        ]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.astype(np.uint32)

    def shard_of(self, token: int) -> str:
        """Shard path of a token, by the manifest alone."""
        return self._path(bisect_right(self._ends, token))

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
                lens = self._lens(row, at)
                start += int(index.starts[at]) + int(lens[:left].sum())
                return start, start + int(lens[left])
            left -= chunk.documents
        held = sum(chunk.documents for chunk in index.chunks)
        raise DataUsageError(f"{shard} holds documents 0 to {held - 1}, and no document {number}")

    def documents(self, start: int, stop: int) -> Iterator[Document]:
        """The documents, whole or in part, that make up tokens [start, stop), in order."""
        for shard, number, first, last in self._pieces(start, stop):
            before = sum(c.documents for c in self._index(shard).chunks[:number])
            lens, names = self._lens(shard, number), self._names(shard, number)
            begin = 0
            for i, length in enumerate(lens.tolist()):
                low, high = max(begin, first), min(begin + length, last)
                if low < high:
                    name = names[i] if names else None
                    yield Document(self._path(shard), before + i, low - begin, high - low, name)
                begin += length

    def __getstate__(self) -> dict[str, Any]:
        own = ("_files", "_indexes", "_checked", "_bad", "_table")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._files: Recent[tuple[int, int, Kind], int] = Recent(MAX_FILES, drop=os.close)
        self._indexes: Recent[int, _Index] = Recent(MAX_INDEXES)
        self._checked: dict[int, bytearray] = {}
        self._bad: dict[tuple[int, int], str] = {}

    @cached_property
    def _table(self) -> NDArray[np.void]:
        """Opened when it is first needed: by then a loader process can tell what is wrong."""
        return read_table(self._place, self._table_sha256)

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
        key = (self._id, shard, number)
        whole = self._kept.get(key)
        if whole is not None:
            return whole[first:last]
        index = self._index(shard)
        chunk = index.located[number]
        checked = self._checked.get(shard)
        if checked is None:
            checked = self._checked[shard] = bytearray(len(index.chunks))
        if not checked[number]:
            self._refuse_bad(shard, number)
            self.bytes_read += chunk.tokens * self._dtype.itemsize
            with self._noting(shard, number):
                file = self._file(shard, number, "tokens")
                whole = check_tokens(file, index.shard, chunk, self._dtype, self._vocab_size)
            checked[number] = 1
            if whole is not None:
                self._kept.add(key, whole)
                return whole[first:last]
        width = self._dtype.itemsize
        offset = chunk.tokens_offset + first * width
        self.bytes_read += (last - first) * width
        file = self._file(shard, number, "tokens")
        raw = read_exactly(file, index.shard, chunk, offset, (last - first) * width)
        return np.frombuffer(raw, dtype=self._dtype)

    def _refuse_bad(self, shard: int, number: int) -> None:
        """Damage is read once: the second time it is known."""
        if (shard, number) in self._bad:
            raise DataError(self._bad[shard, number])

    @contextmanager
    def _noting(self, shard: int, number: int) -> Iterator[None]:
        """Remember damage that is found in the block."""
        try:
            yield
        except AccessError:
            raise
        except DataError as error:
            self._bad[shard, number] = str(error)
            raise

    def _path(self, shard: int) -> str:
        return bytes(self._table[self._row + shard]["path"]).decode()

    def _index(self, shard: int) -> _Index:
        return self._indexes.get(shard, self._open_index)

    def _open_index(self, shard: int) -> _Index:
        self._refuse_bad(shard, _WHOLE)
        row, name = self._table[self._row + shard], self._path(shard)
        with self._noting(shard, _WHOLE):
            index = index_of(self._place, name, row["idx_sha256"].tobytes().hex())
            expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
            if index.tokens != expected:
                path = self._place.path(index_path(Path(name)).as_posix())
                raise DataError(
                    f"{path} lists {index.tokens} tokens, the manifest {expected}: one of them was "
                    "edited; restore both from a copy of the dataset"
                )
        return _Index(self._place.path(name), index, alone=self._place.by_chunk)

    def _lens(self, shard: int, number: int) -> NDArray[Any]:
        """The document lengths of a chunk."""
        index = self._index(shard)
        return check_lens(self._file(shard, number, "lens"), index.shard, index.located[number])

    def _names(self, shard: int, number: int) -> list[str] | None:
        """The ids of a chunk's documents; None where none are kept."""
        index = self._index(shard)
        if index.chunks[number].ids_offset is None:
            return None
        return read_names(self._file(shard, number, "ids"), index.shard, index.located[number])

    def _file(self, shard: int, number: int, kind: Kind) -> int:
        key = (shard, number, kind) if self._place.by_chunk else _whole(shard)
        file = self._files.get(key, self._open_file)
        return file

    def _open_file(self, key: tuple[int, int, Kind]) -> int:
        shard, number, kind = key
        index = self._index(shard)
        array = index.index.chunks[max(number, 0)].array(
            kind, shard=self._path(shard), number=number, index=index.index
        )
        checked = self._checked.get(shard)
        trusted = checked is not None and number != _WHOLE and bool(checked[number])
        return self._place.open_array(array, trusted=trusted and kind == "tokens")


@lru_cache(maxsize=MAX_INDEXES)
def _whole(shard: int) -> tuple[int, int, Kind]:
    return shard, _WHOLE, "tokens"


class _Index:
    """The chunks of a shard with their places in its tokens."""

    def __init__(self, shard: str, index: ShardIndex, *, alone: bool) -> None:
        self.shard = shard
        self.index = index
        self.chunks = index.chunks
        self.located = tuple(chunk.alone() for chunk in index.chunks) if alone else index.chunks
        """With offsets in the files that the place opens."""
        self.ends = list(accumulate(chunk.tokens for chunk in index.chunks))
        self.starts = [0, *self.ends[:-1]]
