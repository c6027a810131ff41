"""Random histories with real processes: ranks that read through the real loader and are killed.

A rank is a process that stays from one attempt to the next unless it is killed, with SIGKILL and at
any micro-batch; what the others still read of such an attempt is thrown away. Some read through
loader processes of their own. Every token that was handed on before is compared with the list that
histories.py writes down.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.order
from tests.ranks import _context as processes
from tests.ranks import start_server
from tests.train.histories import (
    TOKENS,
    Attempt,
    Leg,
    Seen,
    attempts,
    check_seen,
    run_history,
    write_sources,
)
from tests.train.reading import WINDOW, Reading, read

NUM_HISTORIES, NUM_SOAK_HISTORIES = 30, 200


class Ranks:
    """Processes by rank, started when they are needed."""

    def __init__(self) -> None:
        self._members: list[tuple[BaseProcess, Connection]] = []

    def pipes(self, count: int) -> list[Connection]:
        while len(self._members) < count:
            here, there = processes.Pipe()
            process = processes.Process(target=read, args=(there,))
            process.start()
            there.close()
            self._members.append((process, here))
        return [pipe for _, pipe in self._members[:count]]

    def kill(self, rank: int) -> None:
        """End a rank; another takes its place when it is needed."""
        process, pipe = self._members.pop(rank)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "a rank ended by itself"
        pipe.close()

    def kill_all(self) -> None:
        while self._members:
            self.kill(0)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    start_server()
    found = Ranks()
    yield found
    found.kill_all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed")
    write_sources(path)
    return path


@pytest.mark.parametrize(
    "count", [NUM_HISTORIES, pytest.param(NUM_SOAK_HISTORIES, marks=pytest.mark.slow)]
)
def test_what_is_read_before_and_after_kills_is_what_the_plain_run_reads(
    folder: Path, ranks: Ranks, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.order, "WINDOW_TOKENS", WINDOW)
    seen: list[Seen] = []
    by_workers: list[bool] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(history=attempts, moments=st.randoms(use_true_random=False))
    def check(history: list[Attempt], moments: Any) -> None:
        num_workers = 0 if sum(attempt.steps for attempt in history) % 5 else 2
        try:
            seen.append(
                run_history(history, folder, lambda leg: train(leg, num_workers, moments, ranks))
            )
        except BaseException:
            # What they still hand on belongs to no other history.
            ranks.kill_all()
            raise
        by_workers.append(num_workers > 0 and any(attempt.killed for attempt in history))

    check()
    check_seen(seen, count)
    assert sum(by_workers) >= len(seen) / 10, "few kills with loader processes"


def train(leg: Leg, num_workers: int, moments: Any, ranks: Ranks) -> None:
    """Let the ranks read an attempt, and kill one where the attempt is killed."""
    count, killed = leg.attempt.ranks, leg.attempt.killed
    pipes = ranks.pipes(count)
    for rank, pipe in enumerate(pipes):
        pipe.send(
            Reading(
                leg.stream,
                leg.phases,
                leg.first,
                leg.last,
                rank=rank,
                num_ranks=count,
                micro_batch=leg.micro_batch,
                num_micro=leg.num_micro,
                num_workers=num_workers,
            )
        )
    expected = expected_micros(leg)
    num_micro = len(expected[0])
    kept = moments.randrange(num_micro + 1) if killed else num_micro
    for micro in range(kept):
        for rank, pipe in enumerate(pipes):
            found = received(pipe).tokens
            assert found.tolist() == expected[rank][micro]
    if not killed:
        assert [received(pipe) for pipe in pipes] == [None] * count
        return
    victim = moments.randrange(count)
    ranks.kill(victim)
    for pipe in pipes[:victim] + pipes[victim + 1 :]:
        assert sum(1 for _ in iter(lambda p=pipe: received(p), None)) == num_micro - kept


def received(pipe: Connection) -> Any:
    """What a rank hands on next. It fails rather than wait for ever."""
    assert pipe.poll(60), "a rank hangs"
    return pipe.recv()


def expected_micros(leg: Leg) -> list[list[list[list[int]]]]:
    """For every rank the tokens of every micro-batch, dealt out by hand."""
    micros: list[list[list[list[int]]]] = [[] for _ in range(leg.attempt.ranks)]
    for step in leg.expected:
        left = [
            TOKENS[place.source][place.offset : place.offset + place.seq_len + 1].tolist()
            for place in step
        ]
        for _ in range(leg.num_micro):
            for rank in range(leg.attempt.ranks):
                micros[rank].append(left[: leg.micro_batch])
                left = left[leg.micro_batch :]
    return micros
