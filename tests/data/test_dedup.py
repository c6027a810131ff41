"""Duplicates are found as brute force finds them, whatever the parts, ranges and workers."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data.dedup import Kind, join_clusters, range_jobs, repeated_rows, sign, write_signatures
from data.jobs import do
from data.minhash import BANDS, METHODS, MIN_SHARED, ROWS, SHINGLE_WORDS
from data.words import words_of

ROOT = Path(__file__).resolve().parents[2]


def real_texts(count: int) -> list[str]:
    """Pieces of this repository's own code."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "data").glob("*.py")))
    words = text.split(" ")
    size = min(160, len(words) // count)
    return [" ".join(words[i * size : (i + 1) * size]) for i in range(count)]


def edited(text: str, share: float, rng: random.Random) -> str:
    """The text with a share of its words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), int(share * len(words))):
        words[place] = f"edit{rng.randrange(10**6)}"
    return " ".join(words)


def jaccard(left: str, right: str) -> float:
    one, other = shingles(left), shingles(right)
    return len(one & other) / len(one | other)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    n = min(SHINGLE_WORDS, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def repeated(
    folder: Path,
    texts: list[str],
    kind: Kind,
    *,
    cuts: tuple[int, ...] = (),
    range_keys: int = 1000,
) -> set[int]:
    """Numbers of the documents that are dropped; parts end at `cuts`."""
    folder.mkdir()
    ends = (*cuts, len(texts))
    starts = (0, *cuts)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        middle = (start + end) // 2
        signed = [sign(kind, texts[start:middle]), sign(kind, texts[middle:end])]
        write_signatures(folder, number, kind, signed)
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    jobs = range_jobs(folder, folder, kind, sizes, range_keys)
    for job in jobs:
        do(job)
    join_clusters(folder / "labels", sum(sizes), (np.load(job.result) for job in jobs))
    rows = repeated_rows(folder / "labels", sizes)
    return {start + row for start, part in zip(starts, rows, strict=True) for row in part.tolist()}


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """200 documents: originals, and copies of every degree of similarity, in random order."""
    rng = random.Random(0)
    originals = real_texts(80)
    shares = (0, 0.003, 0.007, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2)
    copies = [edited(rng.choice(originals), shares[i % len(shares)], rng) for i in range(120)]
    texts = originals + copies
    rng.shuffle(texts)
    return texts


def test_near_duplicates_are_those_of_brute_force(corpus: list[str], tmp_path: Path) -> None:
    dropped = repeated(tmp_path / "work", corpus, "near", cuts=(50, 50, 120))
    similar = {
        (left, right): jaccard(corpus[left], corpus[right])
        for left, right in combinations(range(len(corpus)), 2)
    }
    above = [pair for pair, value in similar.items() if value > 0.9]
    assert len(above) > 30
    assert all(right in dropped for _, right in above), "of such a pair the earlier one may stay"
    # A document is dropped for a neighbour in its cluster, and nobody is below 0.6 to all others.
    best = {
        number: max(value for pair, value in similar.items() if number in pair)
        for number in dropped
    }
    assert min(best.values()) > 0.6
    kept = set(range(len(corpus))) - dropped
    assert not [pair for pair in above if set(pair) <= kept]
    alone = [n for n in range(len(corpus)) if max(v for p, v in similar.items() if n in p) < 0.4]
    assert len(alone) > 10 and not dropped & set(alone)


def test_what_is_dropped_depends_on_neither_parts_nor_ranges(
    corpus: list[str], tmp_path: Path
) -> None:
    expected = repeated(tmp_path / "one", corpus, "near", range_keys=10**6)
    for keys, cuts in ((100, (1, 2, 3)), (700, (0, 100)), (3000, tuple(range(20, 200, 20)))):
        folder = tmp_path / str(keys)
        assert repeated(folder, corpus, "near", cuts=cuts, range_keys=keys) == expected


def test_the_first_of_equal_documents_stays(tmp_path: Path) -> None:
    texts = ["a", "b", "a ", "c", "b", "\n a\n", "A", "e\u0301", "\u00e9", "", "", "a b", "a\tb"]
    dropped = repeated(tmp_path / "work", texts, "exact", cuts=(3, 5))
    assert dropped == {2, 4, 5, 8, 10, 12}
    assert repeated(tmp_path / "near", ["!", "?", "!", "one two", "One, two!"], "near") == {2, 4}


def test_a_group_with_one_key_is_still_compared(tmp_path: Path) -> None:
    """Documents that share a band and little else do not drop each other; their copies do."""
    from data.dedup import _links

    kinds = np.array([0, 1, 2, 0, 1, 2, 3], np.int64)
    ids = np.arange(7)
    found = _links(np.zeros(7, np.uint64), ids, lambda a, b: kinds[a] == kinds[b])
    assert sorted(map(tuple, found.tolist())) == [(0, 3), (1, 4), (2, 5)]


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_clusters_are_those_of_brute_force_in_whatever_pieces_links_come(
    tmp_path: Path, block: int
) -> None:
    """A chain of 200 documents, random links between 200, and 100 alone."""
    rng = np.random.default_rng(0)
    order = rng.permutation(200)
    chain = np.stack([order[:-1], order[1:]], axis=1)
    links = np.concatenate([chain, rng.integers(200, 400, (150, 2))])
    rng.shuffle(links)
    cluster = {number: {number} for number in range(500)}
    for left, right in links.tolist():
        joined = cluster[left] | cluster[right]
        cluster.update(dict.fromkeys(joined, joined))
    labels = tmp_path / "labels"
    join_clusters(labels, 500, iter([links[:100], links[:0], links[100:]]), block)
    rows = [*repeated_rows(labels, [100, 0, 400])]
    found = {*rows[0].tolist(), *(rows[2] + 100).tolist()}
    assert found == {number for number in range(500) if min(cluster[number]) != number}
    assert found >= set(range(1, 200)) and not found & set(range(400, 500))


def test_signatures_estimate_the_similarity_and_the_stated_chances_hold(
    corpus: list[str],
) -> None:
    signatures = METHODS["near"].sign(corpus)
    pairs = list(combinations(range(0, len(corpus), 2), 2))
    errors = [
        float((signatures[i] == signatures[j]).mean()) - jaccard(corpus[i], corpus[j])
        for i, j in pairs
    ]
    # Four standard deviations of 120 trials at a half.
    assert max(map(abs, errors)) < 4 * 0.5 / (BANDS * ROWS) ** 0.5
    assert (1 - 0.9**ROWS) ** BANDS < 3e-7
    assert below(0.9) < 6e-7
    assert 1 - below(0.4) < 1e-14


def below(similarity: float) -> float:
    """Chance that fewer than MIN_SHARED of the values of such a pair agree: the binomial sum."""
    from math import ceil, comb

    n = BANDS * ROWS
    return sum(
        comb(n, k) * similarity**k * (1 - similarity) ** (n - k)
        for k in range(ceil(MIN_SHARED * n))
    )
