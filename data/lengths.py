"""Where in a run samples may get another length, and where each source then goes on.

Windows of the order hold the same blocks for every seq_len and come in the same order, so after
whole windows of an epoch the tokens that were read are the same ones whatever the length, but for
those that a block's or the tail's last, unfilled sample leaves out. There a source goes on at the
same window, counted in samples of the new length. Every source of the new mixture has to stand at
such a place; with several, that is rarely one for all, unless each is brought there alone.
Cost: 0.1 ms per window of a source that is looked at, 10,000 at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from data.config import DataUsageError
from data.mixture import Mixture
from data.order import Ints
from data.phases import Phases, RunPhase
from data.samples import Samples
from data.sources import Source

MAX_STOPS = 10_000
MAX_PARTS = 1_000
"""Steps of another batch size that are proposed at most."""


def carried_over(
    phases: Phases,
    sources: Mapping[str, Source],
    *,
    seed: int,
    seq_len: int,
    step: int,
    last_step: int,
) -> dict[str, int]:
    """At which sample of length `seq_len` each source goes on after `step`, of those that were read
    in another length. `sources` are those of the new mixture; phases behind `step` are to come.

    DataUsageError where one stands inside a window, with the nearest steps of the run at which none
    does.
    """
    mixture = Mixture(_until(phases, step).mixture())
    consumed = phases.samples(step)[1]
    counts, units = mixture.counts(consumed), mixture.units(consumed)
    clocks = {
        name: Clock(name, source.at(units[name]).samples, seed)
        for name, source in sources.items()
        if units.get(name, seq_len) != seq_len
    }
    places = {name: clock.windows_read(counts[name]) for name, clock in clocks.items()}
    if any(place is None for place in places.values()):
        raise DataUsageError(
            _refusal(phases, clocks, seq_len=seq_len, step=step, last_step=last_step)
        )
    return {
        name: Clock(name, sources[name].samples, seed).sample_after(*place)
        for name, place in places.items()
        if place is not None
    }


@dataclass(frozen=True)
class Clock:
    """A source's samples of one length, and where windows end among them."""

    name: str
    samples: Samples
    seed: int

    def windows_read(self, sample: int) -> tuple[int, int] | None:
        """(epoch, windows of it) that the first `sample` samples are; None inside a window."""
        epoch, place = divmod(sample, self.samples.geometry.num_samples)
        if place == 0:
            return epoch, 0
        ends = self._ends(epoch)
        number = int(np.searchsorted(ends, place))
        return (epoch, number + 1) if ends[number] == place else None

    def sample_after(self, epoch: int, windows: int) -> int:
        """The sample that follows so many windows of an epoch."""
        first = epoch * self.samples.geometry.num_samples
        return first + (int(self._ends(epoch)[windows - 1]) if windows else 0)

    def next_end(self, sample: int) -> int:
        """Where the window of a sample ends; `sample` itself where one ends just there."""
        epoch, place = divmod(sample, self.samples.geometry.num_samples)
        if place == 0:
            return sample
        ends = self._ends(epoch)
        return sample - place + int(ends[np.searchsorted(ends, place)])

    def _ends(self, epoch: int) -> Ints:
        return self.samples.window_ends(epoch, seed=self.seed, source=self.name)


def _meetings(mixture: Mixture, clocks: Mapping[str, Clock], first: int) -> Iterator[int]:
    """Samples of the run from `first` on before which every source has read whole windows, if its
    last phase never ended; at most MAX_STOPS windows are looked at.
    """
    sample = first
    for _ in range(MAX_STOPS):
        counts = mixture.counts(sample)
        ends = {name: clock.next_end(counts[name]) for name, clock in clocks.items()}
        if all(ends[name] == counts[name] for name in clocks):
            yield sample
            sample += 1
            continue
        reached = [
            _after(mixture, name, ends[name]) for name in clocks if ends[name] > counts[name]
        ]
        if None in reached:
            return
        sample = max(place for place in reached if place is not None)


def _after(mixture: Mixture, name: str, count: int) -> int | None:
    """How many samples of the run bring a source to `count` of its own; None when none do."""
    unit = mixture.seq_lens[-1]
    found = mixture.samples_of(mixture.names.index(name), np.array([count - 1]), seq_len=unit)
    return int(found[-1]) + 1 if len(found) else None


def _until(phases: Phases, step: int) -> Phases:
    """Without the phases that begin behind a step."""
    return Phases([row for row in phases.rows if row.first_step <= max(step, 1)])


def _refusal(
    phases: Phases, clocks: Mapping[str, Clock], *, seq_len: int, step: int, last_step: int
) -> str:
    trained, coming = _until(phases, step), _until(phases, step + 1)
    before = trained.rows[-1]
    if coming.rows[-1].seq_len != before.seq_len:
        # Another change of the length, which is given up now.
        coming = trained
    row, consumed = coming.rows[-1], trained.samples(step)[1]
    mixture = Mixture(coming.mixture())
    counts = mixture.counts(consumed)
    missing = {name: clock.next_end(counts[name]) - counts[name] for name, clock in clocks.items()}
    left = ", ".join(f"{count:,} of {name!r}" for name, count in missing.items() if count)
    text = (
        f"seq_len cannot change from {row.seq_len} to {seq_len} after step {step}: a window of the "
        f"order is read in part, and in samples of another length some of it would come twice and "
        f"some never. Samples to the ends of windows: {left}. "
    )
    total = coming.samples(last_step)[1]
    meetings = _meetings(mixture, clocks, consumed + 1)
    ahead = list(takewhile(lambda sample: sample <= total, meetings))
    meetings = _meetings(Mixture(trained.mixture()), clocks, before.first_sample)
    behind = takewhile(lambda sample: sample < consumed, meetings)
    passed = [found for sample in behind if (found := _step_ending(before, sample))]
    if passed:
        text += f"Step {passed[-1]} was a place to change it. "
    if not ahead:
        return text + (
            "No later step of this run is one for all sources; a phase of one source alone brings "
            "it to its place (--allow-change data.sources)"
        )
    steps = [found for sample in ahead if (found := _step_ending(row, sample)) is not None]
    ways = [f"go on to step {steps[0]} (--stop-at {steps[0]})"] if steps else []
    if _step_ending(row, ahead[0]) is None:
        ways.append(_by_another_batch(row, step, ahead[0] - consumed))
    return text + f"To change it, {'; or '.join(ways)}"


def _step_ending(row: RunPhase, sample: int) -> int | None:
    """The step of a phase behind which a sample comes; None inside a step."""
    steps, rest = divmod(sample - row.first_sample, row.batch_samples)
    return None if rest else row.first_step - 1 + steps


def _by_another_batch(row: RunPhase, step: int, missing: int) -> str:
    """How a run gets exactly `missing` samples further: with some steps of a smaller batch, as
    close to the old one as whole numbers allow.
    """
    batch = row.batch_samples
    steps, rest = divmod(missing, batch)
    most = min(steps + 1, MAX_PARTS)
    last = next((n for n in range(2, most + 1) if (batch - rest) % n == 0), 1)
    smaller = ((last - 1) * batch + rest) // last
    begin, end = step + steps + 1 - last, step + steps + 1
    return (
        f"{f'go on to step {begin} (--stop-at {begin}), and from there ' if begin > step else ''}"
        f"with batch_tokens={smaller * row.seq_len} to step {end} (--allow-change batch_tokens "
        f"--stop-at {end})"
    )
