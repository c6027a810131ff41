"""Samples get another length where windows end, and every token is still a target once an epoch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.order
from data.config import DataSource, DataUsageError
from data.lookup import look_up
from data.manifest import read_manifest
from data.pack import pack_dataset
from data.phases import Phases
from data.sources import Datasets, open_datasets
from data.stream import SampleStream
from tests.data.test_pack import VOCAB, counted
from tests.data.tiny import documents, write_dataset
from train.config import RunConfig
from train.phases import History, phases_of

BLOCK, WINDOW, SEED = 128, 256, 5
LENGTHS = (8, 16, 32, 24)
"""24 leaves 8 targets of every block untrained."""


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Windows of two blocks, so that a few hundred tokens have several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(data.order, "WINDOW_TOKENS", WINDOW)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lengths")
    write_dataset(
        path / "a", {"train/main": counted(12, first=10, seed=0)}, vocab_size=VOCAB,
        block_tokens=BLOCK,
    )  # fmt: skip
    write_dataset(path / "b", {"train/main": documents(9, seed=1)}, vocab_size=VOCAB,
                  block_tokens=BLOCK)  # fmt: skip
    return path


def configured(seq_len: int, batch: int, steps: int = 2000, **keys: Any) -> RunConfig:
    table = {"seq_len": seq_len, "batch_tokens": seq_len * batch, "steps": steps, "seed": SEED}
    return RunConfig.model_validate({**table, **keys})


class Run:
    """A run without a model: its phases, and how far it has come."""

    def __init__(
        self, opened: dict[int, Datasets], seq_len: int, batch: int, steps: int = 2000
    ) -> None:
        self.opened, self.seq_len, self.batch, self.step = opened, seq_len, batch, 0
        self.steps = steps
        self.phases = phases_of(configured(seq_len, batch), opened[seq_len], History())

    def change(self, *, seq_len: int | None = None, batch: int | None = None) -> None:
        """Go on with other values, as a command line with `--allow-change` does."""
        seq_len, batch = seq_len or self.seq_len, batch or self.batch
        history = History(self.phases.rows, self.step)
        config = configured(seq_len, batch, self.steps)
        self.phases = phases_of(config, self.opened[seq_len], history, ("seq_len",))
        self.seq_len, self.batch = seq_len, batch

    def stream(self) -> SampleStream:
        return SampleStream(
            self.opened[self.seq_len], seq_len=self.seq_len, seed=SEED, phases=self.phases
        )

    def targets(self) -> dict[tuple[str, int], Counter[int]]:
        """Per source and epoch how often each token, by its place, was a target in the steps."""
        stream, found = self.stream(), {}
        for step in range(1, self.step + 1):
            first, last = self.phases.samples(step)
            one = stream.of(first)
            assert one.seq_len == self.phases.at(step).seq_len
            places = one.locate(np.arange(first, last))
            for k, epoch, at in zip(*(values.tolist() for values in places), strict=True):
                counter = found.setdefault((stream.mixture.names[k], epoch), Counter())
                counter.update(range(at + 1, at + 1 + one.seq_len))
        return found


def left_out(num_tokens: int, seq_len: int) -> set[int]:
    """The targets that blocks and the tail cannot fill a sample with."""
    out: set[int] = set()
    for begin in range(0, num_tokens - 1, BLOCK):
        size = min(BLOCK, num_tokens - 1 - begin)
        out |= set(range(begin + 1 + size // seq_len * seq_len, begin + 1 + size))
    return out


def check_epochs(run: Run, name: str, *, used: set[int]) -> int:
    """Every target once in each epoch that was read to its end; returns how many were."""
    (source,) = [s for s in run.opened[run.seq_len].sources if s.name == name]
    num_tokens = source.tokens.num_tokens
    found = {epoch: count for (n, epoch), count in run.targets().items() if n == name}
    optional = set().union(*(left_out(num_tokens, seq_len) for seq_len in used))
    for epoch in range(max(found)):
        assert max(found[epoch].values()) == 1
        assert set(range(1, num_tokens)) - found[epoch].keys() <= optional
    return max(found)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 12)),
        st.tuples(st.just("batch"), st.integers(1, 9)),
        st.tuples(st.just("length"), st.sampled_from(LENGTHS)),
    ),
    min_size=4,
    max_size=10,
)


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[int, Datasets]:
    return {seq_len: open_datasets(folder / "a", seq_len=seq_len) for seq_len in LENGTHS}


@pytest.mark.parametrize("count", [60, pytest.param(5_000, marks=pytest.mark.slow)])
def test_every_token_is_a_target_once_an_epoch_whatever_changes(
    single: dict[int, Datasets], count: int
) -> None:
    """A refused change follows the advice of its message, which has to lead there."""
    seen: Counter[str] = Counter()

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(plan=actions)
    def check(plan: list[tuple[str, int]]) -> None:
        run, used = Run(single, 16, 4), {16}
        run.step = 1
        for kind, value in plan:
            if kind == "steps":
                run.step += value
            elif kind == "batch":
                run.change(batch=value)
            elif value != run.seq_len:
                seen["changes"] += 1
                try:
                    run.change(seq_len=value)
                except DataUsageError as error:
                    seen["refused"] += 1
                    follow(run, str(error))
                    run.change(seq_len=value)
                used.add(value)
                run.step += 1
        while run.stream().epochs(run.phases.samples(run.step)[1])["main"] < 2:
            run.step += 1
        run.step += 1
        seen["epochs"] += check_epochs(run, "main", used=used)
        state = json.loads(json.dumps(run.stream().state(run.phases.samples(run.step)[1])))
        run.stream().check_state(state)
        assert [p["seq_len"] for p in state["phases"]] == [
            phase.seq_len
            for phase in run.phases.mixture()
            if phase.start < state["consumed_samples"]
        ]

    check()
    assert seen["changes"] > count / 2 and seen["refused"] > count / 5
    assert seen["epochs"] >= 2 * count


def follow(run: Run, advice: str) -> None:
    """Do what a refusal proposes last: with other batches where no step ends at the place."""
    smaller = re.search(r"with batch_tokens=(\d+) to step (\d+)", advice)
    plain = re.search(r"go on to step (\d+) \(--stop-at", advice)
    if smaller is None:
        assert plain is not None, advice
        run.step = int(plain[1])
        return
    before = re.search(r"go on to step (\d+) \(--stop-at \1\), and from there with", advice)
    if before is not None:
        run.step = int(before[1])
    run.change(batch=int(smaller[1]) // run.seq_len)
    run.step = int(smaller[2])


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_check_notices_a_place_that_is_off_by_one(
    single: dict[int, Datasets], shift: int
) -> None:
    run = Run(single, 16, 4)
    run.step = 4
    run.change(seq_len=32)
    assert run.phases.rows[-1].bases == {"main": 8}
    moved = run.phases.rows[-1].model_copy(update={"bases": {"main": 8 + shift}})
    run.phases = Phases([*run.phases.rows[:-1], moved])
    run.step = 100
    with pytest.raises(AssertionError):
        check_epochs(run, "main", used={16, 32})


def test_a_refusal_tells_the_nearest_steps(single: dict[int, Datasets]) -> None:
    # Windows of 256 tokens: 16 samples of 16.
    run = Run(single, 16, 4)
    run.step = 5
    with pytest.raises(DataUsageError) as refused:
        run.change(seq_len=32)
    assert str(refused.value) == (
        "seq_len cannot change from 16 to 32 after step 5: a window of the order is read in part, "
        "and in samples of another length some of it would come twice and some never. Samples to "
        "the ends of windows: 12 of 'main'. Step 4 was a place to change it. To change it, go on "
        "to step 8 (--stop-at 8)"
    )
    run = Run(single, 16, 5)
    run.step = 2
    with pytest.raises(DataUsageError) as refused:
        run.change(seq_len=32)
    message = str(refused.value)
    assert "6 of 'main'. To change it, go on to step " in message
    # 6 samples more are 2 steps of 3.
    assert message.endswith(
        "; or with batch_tokens=48 to step 4 (--allow-change batch_tokens --stop-at 4)"
    )
    follow(run, message)
    assert (run.step, run.batch) == (4, 3)
    run.change(seq_len=32)
    assert run.phases.rows[-1].first_sample == 16


def test_sources_of_a_mixture_are_brought_to_their_places_one_by_one(folder: Path) -> None:
    """No step suits both; each is read alone until its window ends."""

    def mixed(*names: str) -> dict[int, Datasets]:
        sources = [DataSource(name=n, path=str(folder / n), weight=1 + (n == "a")) for n in names]
        return {seq_len: open_datasets(sources, seq_len=seq_len) for seq_len in (16, 32)}

    both = mixed("a", "b")
    run = Run(both, 16, 5, steps=9)
    run.step = 7
    with pytest.raises(DataUsageError, match=r"No later step of this run is one for all .* alone"):
        run.change(seq_len=32)
    for name in ("a", "b"):
        run.opened = both
        with pytest.raises(DataUsageError) as refused:
            run.change(seq_len=32)
        missing = re.search(rf"(\d+) of '{name}'", str(refused.value))
        assert missing is not None
        run.opened = mixed(name)
        run.change(batch=int(missing[1]))
        run.step += 1
    run.opened = both
    run.change(seq_len=32, batch=4)
    assert set(run.phases.rows[-1].bases) == {"a", "b"}
    run.step += 60
    for name in ("a", "b"):
        assert check_epochs(run, name, used={16, 32}) >= 2
    # A source that stays away keeps its place, in its own unit, until it is back.
    run.opened = mixed("a")
    run.change(batch=3)
    assert run.phases.rows[-1].bases == {}
    run.step += 2
    run.opened = both
    run.change(batch=4)
    run.step += 60
    for name in ("a", "b"):
        assert check_epochs(run, name, used={16, 32}) >= 4


def test_samples_of_a_plan_change_their_length_at_the_end_of_an_epoch(folder: Path) -> None:
    opened = {}
    for seq_len in (16, 32):
        pack_dataset(folder / "a", seq_len=seq_len)
        opened[seq_len] = open_datasets(folder / "a", seq_len=seq_len, packing="best_fit")
    (source,) = opened[16].sources
    size = source.geometry.num_samples
    run = Run(opened, 16, 4)
    run.step = 4
    with pytest.raises(DataUsageError, match=rf"{size - 16} of 'main'"):
        run.change(seq_len=32)
    run.change(batch=size - 16)
    run.step = 5
    run.change(seq_len=32)
    (other,) = opened[32].sources
    assert run.phases.rows[-1].bases == {"main": other.geometry.num_samples}
    first = run.phases.rows[-1].first_sample
    stream = run.stream()
    for samples, one in ((range(first), stream.at(16)), (range(first, first + 40), stream)):
        targets = Counter(
            token
            for sample in samples[: one.num_samples_per_epoch]
            for part in one.documents(sample)
            for token in range(part.first_token + 1, part.first_token + part.num_tokens)
        )
        lens = [len(ids) for ids in counted(12, first=10, seed=0)]
        assert targets == Counter(t for n in lens for t in range(1, n))


def test_documents_are_found_in_samples_of_every_length(
    folder: Path, single: dict[int, Datasets]
) -> None:
    run = Run(single, 16, 4)
    run.step = 8
    run.change(seq_len=32)
    run.step = 40
    stream, phases = run.stream(), run.phases
    count = phases.samples(run.step)[1]
    places = [stream.of(sample).placement(sample) for sample in range(count)]
    assert {sum(d.num_tokens for d in place.documents) for place in places} == {17, 33}
    for entry in read_manifest(folder / "a").shards:
        for number in range(entry.documents):
            found = look_up(stream, phases, shard=entry.path, number=number, steps=run.step)
            expected = {
                (place.epoch, place.sample, phases.step_of(place.sample))
                for place in places
                if any((d.shard, d.number) == (entry.path, number) for d in place.documents)
            }
            seen = {(o.epoch, o.sample, o.step) for o in found.occurrences if o.step is not None}
            assert seen == expected
