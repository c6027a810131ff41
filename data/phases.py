"""The phases of a run: from which step and sample on which batch size, mixture and seq_len hold.

A phase begins where the run stands, so every sample belongs to exactly one step, and steps before a
change keep their samples. Which samples a step has is a pure function of the rows; which tokens a
sample has does not depend on the batch size, so only a new mixture or length restarts the table of
slots. Samples are counted through, whatever their length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data.config import DataError
from data.mixture import Phase


class RunPhase(BaseModel):
    """From step `first_step` (counted from 1) and sample `first_sample` (from 0) on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_step: int = Field(ge=1)
    first_sample: int = Field(ge=0)
    batch_samples: int = Field(ge=1)
    slots: dict[str, int]
    """The mixture: slots of every source out of NUM_SLOTS."""
    fingerprints: dict[str, str]
    """Of every source in `slots`."""
    seq_len: int = Field(default=0, ge=0)
    """Tokens per sample; 0 in rows from before it could change: the run's."""
    bases: dict[str, int] = Field(default_factory=dict)
    """Sample of a source, counted in samples of seq_len, at which this phase goes on; for sources
    that were read in samples of another length before."""


class Phases:
    """The phases of a run as a function from step to samples. DataError when they have gaps."""

    def __init__(self, rows: Sequence[RunPhase]) -> None:
        self.rows = tuple(rows)
        if not rows or (rows[0].first_step, rows[0].first_sample) != (1, 0):
            raise DataError("the first phase of a run begins with step 1 and sample 0")
        for before, row in itertools.pairwise(rows):
            end = before.first_sample + (row.first_step - before.first_step) * before.batch_samples
            if row.first_step <= before.first_step or row.first_sample != end:
                raise DataError(
                    f"a phase begins with step {row.first_step} at sample {row.first_sample}, but "
                    f"the one before begins with step {before.first_step} and has samples up to "
                    f"{end} by then; put back a copy of phases.jsonl"
                )
        self.fingerprints = {k: v for row in rows for k, v in row.fingerprints.items()}
        """Of every source that the run has ever read."""

    def at(self, step: int) -> RunPhase:
        """The phase of a step."""
        return next(row for row in reversed(self.rows) if row.first_step <= max(step, 1))

    def samples(self, step: int) -> tuple[int, int]:
        """[first, last) samples of a step; of step 0, which trains nothing, [0, 0)."""
        if step == 0:
            return 0, 0
        row = self.at(step)
        first = row.first_sample + (step - row.first_step) * row.batch_samples
        return first, first + row.batch_samples

    def step_of(self, sample: int) -> int:
        """The step that trains on a sample."""
        row = next(row for row in reversed(self.rows) if row.first_sample <= sample)
        return row.first_step + (sample - row.first_sample) // row.batch_samples

    def segments(self, first_step: int, last_step: int) -> Iterator[tuple[int, int, RunPhase]]:
        """(first step, last step, phase) of each stretch of steps of one phase."""
        while first_step <= last_step:
            row = self.at(first_step)
            later = [r.first_step for r in self.rows if r.first_step > first_step]
            end = min([last_step, *(step - 1 for step in later)])
            yield first_step, end, row
            first_step = end + 1

    def mixture(self) -> list[Phase]:
        """Where mixture or length change."""
        kept: list[Phase] = []
        for row in self.rows:
            if not kept or (kept[-1].weights, kept[-1].seq_len) != (row.slots, row.seq_len):
                kept.append(Phase(row.first_sample, row.slots, row.seq_len, row.bases))
        return kept

    def state(self, step: int) -> list[dict[str, int]]:
        """First step, first sample and batch of the phases up to a step, for a checkpoint."""
        return [
            {name: getattr(row, name) for name in ("first_step", "first_sample", "batch_samples")}
            for row in self.rows
            if row.first_step <= max(step, 1)
        ]

    def check_state(self, state: dict[str, Any]) -> None:
        """DataError when a checkpoint was trained with other batches."""
        step = self.step_of(max(state["consumed_samples"] - 1, 0))
        found = state.get("batches", self.state(step))
        if found != self.state(step):
            raise DataError(
                f"the checkpoint was trained with batches {found}, this run has "
                f"{self.state(step)}; going on would repeat or skip samples. Put back a copy of "
                "the run's phases.jsonl, or start a new run directory"
            )


def first_phase(
    batch_samples: int, slots: dict[str, int], fingerprints: dict[str, str], *, seq_len: int
) -> RunPhase:
    """The phase that a run begins with."""
    return RunPhase(
        first_step=1,
        first_sample=0,
        batch_samples=batch_samples,
        slots=slots,
        fingerprints=fingerprints,
        seq_len=seq_len,
    )


def standing(rows: Iterable[RunPhase]) -> list[RunPhase]:
    """The rows that count of those ever appended: a row takes the place of all that begin with its
    step or later, none of whose steps was kept.
    """
    kept: list[RunPhase] = []
    for row in rows:
        kept = [old for old in kept if old.first_step < row.first_step]
        kept.append(row)
    return kept
