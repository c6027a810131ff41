"""Words of a text and hashes of n words in a row: what near duplicates and overlaps are counted in.

A word is a run of letters and digits, case folded; a Chinese, Japanese or Korean character is a
word of its own, because nothing separates words there. Hashes depend on the words alone. Cost:
about 1 s per 15 MB. Memory: about 20 times the text.
"""

from __future__ import annotations

import re

import numpy as np
import xxhash
from numpy.typing import NDArray

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)


def words_of(text: str) -> list[str]:
    """The words of a text in order."""
    return _WORD.findall(text.casefold())


def word_hashes(words: list[str]) -> NDArray[np.uint64]:
    """64 bits for each word; words hold no space."""
    if not words:
        return np.zeros(0, np.uint64)
    # Encoded at once: as fast again as word by word.
    encoded = " ".join(words).encode().split(b" ")
    return np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(words))


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """64 bits for each run of `n` words, by the hashes of the words; none in a shorter text."""
    count = len(words) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    combined = np.zeros(count, np.uint64)
    for place in range(n):
        combined = combined * _FACTOR + words[place : place + count]
    # The sum alone is linear in the words; the multiplication and shift make all bits depend on it.
    combined = (combined ^ (combined >> _SHIFT)) * _MIX
    return combined ^ (combined >> _SHIFT)
