"""The arrays of a chunk, read from an open file and held against the hashes of their index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.config import DataError
from data.folder import damaged, read_at
from data.shard_index import Chunk

LARGEST_CACHED_CHUNK = 2**24
_PIECE_BYTES = 2**22


def check_tokens(
    file: int, path: str | Path, chunk: Chunk, dtype: np.dtype[Any], vocab_size: int
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
        raw = read_exactly(file, path, chunk, chunk.tokens_offset + at, size)
        digest.update(raw)
        tokens = np.frombuffer(raw, dtype=dtype)
        largest = max(largest, int(tokens.max()))
    if digest.hexdigest() != chunk.tokens_xxh3:
        raise DataError(damaged(path, chunk.key, "tokens"))
    if largest >= vocab_size:
        raise DataError(
            f"{path}, chunk {chunk.key}: token id {largest} is outside the vocabulary of "
            f"{vocab_size} ids; the shard was written with another tokenizer, prepare the "
            "dataset again"
        )
    return tokens if keep else None


def hash_tokens(
    file: int, path: str | Path, chunk: Chunk, dtype: np.dtype[Any], begin: int, length: int
) -> xxhash.xxh3_128:
    """The hash over `length` tokens of a chunk from `begin` on, read in pieces."""
    digest = xxhash.xxh3_128()
    offset, end = (chunk.tokens_offset + n * dtype.itemsize for n in (begin, begin + length))
    while offset < end:
        size = min(_PIECE_BYTES, end - offset)
        digest.update(read_exactly(file, path, chunk, offset, size))
        offset += size
    return digest


def check_lens(file: int, path: str | Path, chunk: Chunk) -> NDArray[Any]:
    """The document lengths of a chunk, checked. DataError naming the shard and the chunk."""
    raw = read_exactly(file, path, chunk, chunk.lens_offset, 4 * chunk.documents)
    lens = np.frombuffer(raw, dtype="<u4")
    if xxhash.xxh3_64_hexdigest(raw) != chunk.lens_xxh3 or int(lens.sum()) != chunk.tokens:
        raise DataError(damaged(path, chunk.key, "lens"))
    return lens


def read_exactly(file: int, path: str | Path, chunk: Chunk, offset: int, size: int) -> bytes:
    """Bytes of an array of a chunk. DataError when the file ends before."""
    raw = read_at(file, size, offset, path)
    while len(raw) < size:
        more = read_at(file, size - len(raw), offset + len(raw), path)
        if not more:
            raise DataError(
                f"{path}, chunk {chunk.key}: the file ends {size - len(raw)} bytes too early, it "
                "was cut while it was in use; restore the shard from a copy"
            )
        raw += more
    return raw
