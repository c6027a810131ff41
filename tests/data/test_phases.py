"""Phases tell the samples of every step, and notice when they do not fit each other."""

from __future__ import annotations

from typing import Any

import pytest

from data.config import DataError
from data.phases import Phases, RunPhase, standing


def row(first_step: int, first_sample: int, batch: int, **slots: int) -> RunPhase:
    return RunPhase(
        first_step=first_step,
        first_sample=first_sample,
        batch_samples=batch,
        slots=slots or {"a": 65536},
        fingerprints={name: name * 64 for name in slots or {"a": 1}},
    )


PHASES = Phases([row(1, 0, 10), row(4, 30, 4), row(6, 38, 7, a=1, b=65535)])


def test_steps_and_samples_are_each_others_inverse() -> None:
    ends = [10, 20, 30, 34, 38, 45, 52]
    for step, (first, last) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        assert PHASES.samples(step) == (first, last)
        assert {PHASES.step_of(sample) for sample in range(first, last)} == {step}
    assert PHASES.samples(0) == (0, 0)


def test_segments_cover_every_step_once() -> None:
    found = [(first, last, phase.batch_samples) for first, last, phase in PHASES.segments(2, 9)]
    assert found == [(2, 3, 10), (4, 5, 4), (6, 9, 7)]
    assert [s[:2] for s in PHASES.segments(6, 6)] == [(6, 6)]


def test_only_a_new_mixture_restarts_the_table() -> None:
    assert [phase.start for phase in PHASES.mixture()] == [0, 38]
    assert set(PHASES.fingerprints) == {"a", "b"}


def test_a_row_takes_the_place_of_those_behind_it() -> None:
    rows = [row(1, 0, 10), row(4, 30, 4), row(6, 38, 7), row(4, 30, 9)]
    assert standing(rows) == [rows[0], rows[3]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(2, 0, 10)], "the first phase of a run begins with step 1 and sample 0"),
        (
            [row(1, 0, 10), row(4, 31, 4)],
            r"begins with step 4 at sample 31, .* samples up to 30 by then; put back a copy",
        ),
    ],
)
def test_gaps_and_overlaps_are_refused(rows: list[RunPhase], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Phases(rows)


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_checkpoint_knows_only_the_phases_before_it(step: int) -> None:
    state: dict[str, Any] = {"consumed_samples": PHASES.samples(step)[1]}
    PHASES.check_state({**state, "batches": PHASES.state(step)})
    other = Phases([row(1, 0, 5), row(2, 5, 3)])
    with pytest.raises(DataError, match=r"was trained with batches .* Put back a copy of the run"):
        other.check_state({**state, "batches": PHASES.state(step)})
