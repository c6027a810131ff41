"""Random histories with real processes: ranks that read through the real loader and are killed.

A rank is a process that stays from one attempt to the next unless it is killed, with SIGKILL and at
any micro-batch; what the others still read of such an attempt is thrown away. Every token that was
handed on before is compared with the list that test_schedules.py writes down.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.config import DataSource
from data.loader import SampleStream, micro_batches
from data.order import accumulation
from data.phases import Phases, RunPhase, standing
from data.sources import Datasets, open_datasets
from tests.data.tiny import documents, write_dataset
from tests.ranks import _context as processes
from tests.train.test_schedules import (
    BLOCK,
    MIXES,
    SEED,
    SEQ_LEN,
    Attempt,
    attempts,
    configured,
    plain_run,
)
from train.phases import History, phases_of

NUM_HISTORIES, NUM_SOAK_HISTORIES = 60, 200
TEXTS = {
    name: documents(count, seed=seed)
    for seed, (name, count) in enumerate([("a", 9), ("b", 3), ("c", 5)])
}
TOKENS = {name: np.concatenate(texts) for name, texts in TEXTS.items()}


@dataclass(frozen=True)
class Reading:
    """What one rank is to read."""

    stream: SampleStream
    phases: Phases
    first: int
    last: int
    rank: int
    ranks: int
    micro_batch: int


@dataclass(frozen=True)
class Micro:
    """What a rank has read of one micro-batch: the tokens of its real samples."""

    tokens: NDArray[np.int64]
    data_hash: int


@cache
def opened(folder: Path, mix: int) -> Datasets:
    """The sources of a mix, and beside them those of the others, whose steps may be repeated."""
    every = {s.name: s for weights in MIXES for s in open_mix(folder, weights).sources}
    return replace(open_mix(folder, MIXES[mix]), sources=tuple(every.values()))


def open_mix(folder: Path, weights: dict[str, float]) -> Datasets:
    sources = [DataSource(name=n, path=str(folder / n), weight=w) for n, w in weights.items()]
    return open_datasets(sources, seq_len=SEQ_LEN)


def read(pipe: Connection) -> None:
    """A rank: reads what it is told and hands on every micro-batch."""
    while True:
        job: Reading = pipe.recv()
        segments = list(job.phases.segments(job.first, job.last))
        num_micro = max(
            accumulation(phase.batch_samples, job.ranks, job.micro_batch)
            for _, _, phase in segments
        )
        for start, end, phase in segments:
            for batch in micro_batches(
                job.stream,
                first_sample=job.phases.samples(start)[0],
                batch_samples=phase.batch_samples,
                num_steps=end - start + 1,
                rank=job.rank,
                num_ranks=job.ranks,
                micro_batch=job.micro_batch,
                num_micro=num_micro,
            ):
                labels = batch["labels"].numpy()
                tokens = np.concatenate([batch["input_ids"].numpy(), labels[:, -1:]], axis=1)
                pipe.send(Micro(tokens[labels[:, 0] >= 0], int(batch["data_hash"])))
        pipe.send(None)


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
    found = Ranks()
    yield found
    found.kill_all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    for name, texts in TEXTS.items():
        write_dataset(folder / name, {"train/main": texts}, block_tokens=BLOCK)
    return folder


@pytest.mark.parametrize(
    "count", [NUM_HISTORIES, pytest.param(NUM_SOAK_HISTORIES, marks=pytest.mark.slow)]
)
def test_what_is_read_before_and_after_kills_is_what_the_plain_run_reads(
    folder: Path, ranks: Ranks, count: int
) -> None:
    seen: list[bool] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(history=attempts, moments=st.randoms(use_true_random=False))
    def check(history: list[Attempt], moments: Any) -> None:
        try:
            seen.append(check_history(history, moments, folder, ranks))
        except BaseException:
            # What they still hand on belongs to no other history.
            ranks.kill_all()
            raise

    check()
    assert len(seen) >= count
    assert sum(seen) >= len(seen) / 5, "too few with a resize, a kill and a change"


def check_history(history: list[Attempt], moments: Any, folder: Path, ranks: Ranks) -> bool:
    """Whether the history had a resize, a kill and a change in the middle of the run."""
    rows: list[RunPhase] = []
    sizes = {name: len(tokens) for name, tokens in TOKENS.items()}
    done, batch, mix = 0, 6, 0
    wanted = [(batch, mix)] * 100
    changed = False
    for attempt in history:
        new = (attempt.batch or batch, mix if attempt.mix is None else attempt.mix)
        if new != (batch, mix) or done == 0:
            changed |= done > 0
            wanted[done:] = [new] * (100 - done)
        batch, mix = new
        history_so_far = History(tuple(standing(rows)), done)
        phases = phases_of(configured(batch), open_mix(folder, MIXES[mix]), history_so_far)
        rows = [*rows, phases.rows[-1]]
        last = done + attempt.steps
        # Handed over with its tables, as loader processes get it: to build them takes longer.
        stream = SampleStream(opened(folder, mix), seq_len=SEQ_LEN, seed=SEED, phases=phases)
        job = Reading(
            stream,
            phases,
            done + 1,
            last,
            rank=0,
            ranks=attempt.ranks,
            micro_batch=attempt.micro_batch or accumulation(batch, attempt.ranks, 1),
        )
        pipes = ranks.pipes(attempt.ranks)
        for rank, pipe in enumerate(pipes):
            pipe.send(replace(job, rank=rank))
        expected = expected_micros(plain_run(wanted[:last], sizes)[done:], job)
        num_micro = len(expected[0])
        kept = moments.randrange(num_micro + 1) if attempt.killed else num_micro
        for micro in range(kept):
            for rank, pipe in enumerate(pipes):
                found = received(pipe)
                assert np.array_equal(found.tokens, expected[rank][micro])
        if attempt.killed:
            victim = moments.randrange(attempt.ranks)
            ranks.kill(victim)
            for pipe in pipes[:victim] + pipes[victim + 1 :]:
                assert sum(1 for _ in iter(lambda p=pipe: received(p), None)) == num_micro - kept
            done = max(last - attempt.lost, 0)
            continue
        assert [received(pipe) for pipe in pipes] == [None] * attempt.ranks
        done = last
    resized = len({attempt.ranks for attempt in history}) > 1
    return resized and changed and any(attempt.killed for attempt in history[:-1])


def received(pipe: Connection) -> Any:
    """What a rank hands on next. It fails rather than wait for ever."""
    assert pipe.poll(60), "a rank hangs"
    return pipe.recv()


def expected_micros(
    steps: list[list[tuple[str, int, int]]], job: Reading
) -> list[list[NDArray[Any]]]:
    """For every rank the tokens of every micro-batch, dealt out by hand."""
    num_micro = max(
        accumulation(phase.batch_samples, job.ranks, job.micro_batch)
        for _, _, phase in job.phases.segments(job.first, job.last)
    )
    micros: list[list[NDArray[Any]]] = [[] for _ in range(job.ranks)]
    for step in steps:
        left = [TOKENS[name][offset : offset + SEQ_LEN + 1] for name, _, offset in step]
        for _ in range(num_micro):
            for rank in range(job.ranks):
                own, left = left[: job.micro_batch], left[job.micro_batch :]
                micros[rank].append(np.array(own, dtype=np.int64).reshape(-1, SEQ_LEN + 1))
    return micros
