"""A plan trains on every token once, cuts only what is too long, and is as full as by a search."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import best_fit, cut, pack

lengths = st.lists(st.integers(1, 60), max_size=60)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths, st.integers(1, 25))
def test_every_token_but_the_first_of_a_document_is_a_target_once(
    lens: list[int], seq_len: int
) -> None:
    packing = pack(lens, seq_len)
    parts = list(zip(packing.parts.starts.tolist(), packing.parts.lens.tolist(), strict=True))
    begins = np.cumsum([0, *lens]).tolist()
    targets = Counter(token for start, size in parts for token in range(start + 1, start + size))
    assert targets == Counter(set(range(sum(lens))) - set(begins))
    assert packing.parts.num_targets == targets.total()
    # No part holds tokens of two documents, and none is cut that fits.
    whole = {(begin, n) for begin, n in zip(begins, lens, strict=False) if 1 < n <= seq_len + 1}
    assert whole <= set(parts)
    for start, size in parts:
        document = int(np.searchsorted(begins, start, side="right")) - 1
        assert start + size <= begins[document + 1]
    firsts = packing.firsts.tolist()
    assert firsts[0] == 0 and firsts[-1] == len(parts)
    samples = [parts[a:b] for a, b in itertools.pairwise(firsts)]
    assert all(0 < sum(size for _, size in sample) <= seq_len + 1 for sample in samples)
    assert samples == sorted(sorted(sample) for sample in samples)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths, st.integers(1, 25))
def test_samples_are_filled_as_a_search_through_all_of_them_fills_them(
    lens: list[int], seq_len: int
) -> None:
    """The oracle tries every sample for every part, longest part first."""
    capacity = seq_len + 1
    sizes = [min(capacity, n - first) for n in lens for first in range(0, n - 1, seq_len)]
    filled: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [k for k, used in enumerate(filled) if used + size <= capacity]
        if fits:
            filled[max(fits, key=lambda k: filled[k])] += size
        else:
            filled.append(size)
    packing = pack(lens, seq_len)
    used = np.add.reduceat(packing.parts.lens, packing.firsts[:-1]) if sizes else []
    found = [int(size) for size in used]
    assert sorted(found) == sorted(filled)
    # No two samples could be one.
    assert len(found) < 2 or sum(sorted(found)[:2]) > capacity


def test_a_plan_is_pinned() -> None:
    assert best_fit([3, 8, 4, 5, 2], 8) == [[1], [3, 0], [2, 4]]
    assert best_fit([], 8) == []
    parts = cut([3, 12, 1, 5, 2], 7)
    assert parts.starts.tolist() == [0, 3, 10, 16, 21]
    assert parts.lens.tolist() == [3, 8, 5, 5, 2]
    packing = pack([3, 12, 1, 5, 2], 7)
    assert packing.firsts.tolist() == [0, 2, 3, 5]
    assert packing.parts.starts.tolist() == [0, 16, 3, 10, 21]
    assert packing.parts.lens.tolist() == [3, 5, 8, 5, 2]
    assert pack([1], 7).firsts.tolist() == [0]


def test_lengths_of_text_are_packed_almost_without_padding() -> None:
    """Log-normal lengths with a mean near 800 tokens, the shape of web text."""
    lens = np.random.default_rng(0).lognormal(6, 1.2, size=5000).astype(np.int64) + 1
    packing = pack(lens, 2048)
    padding = 1 - int(packing.parts.lens.sum()) / ((len(packing.firsts) - 1) * 2049)
    assert 0 <= padding < 0.002
