"""A plan holds every token once, cuts only what is too long, and is as full as a slow search's."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Part, best_fit

lengths = st.lists(st.integers(1, 60), max_size=60)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths, st.integers(1, 25))
def test_every_token_lies_in_one_sample_and_only_long_documents_are_cut(
    lens: list[int], capacity: int
) -> None:
    plan = best_fit(lens, capacity)
    assert all(0 < sum(part.num_tokens for part in sample) <= capacity for sample in plan)
    parts = [part for sample in plan for part in sample]
    tokens = sorted(
        (part.document, token)
        for part in parts
        for token in range(part.first_token, part.first_token + part.num_tokens)
    )
    assert tokens == [(number, token) for number, n in enumerate(lens) for token in range(n)]
    count = np.bincount([part.document for part in parts], minlength=len(lens)).tolist()
    assert count == [-(-length // capacity) for length in lens]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths, st.integers(1, 25))
def test_samples_are_filled_as_a_search_through_all_of_them_fills_them(
    lens: list[int], capacity: int
) -> None:
    """The oracle tries every sample for every part, longest part first."""
    sizes = [min(capacity, n - first) for n in lens for first in range(0, n, capacity)]
    filled: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [k for k, used in enumerate(filled) if used + size <= capacity]
        if fits:
            filled[max(fits, key=lambda k: filled[k])] += size
        else:
            filled.append(size)
    found = [sum(part.num_tokens for part in sample) for sample in best_fit(lens, capacity)]
    assert sorted(found) == sorted(filled)
    # No two samples could be one.
    assert len(found) < 2 or sum(sorted(found)[:2]) > capacity


def test_a_plan_is_pinned() -> None:
    assert best_fit([3, 12, 5, 2], 8) == [
        [Part(1, 0, 8)],
        [Part(2, 0, 5), Part(0, 0, 3)],
        [Part(1, 8, 4), Part(3, 0, 2)],
    ]
    assert best_fit([], 8) == []


def test_lengths_of_text_are_packed_almost_without_padding() -> None:
    """Log-normal lengths with a mean near 800 tokens, the shape of web text."""
    lens = np.random.default_rng(0).lognormal(6, 1.2, size=5000).astype(np.int64) + 1
    plan = best_fit(lens, 2048)
    padding = 1 - int(lens.sum()) / (len(plan) * 2048)
    assert 0 <= padding < 0.002
