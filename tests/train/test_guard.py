"""The guard's opinions, and whole runs that it leads: skips, rollbacks, and what they are equal to.

Poison is planted by the task: the loss of chosen steps is multiplied, on all ranks or on one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config
from train.attempt import run_attempt
from train.checkpoint import committed, open_checkpoint, step_folder
from train.config import ConfigError, RunConfig
from train.engine import Batch
from train.events import read_events
from train.guard import Guard, bound, trouble_began
from train.hindsight import hindsight
from train.pretrain import PretrainTask, pretraining
from train.rollback import leave_spikes
from train.rows import read_metrics
from train.run import attempts
from train.settings import GuardConfig
from train.world import World

Poison = dict[int, float]


def settled(guard: Guard, step: int, loss: float, norm: float = 1.0) -> str:
    verdict = guard.judge(loss, norm)
    return guard.settle(
        step, loss=loss, grad_norm=norm, is_bad=verdict.is_bad, is_high=verdict.is_high
    )


def fed(**keys: Any) -> Guard:
    """A guard that knows eight good steps, with losses 2.0 to 2.7."""
    guard = Guard(GuardConfig(window=8, **keys))
    assert {settled(guard, step, 2 + step / 10) for step in range(8)} == {"step"}
    return guard


def test_the_bound_is_the_median_plus_deviations() -> None:
    # Median 3, absolute deviations 2 1 0 1 97: median 1.
    assert bound([1, 2, 3, 4, 100], 6) == 3 + 6 * 1.4826
    # Nothing varies: a thousandth of the median is a deviation.
    assert bound([5.0] * 9, 6) == pytest.approx(5.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_skipped_and_forgotten(bad: float) -> None:
    """One NaN must not make the healthy steps after it outliers."""
    guard = fed(outlier="skip")
    before = guard.state()
    assert settled(guard, 8, bad) == "skip"
    assert settled(guard, 9, 2.5, bad) == "skip"
    assert guard.state() == before | {"bad": [8, 9], "high": [8, 9]}
    assert {settled(guard, step, 2.4) for step in range(10, 30)} == {"step"}


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    guard = Guard(GuardConfig(max_skips=2))
    found = [settled(guard, step, math.nan) for step in range(1, 3)]
    assert [*found, settled(guard, 3, 2.0)] == ["skip", "skip", "step"]
    assert [settled(guard, step, math.nan) for step in (4, 5, 6)] == ["skip", "skip", "give up"]
    assert settled(Guard(GuardConfig(max_skips=0)), 1, math.nan) == "give up"


def test_outliers_are_those_above_the_bound_of_loss_or_norm() -> None:
    guard = fed(outlier="skip", max_skips=9)
    # Median 2.35, deviation 0.2 * 1.4826, so that the bound is 4.129.
    assert settled(guard, 8, 4.12) == "step"
    assert settled(guard, 9, 9.0) == "skip"
    assert settled(guard, 10, 2.4, 1.1) == "skip"
    assert settled(guard, 11, 0.0, 0.0) == "step"
    reason = guard.judge(9.0, 2.0).reason
    assert "loss 9 is above 4." in reason
    assert ", 6 sigmas over the last 8 good steps" in reason
    assert "gradient norm 2 is above 1.006" in reason


def test_nothing_is_out_of_the_ordinary_when_off_or_too_early() -> None:
    assert settled(fed(), 8, 1e9) == "step"
    early = Guard(GuardConfig(window=8, outlier="skip"))
    assert {settled(early, step, 10.0**step) for step in range(1, 9)} == {"step"}


def test_a_spike_is_patience_high_losses_in_a_row_and_rolled_back_at_most_n_times() -> None:
    guard = fed(rollback=1, patience=3)
    memory = guard.state()
    assert [settled(guard, step, 9.0) for step in (8, 9)] == ["step", "step"]
    assert settled(guard, 10, 2.5) == "step"
    assert [settled(guard, step, 9.0) for step in (11, 12, 13)] == ["step", "step", "roll back"]
    assert list(guard.spike) == [11, 12, 13]
    guard.go_back(memory)
    assert guard.state() == memory | {"rollbacks": 1, "skip_steps": [11, 12, 13]}
    assert [bool(guard.lists(step)) for step in range(10, 15)] == [False, True, True, True, False]
    assert {settled(guard, step, 9.0) for step in range(14, 30)} == {"step"}


def test_a_gradient_norm_spikes_before_the_loss_does() -> None:
    guard = fed(rollback=1, patience=3)
    found = [settled(guard, step, 2.4, 5.0) for step in (8, 9, 10)]
    assert found == ["step", "step", "roll back"] and list(guard.spike) == [8, 9, 10]


def test_numbers_that_are_none_can_be_rolled_back_before_they_end_the_run() -> None:
    guard = fed(rollback=1, patience=9, max_skips=1)
    assert [settled(guard, step, math.nan) for step in (8, 9)] == ["skip", "roll back"]
    assert list(guard.spike) == [8, 9]


def test_a_guard_goes_on_from_its_state() -> None:
    losses = [2 + math.sin(step) + 50 * (step % 11 == 0) for step in range(60)]
    settings = GuardConfig(window=8, outlier="skip", sigmas=4)
    whole = Guard(settings)
    expected = [settled(whole, step, loss) for step, loss in enumerate(losses)]
    assert set(expected) == {"step", "skip"}
    for cut in range(60):
        first = Guard(settings)
        found = [settled(first, step, losses[step]) for step in range(cut)]
        second = Guard(settings, first.state())
        found += [settled(second, step, losses[step]) for step in range(cut, 60)]
        assert found == expected
        assert second.state() == whole.state()


def test_trouble_lasts_from_the_first_bad_or_high_step_to_a_good_one() -> None:
    guard = fed(outlier="skip", max_skips=9)
    assert trouble_began(guard.state()) == trouble_began({}) == 0
    for step in (20, 21):
        settled(guard, step, math.nan)
        assert trouble_began(guard.state()) == 20
    assert trouble_began({"bad": [], "high": [7, 8]}) == 7
    settled(guard, 22, 1.0)
    assert trouble_began(guard.state()) == 0


def test_a_rollback_needs_checkpoints(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"guard\.rollback=1 has nothing to go back to"):
        config(dataset, "guard.rollback=1", "checkpoint.every=0")


class Poisoned(PretrainTask):
    """Multiplies the loss of chosen steps."""

    poison: Poison
    accumulation: int

    def micro_batches(self, first_step: int, last_step: int, **where: int) -> Iterator[Batch]:
        batches = super().micro_batches(first_step, last_step, **where)
        for index, batch in enumerate(batches):
            factor = self.poison.get(first_step + index // self.accumulation, 1.0)
            yield {**batch, "poison": torch.tensor(factor)}

    def loss_sum(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return super().loss_sum(module, batch) * batch.get("poison", 1.0)


def train_poisoned(
    world: World,
    jobs: list[tuple[RunConfig, Path, int | None]],
    poison: Poison,
    ranks: tuple[int, ...] = (0, 1, 2),
) -> list[str]:
    """One run after the other, each on poisoned data; poison that is NaN is on `ranks` only."""
    outcomes = []
    for settings, run, stop_at in jobs:
        work = pretraining(settings, num_ranks=world.size)
        work.task.__class__ = Poisoned
        work.task.poison = poison if world.rank in ranks else {}  # type: ignore[attr-defined]
        work.task.accumulation = work.accumulation  # type: ignore[attr-defined]
        outcomes.append(run_attempt(world, run, replace(work), stop_at=stop_at))
    return outcomes


def story(run: Path) -> list[tuple[Any, ...]]:
    """What can be compared of every row: all but times, attempts and reasons."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "data_hash", "val_loss")
    keys = (*keys, "skipped")
    return [tuple(row.get(key) for key in keys) for row in read_metrics(run)]


def same_weights(left: Path, right: Path, step: int) -> bool:
    """Whether two runs have the same bytes in every file of a checkpoint but its manifest."""
    one, other = step_folder(left, step), step_folder(right, step)
    names = [path.name for path in sorted(one.glob("*.safetensors"))]
    assert names
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


GUARDED = ("steps=12", "eval.samples=1", "guard.window=4", "guard.patience=2")


def test_a_step_that_one_rank_finds_bad_is_skipped_by_all_as_if_listed(
    dataset: Path, tmp_path: Path
) -> None:
    found, listed = tmp_path / "found", tmp_path / "listed"
    jobs = [
        (config(dataset, *GUARDED), found, None),
        (config(dataset, *GUARDED, "guard.skip_steps=[5]"), listed, None),
    ]
    assert run_ranks(2, train_poisoned, jobs, {5: math.nan}, (1,))[0] == ["complete"] * 2
    assert story(found) == story(listed)
    row = next(row for row in read_metrics(found) if row["step"] == 5)
    assert row["skipped"] is True
    assert row["reason"] == "loss nan, gradient norm inf"
    assert row["samples"] == [48, 60]
    assert row["tokens"] == 4 * 384
    assert all(same_weights(found, listed, step) for step in (3, 6, 9, 12))
    (event,) = read_events(found, "skip")
    assert (event["step"], event["samples"], event["loss"]) == (5, [48, 60], None)
    assert read_events(listed, "skip") == []
    assert open_checkpoint(found).state["data"]["consumed_samples"] == 144


def test_what_is_saved_in_a_streak_does_not_displace_the_last_one_before_it(
    dataset: Path, tmp_path: Path
) -> None:
    settings = config(dataset, *GUARDED, "checkpoint.every=1", "checkpoint.keep=1")
    jobs = [(settings, tmp_path / "in it", 6), (settings, tmp_path / "after it", 7)]
    run_ranks(1, train_poisoned, jobs, {5: math.nan, 6: math.nan})
    assert committed(tmp_path / "in it") == [6, 4]
    assert committed(tmp_path / "after it") == [7]


def test_outliers_are_skipped_the_same_way_by_a_resumed_run(dataset: Path, tmp_path: Path) -> None:
    settings = config(dataset, *GUARDED, "guard.outlier=skip")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Stopped between two outliers, in the middle of what the statistics are over.
    jobs = [(settings, whole, None), (settings, cut, 8), (settings, cut, None)]
    found = run_ranks(2, train_poisoned, jobs, {8: 5.0, 9: 5.0, 11: 5.0})[0]
    assert found == ["complete", "stopped", "complete"]
    assert [row["step"] for row in read_metrics(whole) if row.get("skipped")] == [8, 9, 11]
    seen = hindsight(whole, settings.guard).findings
    assert [(one.step, one.decision) for one in seen] == [(n, "skip") for n in (8, 9, 11)]
    assert story(whole) == story(cut)
    assert same_weights(whole, cut, 12)
    assert open_checkpoint(whole).state["guard"] == open_checkpoint(cut).state["guard"]


def test_a_spike_is_rolled_back_to_what_a_skip_list_gives(dataset: Path, tmp_path: Path) -> None:
    spiked, listed, plain = tmp_path / "spiked", tmp_path / "listed", tmp_path / "plain"
    poison = {8: 5.0, 9: 5.0}
    rollback = config(dataset, *GUARDED, "guard.rollback=1")
    jobs = [
        (rollback, spiked, None),
        (config(dataset, *GUARDED, "guard.skip_steps=[8,9]"), listed, None),
        (config(dataset, *GUARDED), plain, None),
    ]
    assert run_ranks(2, train_poisoned, jobs, poison)[0] == ["complete"] * 3
    (event,) = read_events(spiked, "rollback")
    assert (event["steps"], event["samples"], event["number"]) == ([8, 9], [84, 108], 1)
    assert story(spiked) == story(listed)
    assert all(same_weights(spiked, listed, step) for step in (3, 6, 9, 12))
    # The comparison can fail: without the rollback the poison went into the weights.
    assert not same_weights(plain, listed, 9)
    assert open_checkpoint(spiked).state["guard"]["skip_steps"] == [8, 9]
    for run in (spiked, plain):
        (seen,) = hindsight(run, rollback.guard).findings
        assert (seen.step, seen.decision) == (9, "roll back")


def test_a_spike_with_no_checkpoint_before_it_ends_the_run(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    late = config(dataset, *GUARDED, "guard.rollback=1", "checkpoint.every=10")
    with pytest.raises(RankFailure, match="has no checkpoint from before it to go back to"):
        run_ranks(1, train_poisoned, [(late, run, None)], {8: 5.0, 9: 5.0})
    assert attempts(run)[-1]["outcome"] == "failed"
    assert read_events(run, "rollback") == []


def test_checkpoints_that_a_spike_went_into_are_dropped_by_whoever_resumes(
    dataset: Path, tmp_path: Path
) -> None:
    """Killed between the event and the rollback: as if the event had come first in another run."""
    run, listed = tmp_path / "run", tmp_path / "listed"
    poison = {8: 5.0, 9: 5.0}
    plain = config(dataset, *GUARDED)
    jobs = [(plain, run, 9), (config(dataset, *GUARDED, "guard.skip_steps=[8,9]"), listed, None)]
    run_ranks(2, train_poisoned, jobs, poison)
    assert committed(run) == [9, 6, 3]
    (run / "events.jsonl").write_text('{"event": "rollback", "steps": [8, 9], "number": 1}\n')
    assert run_ranks(2, train_poisoned, [(plain, run, None)], poison)[0] == ["complete"]
    assert story(run) == story(listed)
    assert same_weights(run, listed, 12)
    # The new checkpoints know of the rollback and stay.
    leave_spikes(run)
    assert committed(run) == [12, 9, 6, 3]
