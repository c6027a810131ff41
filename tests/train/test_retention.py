"""Which checkpoints stay: by count, by step, by time, and the same however often one prunes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.durable import read_sealed, write_sealed
from tests.train.checkpoints import write
from train.checkpoint import committed, retire, step_folder
from train.retention import Committed, Retention, retained

HOUR = 3600.0


def hourly(*hours: float) -> list[Committed]:
    """Steps 10, 20, ... committed at these hours."""
    return [Committed(10 * (i + 1), hour * HOUR) for i, hour in enumerate(hours)]


@pytest.mark.parametrize(
    ("found", "rule", "stay"),
    [
        ([], Retention(3), set()),
        (hourly(0, 1), Retention(3), {10, 20}),
        (hourly(0, 1, 2, 3), Retention(2), {30, 40}),
        (hourly(0, 1, 2, 3, 4), Retention(1, every_steps=20), {20, 40, 50}),
        (hourly(0, 1, 2, 3, 4), Retention(1, every_steps=1000), {50}),
        # Periods [0, 2), [2, 4), [4, 6): the first of each.
        (hourly(0.5, 1, 2, 3, 4, 5), Retention(1, every_hours=2), {10, 30, 50, 60}),
        (hourly(0, 0.9, 1.1, 1.9), Retention(1, every_hours=1), {10, 30, 40}),
        (hourly(0, 0.1, 0.2), Retention(1, every_hours=0.05), {10, 20, 30}),
        (hourly(0, 1, 2, 3), Retention(1, 20, 3), {10, 20, 40}),
        # A streak of bad steps began at 25, 5 and 99.
        (hourly(0, 1, 2, 3), Retention(1, before=25), {20, 40}),
        (hourly(0, 1, 2, 3), Retention(1, before=5), {40}),
        (hourly(0, 1, 2, 3), Retention(1, before=99), {40}),
        # A manifest that cannot be read has no time; it still counts by its step.
        ([Committed(10, None), *hourly(9, 0, 1)[1:]], Retention(1, 10, 1), {10, 20, 30}),
        ([Committed(10, None), *hourly(9, 0, 1)[1:]], Retention(1, 0, 1), {20, 30}),
    ],
)
def test_what_stays(found: list[Committed], rule: Retention, stay: set[int]) -> None:
    assert retained(found, rule) == stay
    assert retained(list(reversed(found)), rule) == stay


rules = st.builds(
    Retention, st.integers(1, 4), st.sampled_from([0, 1, 3, 7]), st.sampled_from([0.0, 0.5, 2.0])
)
histories = st.lists(
    # Clocks of hosts jump, backwards too.
    st.tuples(st.integers(1, 5), st.floats(-0.2, 3.0)),
    min_size=1,
    max_size=40,
)


@given(rules, histories)
def test_pruning_after_every_commit_keeps_what_the_rules_say(
    rule: Retention, gaps: list[tuple[int, float]]
) -> None:
    step, hour = 0, 1000.0
    alive: list[Committed] = []
    history: list[Committed] = []
    for ahead, hours in gaps:
        step, hour = step + ahead, hour + hours
        history.append(Committed(step, hour * HOUR))
        alive.append(history[-1])
        stay = retained(alive, rule)
        alive = [row for row in alive if row.step in stay]
        # Never the one that was just committed, and never fewer than there are to keep.
        assert step in stay and len(alive) >= min(rule.keep, len(history))
    assert {row.step for row in alive} == retained(history, rule)
    assert retained(alive, rule) == {row.step for row in alive}


def test_pruning_reads_the_times_of_manifests(tmp_path: Path) -> None:
    for step, hour in ((1, 0.1), (2, 0.9), (3, 1.2), (4, 1.4), (5, 1.6)):
        write(tmp_path, step)
        path = step_folder(tmp_path, step) / "manifest.json"
        content = read_sealed(path) | {"time": hour * HOUR}
        write_sealed(path, content)
    retire(tmp_path, Retention(1, every_hours=1.0), newest=5)
    assert committed(tmp_path) == [5, 3, 1]
    retire(tmp_path, Retention(1), newest=5)
    assert committed(tmp_path) == [5]
