"""The interval is the best one, by search and by simulated failures."""

from __future__ import annotations

import random
from itertools import product

import pytest

from train.interval import PRIOR_HOURS, Costs, best_interval, between_failures, choose, goodput

HOUR = 3600.0
CASES = [
    Costs(stall=c, lag=c, restart=r, between_failures=m)
    for c, r, m in product((0.5, 2.0, 60.0), (10.0, 600.0), (180.0, 0.23 * HOUR, 3.1 * HOUR, 9e5))
    if c < m / 5
]


@pytest.mark.parametrize("costs", CASES)
def test_no_other_interval_is_more_productive(costs: Costs) -> None:
    best = best_interval(costs)
    found = goodput(best, costs)
    assert all(goodput(best * 1.01**k, costs) <= found for k in range(-300, 300) if k)


def simulated(interval: float, costs: Costs, *, seed: int, failures: int = 4000) -> float:
    """Productive share of a run that fails at random, also while it saves and starts again."""
    draw = random.Random(seed)
    productive = total = 0.0
    for _ in range(failures):
        until = draw.expovariate(1 / costs.between_failures)
        total += until
        saved = int(max(until - costs.restart, 0) / (interval + costs.stall))
        productive += saved * interval
    return productive / total


@pytest.mark.parametrize("costs", [c for c in CASES if c.between_failures < 1e5][::3])
def test_what_is_predicted_is_what_a_simulation_finds(costs: Costs) -> None:
    interval = best_interval(costs)
    # Four thousand failures: 0.02 is three standard deviations of the share.
    assert simulated(interval, costs, seed=1) == pytest.approx(goodput(interval, costs), abs=0.02)


def test_no_interval_is_shorter_than_a_save_takes_to_reach_the_disk() -> None:
    assert best_interval(Costs(stall=0.01, lag=50.0, restart=10.0, between_failures=180.0)) == 50.0


def test_failures_are_counted_from_what_attempts_wrote() -> None:
    rows = [
        {"attempt": 1, "event": "start", "time": 0.0},
        {"attempt": 1, "event": "end", "time": 10 * HOUR, "outcome": "stopped"},
        {"attempt": 2, "event": "start", "time": 20 * HOUR},
        {"attempt": 3, "event": "start", "time": 25 * HOUR},
        {"attempt": 3, "event": "end", "time": 26 * HOUR, "outcome": "failed"},
        {"attempt": 4, "event": "start", "time": 30 * HOUR},
    ]
    prior = PRIOR_HOURS / 1000
    found = between_failures(rows, num_devices=1000, now=33 * HOUR)
    assert found == pytest.approx((prior + 10 + 5 + 1 + 3) * HOUR / 3)
    assert between_failures([], num_devices=1000, now=0.0) == pytest.approx(prior * HOUR)


def test_the_choice_is_told_with_its_reasons() -> None:
    costs = Costs(stall=2.0, lag=2.0, restart=180.0, between_failures=3.09 * HOUR)
    choice = choose(costs, step_seconds=5.0)
    assert choice.steps == 42
    assert choice.goodput == pytest.approx(0.9654, abs=1e-3)
    assert str(choice).startswith("a checkpoint every 42 steps: a save stops training for 2.00 s")


@pytest.mark.parametrize("step_seconds", [0.1, 7.0, 900.0])
def test_the_first_save_of_an_attempt_does_not_wait_for_the_prior(step_seconds: float) -> None:
    costs = Costs(stall=10.0, lag=10.0, restart=120.0, between_failures=PRIOR_HOURS * HOUR)
    assert best_interval(costs) > 16 * HOUR
    first = choose(costs, step_seconds, is_first=True)
    assert first.steps == max(1, round(600 / step_seconds))
    assert str(first).startswith(f"a first checkpoint after {first.steps} steps, to see what one ")
    assert choose(costs, step_seconds).steps == round(4 * HOUR / step_seconds)
    # What is on disk later than that is not asked for earlier.
    slow = Costs(stall=10.0, lag=5 * HOUR, restart=120.0, between_failures=PRIOR_HOURS * HOUR)
    assert choose(slow, step_seconds).steps == round(5 * HOUR / step_seconds)
