"""Whatever happens to a run, its steps have the samples of the run that nothing happened to.

Random histories of worlds, micro-batches, kills, lost checkpoints, new batch sizes and new mixtures
go through the real phases, loader plan and stream. The oracle is a list that is written down sample
by sample here, with a second implementation of mixture and order in whole numbers of Python.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataSource
from data.loader import Plan
from data.mixture import NUM_SLOTS
from data.order import accumulation
from data.phases import Phases, RunPhase, standing
from data.sources import Datasets, open_datasets
from data.stream import SampleStream
from tests.data.test_order import _plain_permute as plain_permute
from tests.data.tiny import documents, write_dataset
from train.config import RunConfig
from train.phases import History, phases_of

SEQ_LEN, BLOCK, SEED = 16, 128, 5
MIXES = ({"a": 1.0, "b": 1.0}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"c": 3.0, "a": 1.0}, {"b": 1.0})
SLOTS = (
    {"a": 32768, "b": 32768},
    {"a": 45875, "b": 13107, "c": 6554},
    {"a": 16384, "c": 49152},
    {"b": 65536},
)
"""The weights by hand: largest remainder out of 65,536."""

Place = tuple[str, int, int]


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run; `batch` and `mix` are what its command line says, None as before."""

    ranks: int
    micro_batch: int
    steps: int
    killed: bool
    lost: int
    """Steps that a kill costs; more than the attempt made when checkpoints were lost, too."""
    batch: int | None
    mix: int | None


attempts = st.lists(
    st.builds(
        Attempt,
        ranks=st.integers(1, 5),
        micro_batch=st.integers(0, 3),
        steps=st.integers(1, 4),
        killed=st.booleans(),
        lost=st.integers(1, 5),
        batch=st.one_of(st.none(), st.integers(1, 12)),
        mix=st.one_of(st.none(), st.integers(0, len(MIXES) - 1)),
    ),
    min_size=2,
    max_size=5,
)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Datasets]:
    """For each mix its sources, of 10 to 60 samples per epoch."""
    folder = tmp_path_factory.mktemp("schedules")
    for seed, (name, count) in enumerate({"a": 9, "b": 3, "c": 5}.items()):
        write_dataset(
            folder / name, {"train/main": documents(count, seed=seed)}, block_tokens=BLOCK
        )
    return [
        open_datasets(
            [DataSource(name=n, path=str(folder / n), weight=w) for n, w in mix.items()],
            seq_len=SEQ_LEN,
        )
        for mix in MIXES
    ]


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_every_history_trains_on_the_samples_of_the_plain_run(
    datasets: list[Datasets], count: int
) -> None:
    everything = {s.name: s for opened in datasets for s in opened.sources}
    sizes = {name: source.tokens.num_tokens for name, source in everything.items()}
    seen: list[bool] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(history=attempts)
    def check(history: list[Attempt]) -> None:
        seen.append(check_history(history, datasets, sizes))

    check()
    assert len(seen) >= count
    assert sum(seen) >= len(seen) / 5, "too few with a resize, a kill and a change"


def check_history(history: list[Attempt], datasets: list[Datasets], sizes: dict[str, int]) -> bool:
    """Whether the history had a resize, a kill and a change in the middle of the run."""
    rows: list[RunPhase] = []
    sources = tuple({s.name: s for opened in datasets for s in opened.sources}.values())
    done, batch, mix = 0, 6, 0
    # The oracle's own account: what every step is to be, from the first to far ahead.
    wanted = [(batch, mix)] * 100
    trained: list[list[Place]] = []
    changed = False
    for attempt in history:
        new = (attempt.batch or batch, mix if attempt.mix is None else attempt.mix)
        if new != (batch, mix) or done == 0:
            changed |= done > 0
            wanted[done:] = [new] * (100 - done)
        batch, mix = new
        config = configured(batch)
        phases = phases_of(config, datasets[mix], History(tuple(standing(rows)), done))
        if not rows or rows[-1] != phases.rows[-1]:
            rows.append(phases.rows[-1])
        # Steps that are repeated may be of an earlier mix, whose datasets are still there.
        every = replace(datasets[mix], sources=sources)
        stream = SampleStream(every, seq_len=SEQ_LEN, seed=SEED, phases=phases)
        oracle = plain_run(wanted[: done + attempt.steps], sizes)
        found = train(stream, phases, attempt, batch, first=done + 1, last=done + attempt.steps)
        assert found == oracle[done:]
        for step in range(done + 1, done + attempt.steps + 1):
            assert phases.step_of(phases.samples(step)[0]) == step
            assert phases.step_of(phases.samples(step)[1] - 1) == step
        done += attempt.steps
        trained = [*trained[: done - attempt.steps], *found]
        stream.check_state(json.loads(json.dumps(stream.state(phases.samples(done)[1]))))
        if attempt.killed:
            done = max(done - attempt.lost, 0)
            trained = trained[:done]
    assert trained == plain_run(wanted[:done], sizes)
    resized = len({attempt.ranks for attempt in history}) > 1
    return resized and changed and any(attempt.killed for attempt in history[:-1])


def train(
    stream: SampleStream, phases: Phases, attempt: Attempt, batch: int, *, first: int, last: int
) -> list[list[Place]]:
    """What all ranks of an attempt read, laid side by side, step by step."""
    ranks = attempt.ranks
    micro_batch = attempt.micro_batch or accumulation(batch, ranks, 1)
    segments = list(phases.segments(first, last))
    num_micro = max(accumulation(p.batch_samples, ranks, micro_batch) for _, _, p in segments)
    steps = []
    for start, end, phase in segments:
        plans = [
            Plan(
                stream=stream,
                first_sample=phases.samples(start)[0],
                batch_samples=phase.batch_samples,
                rank=rank,
                num_ranks=ranks,
                micro_batch=micro_batch,
                num_micro=num_micro,
                num_steps=end - start + 1,
            )
            for rank in range(ranks)
        ]
        for step in range(end - start + 1):
            numbers = range(step * num_micro, (step + 1) * num_micro)
            samples = np.concatenate([plan.samples(n) for n in numbers for plan in plans])
            steps.append(samples)
    places = stream.locate(np.concatenate(steps))
    names = stream.mixture.names
    flat = [
        (names[k], epoch, offset)
        for k, epoch, offset in zip(*(values.tolist() for values in places), strict=True)
    ]
    ends = np.cumsum([len(samples) for samples in steps]).tolist()
    return [flat[end - len(s) : end] for end, s in zip(ends, steps, strict=True)]


def plain_run(wanted: list[tuple[int, int]], sizes: dict[str, int]) -> list[list[Place]]:
    """The places of every step of a run that is never interrupted."""
    steps: list[list[Place]] = []
    counts = dict.fromkeys(sizes, 0)
    at, before = 0, None
    for batch, mix in wanted:
        at = at if mix == before else 0
        before = mix
        step = []
        for name in plain_mixture(mix)[at : at + batch]:
            step.append((name, *plain_order(name, sizes[name])[counts[name]]))
            counts[name] += 1
        at += batch
        steps.append(step)
    return steps


@cache
def plain_mixture(mix: int) -> list[str]:
    """The sources of the first samples of a mix: the most urgent item that may come."""
    slots = SLOTS[mix]
    taken = dict.fromkeys(sorted(slots), 0)
    sources = []
    for t in range(600):
        ready = [n for n in taken if taken[n] * NUM_SLOTS // slots[n] <= t]
        name = min(ready, key=lambda n: (-(-(taken[n] + 1) * NUM_SLOTS // slots[n]), n))
        taken[name] += 1
        sources.append(name)
    return sources


@cache
def plain_order(name: str, num_tokens: int) -> list[tuple[int, int]]:
    """Epoch and token offset of the first samples of a source that is one window."""
    per_block = BLOCK // SEQ_LEN
    blocks, rest = divmod(num_tokens - 1, BLOCK)
    size = blocks * per_block + rest // SEQ_LEN
    places = []
    for j in range(600):
        epoch, place = divmod(j, size)
        block, within = divmod(
            plain_permute(place, size, plain_key("window 0", name, epoch)), per_block
        )
        if block < blocks:
            block = plain_permute(block, blocks, plain_key("blocks", name, epoch))
        places.append((epoch, block * BLOCK + within * SEQ_LEN))
    return places


def plain_key(purpose: str, name: str, epoch: int) -> int:
    spelled = f'["headrace order 1",{SEED},"{purpose}","{name}",{epoch}]'
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "little")


@cache
def configured(batch: int) -> RunConfig:
    return RunConfig(seq_len=SEQ_LEN, batch_tokens=SEQ_LEN * batch)
