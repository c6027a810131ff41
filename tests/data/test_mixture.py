"""The mixture gives every source its share on every prefix, and phases lose nothing."""

from __future__ import annotations

import numpy as np
import pytest

from data.config import DataUsageError
from data.mixture import NUM_SLOTS, Mixture, Phase, check_shares, quotas

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.001, "e": 0.07, "f": 0.02, "g": 0.005, "h": 0.004}


def test_every_prefix_is_within_one_sample_of_its_share() -> None:
    mixture = Mixture([Phase(0, WEIGHTS)])
    sources, _ = mixture.locate(np.arange(2 * NUM_SLOTS))
    slots = quotas(WEIGHTS)
    for k, name in enumerate(mixture.names):
        held = np.cumsum(sources == k)
        share = np.arange(1, len(held) + 1) * slots[name] / NUM_SLOTS
        assert np.abs(held - share).max() < 1


def test_each_source_is_read_in_its_own_order_without_gaps() -> None:
    mixture = Mixture([Phase(0, WEIGHTS)])
    sources, indices = mixture.locate(np.arange(3 * NUM_SLOTS + 1000))
    for k in range(len(mixture.names)):
        own = indices[sources == k]
        assert own.tolist() == list(range(len(own)))


def test_a_new_phase_goes_on_where_every_source_stood() -> None:
    phases = [
        Phase(0, {"a": 3, "b": 1}),
        Phase(1000, {"a": 1, "b": 1, "c": 2}),
        Phase(100_000, {"c": 1}),
        Phase(170_000, {"a": 1, "b": 5}),
    ]
    mixture = Mixture(phases)
    samples = np.arange(300_000)
    sources, indices = mixture.locate(samples)
    for k in range(3):
        own = indices[sources == k]
        assert own.tolist() == list(range(len(own)))
    # Any order of asking gives the same answer.
    some = np.array([299_999, 0, 100_000, 999, 1000])
    again = mixture.locate(some)
    assert again[0].tolist() == sources[some].tolist()
    assert again[1].tolist() == indices[some].tolist()


def test_counts_are_those_of_the_samples() -> None:
    mixture = Mixture([Phase(0, {"a": 3, "b": 1}), Phase(1000, {"b": 1, "c": 2})])
    sources, _ = mixture.locate(np.arange(150_000))
    for end in (0, 1, 999, 1000, 1001, 70_000, 150_000):
        expected = np.bincount(sources[:end], minlength=3).tolist()
        assert list(mixture.counts(end).values()) == expected
    assert list(mixture.counts(0)) == ["a", "b", "c"]


def test_samples_of_a_source_are_found_again() -> None:
    phases = [Phase(0, {"a": 3, "b": 1}), Phase(1000, {"c": 1}), Phase(1500, {"a": 1, "c": 2})]
    mixture = Mixture(phases)
    sources, indices = mixture.locate(np.arange(70_000))
    for k in range(3):
        places = np.flatnonzero(sources == k)
        assert mixture.samples_of(k, indices[places]).tolist() == places.tolist()
    # No phase comes back to b.
    held = int(np.sum(sources == 1))
    assert (
        mixture.samples_of(1, np.arange(held + 5)).tolist() == np.flatnonzero(sources == 1).tolist()
    )


def test_one_source_is_passed_through() -> None:
    sources, indices = Mixture([Phase(0, {"text": 7.0})]).locate(np.array([0, 5, 10**12]))
    assert sources.tolist() == [0, 0, 0]
    assert indices.tolist() == [0, 5, 10**12]


def test_slots_are_golden() -> None:
    assert quotas({"a": 1, "b": 1, "c": 1}) == {"a": 21846, "b": 21845, "c": 21845}
    assert quotas({"small": 1e-9, "large": 1}) == {"large": 65535, "small": 1}
    assert sum(quotas(WEIGHTS).values()) == NUM_SLOTS
    sources, _ = Mixture([Phase(0, {"a": 0.5, "b": 0.3, "c": 0.2})]).locate(np.arange(16))
    assert sources.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


def test_the_state_is_whole_numbers() -> None:
    state = Mixture([Phase(0, {"a": 0.75, "b": 0.25}), Phase(10, {"b": 1})]).state()
    assert state == [
        {"start": 0, "slots": {"a": 49152, "b": 16384}},
        {"start": 10, "slots": {"b": 65536}},
    ]


def test_weights_whose_sum_is_no_number_are_mixed_all_the_same() -> None:
    assert quotas({"a": 1e308, "b": 1e308, "c": 1e300}) == quotas({"a": 1, "b": 1, "c": 1e-8})
    assert quotas({"a": 1.7e308, "b": 1.7e308, "c": 1e-300}) == {"a": 32767, "b": 32768, "c": 1}


def test_a_weight_below_the_finest_share_is_refused() -> None:
    check_shares({})
    check_shares({"a": 65_535, "b": 1})
    message = r"source 'b' has weight 0\.9, less than one 65,536th .* give it at least 1, or leave"
    with pytest.raises(DataUsageError, match=message):
        check_shares({"a": 65_535, "b": 0.9})
    with pytest.raises(
        DataUsageError, match=r"'c' has weight 1e\+300, .* at least 3\.05e\+303, or"
    ):
        check_shares({"a": 1e308, "b": 1e308, "c": 1e300})


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(DataUsageError, match=r"source 'b' has weight .*; a weight is a positive"):
        Mixture([Phase(0, {"a": 1, "b": weight})])


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([5], "the first phase of a mixture starts at sample 0"),
        ([0, 8, 8], r"phases start one after another, these start at samples \[0, 8, 8\]"),
    ],
)
def test_phases_out_of_order_are_refused(starts: list[int], message: str) -> None:
    with pytest.raises(DataUsageError, match=message):
        Mixture([Phase(start, {"a": 1}) for start in starts])


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(DataUsageError, match="a mixture needs 1 to 65536 sources, this one has 0"):
        Mixture([Phase(0, {})])
