"""Random histories of runs, and a list of what their steps train on, written down sample by sample.

A history is a few attempts with their worlds, micro-batches, kills and lost checkpoints, each with
a new batch size, mixture or length of samples, or the old one. The list is a second implementation
of mixture, order and windows in whole numbers of Python; it never asks the code under test. Where
it finds that a source stands inside a window, the change has to be refused, and the source is read
alone to the end of the window first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from data.config import DataSource, DataUsageError, accumulation
from data.mixture import NUM_SLOTS
from data.phases import Phases, RunPhase, standing
from data.sources import Datasets, open_datasets
from tests.data.test_order import _plain_permute as plain_permute
from tests.data.tiny import documents, write_dataset
from tests.train.reading import BLOCK, WINDOW, SmallWindows
from train.config import RunConfig
from train.phases import History, phases_of

SEED, LENGTHS = 5, (16, 32, 24)
"""24 leaves 8 targets of every block untrained."""
MIXES = (
    {"a": 1.0, "b": 1.0},
    {"a": 0.7, "b": 0.2, "c": 0.1},
    {"c": 3.0, "a": 1.0},
    {"b": 1.0},
    {"a": 1.0},
    {"c": 1.0},
)
SLOTS = (
    {"a": 32768, "b": 32768},
    {"a": 45875, "b": 13107, "c": 6554},
    {"a": 16384, "c": 49152},
    {"b": 65536},
    {"a": 65536},
    {"c": 65536},
)
"""The weights by hand: largest remainder out of 65,536."""
ALONE = {"b": 3, "a": 4, "c": 5}
"""The mix of one source."""
TEXTS = {
    name: documents(count, seed=seed)
    for seed, (name, count) in enumerate([("a", 14), ("b", 3), ("c", 5)])
}
"""21 to 36 samples of 16 per source and epoch, in one or two windows."""
TOKENS = {name: np.concatenate(texts) for name, texts in TEXTS.items()}


class Place(NamedTuple):
    """A sample: of which source, in which epoch, from which token on, and how long."""

    source: str
    epoch: int
    offset: int
    seq_len: int


class Kind(NamedTuple):
    """What a phase decides of a step."""

    batch: int
    mix: int
    seq_len: int


@dataclass(frozen=True)
class Attempt:
    """One attempt; batch, mix and seq_len are what its command line says, None as before."""

    ranks: int
    micro_batch: int
    """0 for the whole share of a rank."""
    steps: int
    killed: bool
    lost: int
    """Steps that a kill costs; more than the attempt made when checkpoints were lost, too."""
    batch: int | None
    mix: int | None
    seq_len: int | None


attempts = st.lists(
    st.builds(
        Attempt,
        ranks=st.integers(1, 5),
        micro_batch=st.integers(0, 3),
        steps=st.integers(1, 4),
        killed=st.booleans(),
        lost=st.integers(1, 5),
        batch=st.one_of(st.none(), st.integers(1, 12)),
        mix=st.one_of(st.none(), st.integers(0, 3)),
        seq_len=st.sampled_from((None, *LENGTHS)),
    ),
    min_size=2,
    max_size=5,
)


@dataclass(frozen=True)
class Leg:
    """An attempt as it is made, and what its steps are to train on."""

    attempt: Attempt
    stream: SmallWindows
    phases: Phases
    first: int
    last: int
    kept: int
    """Steps of the run that are kept in the end."""
    micro_batch: int
    num_micro: int
    plan: tuple[Kind, ...]
    """Of all steps up to the last."""

    @property
    def expected(self) -> list[list[Place]]:
        """The samples of its own steps."""
        return plain_run(self.plan)[self.first - 1 :]


class Seen(NamedTuple):
    """What happened in a history."""

    all_kinds: bool
    """A resize, a kill, and a change in the middle of the run."""
    new_length: bool
    """A change of seq_len in the middle of the run."""
    refused: int
    """Changes that found a source inside a window."""


def check_seen(seen: Sequence[Seen], count: int) -> None:
    """Enough of everything has happened."""
    assert len(seen) >= count
    assert sum(s.all_kinds for s in seen) >= len(seen) / 5, "few with resize, kill and change"
    assert sum(s.new_length for s in seen) >= len(seen) / 5, "few with another length"
    assert sum(s.refused for s in seen) >= len(seen) / 5, "few changes inside a window"


def write_sources(folder: Path) -> None:
    """The datasets of the mixes."""
    for name, texts in TEXTS.items():
        write_dataset(folder / name, {"train/main": texts}, block_tokens=BLOCK)


def run_history(history: list[Attempt], folder: Path, train: Callable[[Leg], None]) -> Seen:
    """Go through a history; `train` makes each attempt and compares what it read."""
    rows: list[RunPhase] = []
    kind, done = Kind(6, 0, LENGTHS[0]), 0
    # The account of this list: what every step is to be, from the first to far ahead.
    wanted = [kind] * 100
    changed = new_length = False
    refused = 0
    for attempt in history:
        new = Kind(
            attempt.batch or kind.batch,
            kind.mix if attempt.mix is None else attempt.mix,
            attempt.seq_len or kind.seq_len,
        )
        missing = samples_to_ends(wanted[:done], new) if new != kind else {}
        if missing:
            refused += 1
            with pytest.raises(DataUsageError, match="seq_len cannot change"):
                phases_at(rows, done, new, folder)
        ways = [
            (replace(attempt, steps=1, killed=False), Kind(count, ALONE[name], seq_len))
            for name, (count, seq_len) in missing.items()
        ]
        for part, chosen in [*ways, (attempt, new)]:
            if part is not attempt and chosen == kind != wanted[done]:
                # That begins at a later step, lost with its checkpoints: another way to the place.
                if chosen.batch == 1:
                    break
                part, chosen = replace(part, steps=chosen.batch), chosen._replace(batch=1)
            if chosen != kind or done == 0:
                changed |= done > 0
                new_length |= done > 0 and chosen.seq_len != wanted[done - 1].seq_len
                wanted[done:] = [chosen] * (100 - done)
            kind = chosen
            phases = phases_at(rows, done, kind, folder)
            if not rows or rows[-1] != phases.rows[-1]:
                rows.append(phases.rows[-1])
            leg = planned(part, kind, phases, wanted, done, folder)
            train(leg)
            done = leg.kept
    resized = len({attempt.ranks for attempt in history}) > 1
    killed = any(attempt.killed for attempt in history[:-1])
    return Seen(resized and changed and killed, new_length, refused)


def phases_at(rows: list[RunPhase], done: int, kind: Kind, folder: Path) -> Phases:
    """What the code under test makes of a command line."""
    history = History(tuple(standing(rows)), done)
    config = configured(kind.batch, kind.seq_len)
    return phases_of(config, opened(folder, kind.mix, kind.seq_len), history, ("seq_len",))


def planned(
    attempt: Attempt, kind: Kind, phases: Phases, wanted: list[Kind], done: int, folder: Path
) -> Leg:
    last = done + attempt.steps
    micro_batch = attempt.micro_batch or accumulation(kind.batch, attempt.ranks, 1)
    # Steps that are repeated may be of an earlier mix, whose datasets are still there.
    every = {
        s.name: s for mix in range(len(MIXES)) for s in opened(folder, mix, kind.seq_len).sources
    }
    datasets = replace(opened(folder, kind.mix, kind.seq_len), sources=tuple(every.values()))
    return Leg(
        attempt=attempt,
        stream=SmallWindows(datasets, seq_len=kind.seq_len, seed=SEED, phases=phases),
        phases=phases,
        first=done + 1,
        last=last,
        kept=max(last - attempt.lost, 0) if attempt.killed else last,
        micro_batch=micro_batch,
        num_micro=max(
            accumulation(step.batch, attempt.ranks, micro_batch) for step in wanted[done:last]
        ),
        plan=tuple(wanted[:last]),
    )


@cache
def opened(folder: Path, mix: int, seq_len: int) -> Datasets:
    """The sources of a mix."""
    weights = MIXES[mix].items()
    sources = [DataSource(name=n, path=str(folder / n), weight=w) for n, w in weights]
    return open_datasets(sources, seq_len=seq_len)


@cache
def configured(batch: int, seq_len: int) -> RunConfig:
    """Of one step: refusals need not look for places further on."""
    return RunConfig(seq_len=seq_len, batch_tokens=seq_len * batch, steps=1, seed=SEED)


def plain_run(plan: Sequence[Kind]) -> list[list[Place]]:
    """The samples of every step of a run that is never interrupted."""
    return [step for step, _ in plain_steps(plan)]


def samples_to_ends(plan: Sequence[Kind], new: Kind) -> dict[str, tuple[int, int]]:
    """For each source that stands inside a window after these steps and was read in another length
    than it now is to be: how many samples of which length bring it to the end of the window.
    """
    found: dict[str, tuple[int, int]] = {}
    stands = [stand for _, stand in plain_steps(plan)]
    for name in SLOTS[new.mix]:
        count, seq_len = stands[-1].get(name, (0, new.seq_len)) if stands else (0, new.seq_len)
        ends = plain_order(name, seq_len)[1]
        end = min(end for end in ends if end >= count)
        if seq_len != new.seq_len and end > count:
            found[name] = (end - count, seq_len)
    return found


def plain_steps(plan: Sequence[Kind]) -> Iterator[tuple[list[Place], dict[str, tuple[int, int]]]]:
    """The samples of each step, and at which sample of which length each source stands then."""
    stand: dict[str, tuple[int, int]] = {}
    at, before = 0, (-1, 0)
    for batch, mix, seq_len in plan:
        at = at if (mix, seq_len) == before else 0
        before = mix, seq_len
        for name in SLOTS[mix]:
            count, old = stand.get(name, (0, seq_len))
            if old != seq_len:
                window = plain_order(name, old)[1].index(count)
                count = plain_order(name, seq_len)[1][window]
            stand[name] = count, seq_len
        step = []
        for name in plain_mixture(mix)[at : at + batch]:
            count, _ = stand[name]
            step.append(plain_order(name, seq_len)[0][count])
            stand[name] = count + 1, seq_len
        at += batch
        yield step, dict(stand)


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
def plain_order(name: str, seq_len: int) -> tuple[list[Place], list[int]]:
    """The first samples of a source, window by window, and before which of them windows begin."""
    per_block = BLOCK // seq_len
    blocks, rest = divmod(len(TOKENS[name]) - 1, BLOCK)
    starts = list(range(0, max(blocks, 1), WINDOW // BLOCK))
    total = blocks * per_block + rest // seq_len
    places: list[Place] = []
    ends = [0]
    for epoch in range(1500 // total):
        turn = plain_key("rotation", name, epoch) % len(starts)
        for window in [*range(turn, len(starts)), *range(turn)]:
            first = starts[window] * per_block
            later = starts[window + 1 :]
            size = (later[0] * per_block if later else total) - first
            own = plain_key(f"window {window}", name, epoch)
            for i in range(size):
                block, within = divmod(first + plain_permute(i, size, own), per_block)
                if block < blocks:
                    block = plain_permute(block, blocks, plain_key("blocks", name, epoch))
                places.append(Place(name, epoch, block * BLOCK + within * seq_len, seq_len))
            ends.append(len(places))
    return places, ends


def plain_key(purpose: str, name: str, epoch: int) -> int:
    spelled = f'["headrace order 1",{SEED},"{purpose}","{name}",{epoch}]'
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "little")
