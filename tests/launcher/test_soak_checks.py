"""What a soak rests on: faults that are drawn evenly, a formula that is right, and checks that fail
where something is wrong.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.launcher import soak
from tests.launcher.random_faults import (
    DEATHS,
    EVERY,
    MEAN_SECONDS,
    OUTSIDE,
    PLANNED,
    RANKS,
    STANDING,
    Strike,
    Typical,
    draw,
    measured,
    predicted,
)
from tests.launcher.soak_checks import GOODPUT_MARGIN, check_row
from tests.results import VARIABLE, Results
from train import faults
from train.faults import AT_START, IN_A_SAVE, IN_A_STEP

TYPICAL = Typical(ranks=2.0, attempt=5.0, first=8.0, step=0.02)


def test_a_fault_is_drawn_from_seed_and_index_alone() -> None:
    drawn = [draw(7, index, TYPICAL, done=100) for index in range(400)]
    assert drawn == [draw(7, index, TYPICAL, done=100) for index in range(400)]
    assert drawn != [draw(8, index, TYPICAL, done=100) for index in range(400)]
    inside = [faults.parse(strike.fault) for strike in drawn if not strike.is_outside]
    assert {fault.phase for fault in inside} == {*AT_START, *IN_A_STEP, *IN_A_SAVE}
    assert {fault.kind for fault in inside} == {*DEATHS, *PLANNED, *STANDING, "nan"}
    assert {fault.rank for fault in inside} == set(range(RANKS))
    assert {strike.fault for strike in drawn if strike.is_outside} == set(OUTSIDE)
    for fault in inside:
        assert fault.phase in AT_START or fault.step > 100
        assert fault.phase not in IN_A_SAVE or fault.step % EVERY == 0


@pytest.mark.parametrize("count", [10, 30, 200])
def test_the_seconds_between_faults_are_exponential_over_any_run_of_them(count: int) -> None:
    for first in (0, 17, 1000):
        found = sorted(draw(0, n, TYPICAL, done=0).seconds for n in range(first, first + count))
        # The sample's own quantiles: within two places of where they belong.
        for share in (0.25, 0.5, 0.75):
            below = sum(seconds < -MEAN_SECONDS * math.log1p(-share) for seconds in found)
            assert abs(below - share * count) <= 2
        assert fmean(found) == pytest.approx(MEAN_SECONDS, rel=0.25 if count == 10 else 0.1)


def ideal(
    count: int, *, restart: float, step: float, save: float, down: float, told: float | None = None
) -> list[Any]:
    """Rows of a machine that takes the same time for everything. `told`: what a run says that a
    save costs, where that is not the truth.
    """
    rows = []
    for index in range(count):
        struck = draw(1, index, TYPICAL, done=0).seconds
        first = restart if struck >= restart else None
        whole, rest = divmod(max(struck - restart, 0.0), EVERY * step + save)
        steps = int(whole) * EVERY + min(int(rest / step), EVERY)
        rows.append(
            {
                "first": first,
                "struck": struck,
                "ended": struck + down,
                "steps": steps,
                "saves": int(whole),
                "stalled": int(whole) * (save if told is None else told),
                "training": steps * step,
                "kept": int(whole) * EVERY * step,
            }
        )
    return rows


@pytest.mark.parametrize(
    ("restart", "step", "save"), [(8, 0.02, 0.1), (14, 0.05, 0.5), (3, 0.01, 0)]
)
def test_the_formula_tells_the_goodput_of_a_machine_without_moods(
    restart: float, step: float, save: float
) -> None:
    rows = ideal(2000, restart=restart, step=step, save=save, down=1.5)
    found, parts = predicted(rows)
    assert found == pytest.approx(measured(rows), abs=0.01)
    assert parts["restart"] == restart and parts["down"] == pytest.approx(1.5)
    # One that forgets the time in which there is no job is caught.
    up = parts["between_failures"] / (parts["between_failures"] + parts["down"])
    assert abs(found / up - measured(rows)) > 0.015


@pytest.mark.parametrize(("save", "told"), [(0.2, 0.0), (3.0, 0.1)])
def test_time_that_no_step_and_no_save_accounts_for_misses_the_bar(
    save: float, told: float
) -> None:
    rows = ideal(30, restart=8, step=0.02, save=save, down=1.5)
    assert abs(predicted(rows)[0] - measured(rows)) <= GOODPUT_MARGIN
    rows = ideal(30, restart=8, step=0.02, save=save, down=1.5, told=told)
    assert abs(predicted(rows)[0] - measured(rows)) > GOODPUT_MARGIN


DEATH, STOP = (
    {"whom": "rank", "ranks": 2.2, "first": 6.9, "struck": 11.0, "gone": 11.6, "ended": 12.5}
    | {"steps": 213, "step": 0.02, "in_flight": 2, **row}
    for row in (
        {"fault": "optimizer:4265:1:kill", "exit_code": 1, "done": 4250, "reached": 4264},
        {"fault": "optimizer:4265:1:term", "exit_code": 3, "done": 4266, "reached": 4266},
    )
)
"""Rows as a soak has made them."""


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (DEATH, {"done": 4200}),
        (DEATH, {"exit_code": 3}),
        (DEATH, {"gone": 16.1, "ended": 17.0}),
        (STOP, {"done": 4250}),
        (STOP, {"exit_code": 1}),
        (STOP, {"done": 4300, "reached": 4300}),
        (STOP, {"fault": "launcher:SIGTERM", "whom": "launcher", "done": 4250}),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_refused(
    row: dict[str, Any], wrong: dict[str, Any]
) -> None:
    check_row(row)
    with pytest.raises(AssertionError):
        check_row(row | wrong)


@pytest.mark.parametrize("does_strike", [True, False])
def test_a_fault_that_failed_keeps_its_row_and_is_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does_strike: bool
) -> None:
    class Attempt:
        def __init__(self, *_: Any) -> None: ...

        def play(self) -> dict[str, Any]:
            assert does_strike, "the fault has not struck"
            return DEATH | {"done": 4200}

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(soak, "Attempt", Attempt)
    results = Results("faults")

    def strike(index: int, done: int) -> Strike:
        return Strike(DEATH["fault"], 1.0)

    with pytest.raises(AssertionError):
        soak.play(tmp_path, [], 3, strike, check=check_row, keep=results.append)
    (kept,) = results.rows()
    assert (kept["index"], kept["fault"], kept["ok"]) == (0, DEATH["fault"], False)
    with pytest.raises(pytest.fail.Exception, match=r"has failed before: .*'index': 0") as caught:
        results.fail_again(results.rows())
    assert kept["why"] in str(caught.value) and str(results.path) in str(caught.value)
