"""Signatures by which equal and nearly equal documents are found.

near: the MinHash of a document's distinct runs of 5 words (Broder 1997), 120 values by rensa, in 20
bands of 6. Documents that agree in a band are compared, and are near duplicates where at least 75 %
of all values agree. With a Jaccard similarity of 0.9 a pair misses every band with a chance of
3e-7 and falls below the 75 % with one of 6e-7; at 0.8 it is found in 9 of 10 cases, at 0.7 in 1 of
8, at 0.6 in 1 of 2,500, at 0.4 in none (under 1e-14).
exact: 128 bits of xxh3 over the text in NFC with runs of white space as one space.
Cost: near about 1 s per 15 MB (documents of 300 bytes: 8 MB), exact 1 s per 80 MB. Memory: 8
bytes per word of the texts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash

from data.words import ngram_hashes, word_hashes, words_of

SHINGLE_WORDS = 5
BANDS, ROWS = 20, 6
MIN_SHARED = 0.75
_SEED = 0
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


@dataclass(frozen=True)
class Method:
    """How documents are compared."""

    sign: Callable[[Sequence[str]], NDArray[Any]]
    """One row of values for each text."""
    bands: Callable[[NDArray[Any]], NDArray[np.uint64]]
    """One key per band for each row; documents with no key in common are not compared."""
    min_shared: float
    """Share of the values that duplicates have in common at least."""
    description: dict[str, Any]


def _sign_near(texts: Sequence[str]) -> NDArray[np.uint32]:
    shingles = [_shingles(text) for text in texts]
    ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    flat = np.concatenate([np.zeros(0, np.uint64), *shingles])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, BANDS * ROWS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), BANDS * ROWS)


def _shingles(text: str) -> NDArray[np.uint64]:
    """A text of fewer words is one shingle, and one without words is only equal to itself."""
    words = word_hashes(words_of(text))
    if len(words) == 0:
        return np.array([xxhash.xxh3_64_intdigest(text.encode())], np.uint64)
    return ngram_hashes(words, min(SHINGLE_WORDS, len(words)))


def _bands_near(signatures: NDArray[Any]) -> NDArray[np.uint64]:
    values = signatures.reshape(-1, BANDS, ROWS).astype(np.uint64)
    # The number of the band is part of its key, so that different bands do not meet.
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), values.shape[:2]).copy()
    for row in range(ROWS):
        keys = (keys ^ values[:, :, row]) * _FACTOR
        keys ^= keys >> _SHIFT
    return keys


def _sign_exact(texts: Sequence[str]) -> NDArray[np.uint64]:
    digests = (
        xxhash.xxh3_128_digest(" ".join(unicodedata.normalize("NFC", text).split()).encode())
        for text in texts
    )
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def _bands_exact(signatures: NDArray[Any]) -> NDArray[np.uint64]:
    keys: NDArray[np.uint64] = signatures[:, :1].astype(np.uint64)
    return keys


METHODS = {
    "exact": Method(_sign_exact, _bands_exact, 1.0, {"hash": "xxh3_128"}),
    "near": Method(
        _sign_near,
        _bands_near,
        MIN_SHARED,
        {
            "shingle_words": SHINGLE_WORDS,
            "bands": BANDS,
            "rows": ROWS,
            "min_shared": MIN_SHARED,
            "rensa_algorithm": RMinHash.ALGORITHM_VERSION,
        },
    ),
}
