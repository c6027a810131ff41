"""Quality rules without a model: a document is kept, or dropped for the first rule that it breaks.

Every threshold is published: Gopher's, for MassiveText (Rae et al. 2021, arXiv 2112.11446, appendix
A.1.1 and table A1), and two of C4's page rules (Raffel et al. 2020, arXiv 1910.10683, section 2.2).
They were made for English web pages: they drop source code, verse and books over 100,000 words.
A word is what white space separates. Cost: about 1 s per 3 MB. Memory: about 20 times the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from data.words import ngram_hashes, word_hashes

MIN_WORDS, MAX_WORDS = 50, 100_000
"""Gopher A.1.1: any document that does not contain between 50 and 100,000 words."""
MIN_WORD_LENGTH, MAX_WORD_LENGTH = 3, 10
"""Gopher A.1.1: or whose mean word length is outside the range of 3 to 10 characters."""
MAX_SYMBOLS = 0.1
"""Gopher A.1.1: a symbol-to-word ratio greater than 0.1 for the hash symbol or the ellipsis."""
MAX_BULLETS = 0.9
"""Gopher A.1.1: more than 90 % of lines starting with a bullet point."""
MAX_ELLIPSES = 0.3
"""Gopher A.1.1: more than 30 % of lines ending with an ellipsis."""
MIN_ALPHABETIC = 0.8
"""Gopher A.1.1: 80 % of words must contain at least one alphabetic character."""
MIN_STOP_WORDS = 2
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
"""Gopher A.1.1: at least two of these English words."""
MAX_SAME_LINES, MAX_SAME_PARAGRAPHS = 0.30, 0.30
MAX_SAME_LINE_CHARACTERS, MAX_SAME_PARAGRAPH_CHARACTERS = 0.20, 0.20
"""Gopher table A1: duplicate lines and paragraphs, by number and by characters."""
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
"""Gopher table A1: characters within the most frequent n-gram."""
MAX_SAME_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Gopher table A1: characters within duplicate n-grams. As in datatrove, which FineWeb was made
with, the first of equal lines, paragraphs and n-grams is no duplicate."""
_ELLIPSES = ("...", "\u2026")
_BULLETS = ("\u2022", "\u2023", "\u25e6", "*", "-")
_PARAGRAPH = re.compile(r"\n\s*\n")


def broken_rule(text: str) -> str | None:
    """The first rule that a document breaks, in words; None when it breaks none."""
    words = text.split()
    for rule in (_pages, _words, _lines, _repeated_lines, _repeated_ngrams):
        if (found := rule(text, words)) is not None:
            return found
    return None


Rule = Callable[[str, list[str]], str | None]


def _pages(text: str, words: list[str]) -> str | None:
    """C4: pages where the phrase "lorem ipsum" appears, or a curly bracket."""
    if "{" in text:
        return "C4: curly bracket"
    return "C4: lorem ipsum" if "lorem ipsum" in text.lower() else None


def _words(text: str, words: list[str]) -> str | None:
    if len(words) < MIN_WORDS:
        return f"Gopher: under {MIN_WORDS} words"
    if len(words) > MAX_WORDS:
        return f"Gopher: over {MAX_WORDS} words"
    mean = sum(map(len, words)) / len(words)
    if mean < MIN_WORD_LENGTH:
        return f"Gopher: mean word length under {MIN_WORD_LENGTH}"
    if mean > MAX_WORD_LENGTH:
        return f"Gopher: mean word length over {MAX_WORD_LENGTH}"
    if text.count("#") > MAX_SYMBOLS * len(words):
        return f"Gopher: hash signs over {MAX_SYMBOLS} per word"
    if sum(map(text.count, _ELLIPSES)) > MAX_SYMBOLS * len(words):
        return f"Gopher: ellipses over {MAX_SYMBOLS} per word"
    if sum(_is_alphabetic(word) for word in words) < MIN_ALPHABETIC * len(words):
        return f"Gopher: words with a letter under {MIN_ALPHABETIC}"
    stops = (word.strip(".,;:!?\"'()").lower() for word in words)
    if len(STOP_WORDS.intersection(stops)) < MIN_STOP_WORDS:
        return f"Gopher: under {MIN_STOP_WORDS} different stop words"
    return None


def _is_alphabetic(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))


def _lines(text: str, words: list[str]) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > MAX_BULLETS * len(lines):
        return f"Gopher: lines with a bullet over {MAX_BULLETS}"
    if sum(line.endswith(_ELLIPSES) for line in lines) > MAX_ELLIPSES * len(lines):
        return f"Gopher: lines ending in an ellipsis over {MAX_ELLIPSES}"
    return None


def _repeated_lines(text: str, words: list[str]) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    paragraphs = [part.strip() for part in _PARAGRAPH.split(text) if part.strip()]
    for name, units, number, characters in (
        ("lines", lines, MAX_SAME_LINES, MAX_SAME_LINE_CHARACTERS),
        ("paragraphs", paragraphs, MAX_SAME_PARAGRAPHS, MAX_SAME_PARAGRAPH_CHARACTERS),
    ):
        same, size = _repeated(units)
        if same > number * len(units):
            return f"Gopher: duplicate {name} over {number}"
        if size > characters * len(text):
            return f"Gopher: characters in duplicate {name} over {characters}"
    return None


def _repeated(units: Sequence[str]) -> tuple[int, int]:
    """How many units occurred before, and their characters."""
    seen: set[str] = set()
    number = size = 0
    for unit in units:
        if unit in seen:
            number, size = number + 1, size + len(unit)
        seen.add(unit)
    return number, size


def _repeated_ngrams(text: str, words: list[str]) -> str | None:
    hashes = word_hashes(words)
    ends = np.cumsum([0, *map(len, words)])
    total = int(ends[-1])
    for n, limit in (MAX_TOP_NGRAM | MAX_SAME_NGRAMS).items():
        _, first, counts = np.unique(ngram_hashes(hashes, n), return_index=True, return_counts=True)
        if n in MAX_TOP_NGRAM:
            if _top_characters(first, counts, ends, n) > limit * total:
                return f"Gopher: characters in the top {n}-gram over {limit}"
        elif _same_characters(first, ends, n) > limit * total:
            return f"Gopher: characters in duplicate {n}-grams over {limit}"
    return None


def _top_characters(
    first: NDArray[np.intp], counts: NDArray[np.intp], ends: NDArray[np.int64], n: int
) -> int:
    """Characters within the n-gram that occurs most often; of equals the longest."""
    if len(counts) == 0 or counts.max() == 1:
        return 0
    top = first[counts == counts.max()]
    return int((ends[top + n] - ends[top]).max() * counts.max())


def _same_characters(first: NDArray[np.intp], ends: NDArray[np.int64], n: int) -> int:
    """Characters of the words within an n-gram that occurred before, each word once."""
    num_words = len(ends) - 1
    starts = np.ones(max(0, num_words - n + 1), bool)
    starts[first] = False
    covered = np.zeros(num_words + 1, np.int64)
    covered[: len(starts)] += starts
    covered[n : n + len(starts)] -= starts
    return int(np.diff(ends)[np.cumsum(covered[:-1]) > 0].sum())
