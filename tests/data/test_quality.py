"""Every published rule has a document that it drops and a neighbour that it keeps."""

from __future__ import annotations

import random

import pytest

from data.quality import MAX_WORDS, broken_rule
from data.words import ngram_hashes, word_hashes
from tests.data.texts import prose


def plain(count: int, seed: int = 0) -> list[str]:
    """Words of which none repeats, but for two stop words."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = {"".join(rng.choices(letters, k=5)) for _ in range(2 * count)}
    return ["the", "with", *sorted(words)[: count - 2]]


def text(words: list[str]) -> str:
    return " ".join(words)


def lines(words: list[str], per_line: int = 10, start: str = "", end: str = "") -> str:
    rows = [words[i : i + per_line] for i in range(0, len(words), per_line)]
    return "\n".join(f"{start}{' '.join(row)}{end}" for row in rows)


CASES = [
    ("C4: curly bracket", text([*plain(60), "{"]), text([*plain(60), "("])),
    ("C4: lorem ipsum", text([*plain(60), "Lorem", "Ipsum"]), text([*plain(60), "lorem", "et"])),
    ("Gopher: under 50 words", text(plain(49)), text(plain(50))),
    (
        f"Gopher: over {MAX_WORDS} words",
        text(plain(MAX_WORDS + 1)),
        text(plain(MAX_WORDS)),
    ),
    (
        "Gopher: mean word length under 3",
        text(["the", "with", *"abcdefghijklmnopqrstuvwxyz" * 2]),
        text([*plain(52), *"abcdefghijklmnopqrstuvwxyz"]),
    ),
    (
        "Gopher: mean word length over 10",
        text([word * 3 for word in plain(60)]),
        text([word * 2 for word in plain(60)[2:]] + ["the", "with"]),
    ),
    (
        "Gopher: hash signs over 0.1 per word",
        text([*plain(60), "#tag#tag#tag#tag#tag#tag#tag"]),
        text([*plain(60), "#tag#tag#tag#tag#tag#tag"]),
    ),
    (
        "Gopher: ellipses over 0.1 per word",
        text([w + "..." * (i < 7) for i, w in enumerate(plain(60))]),
        text([w + "..." * (i < 6) for i, w in enumerate(plain(60))]),
    ),
    (
        "Gopher: words with a letter under 0.8",
        text([*plain(48), *map(str, range(1000, 1013))]),
        text([*plain(48), *map(str, range(1000, 1012))]),
    ),
    (
        "Gopher: under 2 different stop words",
        text([*plain(60)[2:], "the", "The"]),
        text([*plain(60)[2:], "the", "That,"]),
    ),
    (
        "Gopher: lines with a bullet over 0.9",
        lines(plain(100), start="- "),
        "no bullet\n" + lines(plain(90), start="- "),
    ),
    (
        "Gopher: lines ending in an ellipsis over 0.3",
        lines(plain(80), per_line=20, end="...")[:-3] + "\n" + lines(plain(50, seed=1)),
        lines(plain(60), per_line=20, end="\u2026") + "\n" + lines(plain(70, seed=1)),
    ),
    (
        "Gopher: duplicate lines over 0.3",
        lines(plain(60)) + "\nab" * 5,
        lines(plain(60)) + "\nab" * 3,
    ),
    (
        "Gopher: characters in duplicate lines over 0.2",
        lines(plain(100), 25) + ("\n" + text(plain(40, seed=1))) * 2,
        lines(plain(140), 25) + ("\n" + text(plain(40, seed=1))) * 1,
    ),
    (
        "Gopher: duplicate paragraphs over 0.3",
        lines(plain(60), per_line=3) + "\n\nsame" * 3,
        lines(plain(60), per_line=3) + "\n\nother\n\nsame\n\nsame",
    ),
    (
        "Gopher: characters in duplicate paragraphs over 0.2",
        "\n\n".join(
            [lines(plain(16), 2), lines(plain(18, 2)[2:], 2), *["\n".join(plain(14)[2:])] * 2]
        ),
        "\n\n".join(
            [lines(plain(99), 2), lines(plain(99, 2)[2:], 2), *["\n".join(plain(14)[2:])] * 2]
        ),
    ),
    (
        "Gopher: characters in the top 2-gram over 0.2",
        text([f"{w} tall towers" for w in plain(30)]),
        text([f"{w} tall {v}" for w, v in zip(plain(30), plain(30, seed=1), strict=True)]),
    ),
    (
        "Gopher: characters in the top 3-gram over 0.18",
        text(plain(60) + [f"one two four {w}" for w in plain(9, seed=1)]),
        text(plain(60) + [f"one two four {w}" for w in plain(3, seed=1)]),
    ),
    (
        "Gopher: characters in duplicate 10-grams over 0.1",
        text(plain(100) + plain(100)[:12]),
        text(plain(200) + plain(200)[:12]),
    ),
]


@pytest.mark.parametrize(("rule", "dropped", "kept"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_drops_one_document_and_keeps_its_neighbour(
    rule: str, dropped: str, kept: str
) -> None:
    assert broken_rule(dropped) == rule
    assert broken_rule(kept) is None


def test_ordinary_prose_with_few_words_repeats_itself_too_much_and_english_does_not() -> None:
    from data import quality, split

    english = " ".join(f"{module.__doc__}" for module in (quality, split))
    assert broken_rule(english) is None
    assert broken_rule(prose(3000)[:1000] * 3) is not None


def test_ngrams_are_equal_where_the_words_are() -> None:
    rng = random.Random(1)
    words = rng.choices(["a", "bb", "ccc", "dd"], k=300)
    for n in (1, 2, 5, 13):
        hashes = ngram_hashes(word_hashes(words), n).tolist()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert len(hashes) == len(grams)
        assert len(set(hashes)) == len(set(grams)) == len(set(zip(grams, hashes, strict=True)))
    assert len(ngram_hashes(word_hashes(words[:4]), 5)) == 0
