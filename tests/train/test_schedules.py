"""Whatever happens to a run, its steps have the samples of the run that nothing happened to.

Random histories of worlds, micro-batches, kills, lost checkpoints, new batch sizes, mixtures and
lengths go through the real phases, loader plan and stream, and are compared with the list of
histories.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, seed, settings

import data.order
from data.loader import Plan
from tests.train.histories import (
    Attempt,
    Leg,
    Place,
    Seen,
    attempts,
    check_seen,
    plain_run,
    run_history,
    write_sources,
)
from tests.train.reading import WINDOW


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules")
    write_sources(path)
    return path


# A hundred thousand in ten parts: hypothesis gets slower the more it has drawn.
SOAK = [pytest.param(10_000, part, marks=pytest.mark.slow) for part in range(1, 11)]


@pytest.mark.parametrize(("count", "part"), [(1000, 0), *SOAK])
def test_every_history_trains_on_the_samples_of_the_plain_run(
    folder: Path, count: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.order, "WINDOW_TOKENS", WINDOW)
    seen: list[Seen] = []

    @seed(part)
    @settings(max_examples=count, deadline=None, database=None)
    @given(history=attempts)
    def check(history: list[Attempt]) -> None:
        seen.append(check_history(history, folder))

    check()
    check_seen(seen, count)


def check_history(history: list[Attempt], folder: Path) -> Seen:
    trained: list[list[Place]] = []

    def train(leg: Leg) -> None:
        found = read(leg)
        assert found == leg.expected
        for step in range(leg.first, leg.last + 1):
            assert leg.phases.step_of(leg.phases.samples(step)[0]) == step
            assert leg.phases.step_of(leg.phases.samples(step)[1] - 1) == step
        consumed = leg.phases.samples(leg.last)[1]
        leg.stream.check_state(json.loads(json.dumps(leg.stream.state(consumed))))
        trained[leg.first - 1 :] = found
        assert trained == plain_run(leg.plan)
        del trained[leg.kept :]

    return run_history(history, folder, train)


def read(leg: Leg) -> list[list[Place]]:
    """What all ranks of an attempt read, laid side by side, step by step."""
    return [
        step
        for start, end, phase in leg.phases.segments(leg.first, leg.last)
        for step in read_phase(leg, start, end, phase.seq_len, phase.batch_samples)
    ]


def read_phase(leg: Leg, start: int, end: int, seq_len: int, batch: int) -> list[list[Place]]:
    stream = leg.stream.at(seq_len)
    plans = [
        Plan(
            stream=stream,
            first_sample=leg.phases.samples(start)[0],
            batch_samples=batch,
            rank=rank,
            num_ranks=leg.attempt.ranks,
            micro_batch=leg.micro_batch,
            num_micro=leg.num_micro,
            num_steps=end - start + 1,
        )
        for rank in range(leg.attempt.ranks)
    ]
    numbers = range(leg.num_micro * (end - start + 1))
    samples = np.concatenate([plan.samples(n) for n in numbers for plan in plans])
    places = zip(*(values.tolist() for values in stream.locate(samples)), strict=True)
    names = stream.mixture.names
    flat = [Place(names[k], epoch, offset, seq_len) for k, epoch, offset in places]
    return [flat[at : at + batch] for at in range(0, len(flat), batch)]
