"""The loop ends by itself when a number is no number, and saves nothing of that step."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

import train.loop
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, losses, train_run
from train.checkpoint import committed
from train.config import RunConfig
from train.events import GIVE_UP, read_events
from train.metrics import read_metrics
from train.run import attempts
from train.world import World


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_no_number_ends_the_run_on_every_rank(
    dataset: Path, tmp_path: Path, world_size: int
) -> None:
    run = tmp_path / "run"
    # AdamW moves every weight by about lr: the second forward pass overflows.
    small = ("checkpoint.every=1", "eval.samples=1", "guard.max_skips=0")
    bad = config(dataset, "optim.lr=1e30", *small)
    with pytest.raises(RankFailure) as caught:
        run_ranks(world_size, train_run, bad, run)
    text = str(caught.value)
    assert "NonFiniteLoss: step 2: loss" in text
    assert "nothing of this step is saved" in text
    assert f"headrace data inspect DATASET --step 2 --run {run}" in text
    assert committed(run) == [1]
    assert [row[0] for row in losses(run)] == [1]
    assert attempts(run)[-1]["outcome"] == "failed"
    (event,) = read_events(run, GIVE_UP)
    assert (event["step"], event["samples"]) == (2, [12, 24])


class Heard(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train_and_listen(
    world: World, jobs: list[tuple[RunConfig, Path, int | None]]
) -> list[list[str]]:
    """What each of these runs says."""
    logger, found = logging.getLogger("train"), []
    logger.setLevel(logging.INFO)
    for job in jobs:
        heard = Heard()
        logger.addHandler(heard)
        train_run(world, *job)
        logger.removeHandler(heard)
        found.append(heard.lines)
    return found


def test_a_run_says_when_nothing_is_saved_before_its_last_step_and_how_to_go_on(
    dataset: Path, tmp_path: Path
) -> None:
    def job(every: int, stop_at: int | None) -> tuple[RunConfig, Path, int | None]:
        small = ("steps=2", "batch_tokens=64", "eval.samples=1", f"checkpoint.every={every}")
        return config(dataset, *small), tmp_path / f"{every}-{stop_at}", stop_at

    # A planned stop saves; the second of equal jobs has passed it.
    jobs = [job(0, None), job(5, None), job(1, None), job(0, 1), job(0, 1)]
    (heard,) = run_ranks(1, train_and_listen, jobs)
    begin = "no checkpoint before the last step: checkpoint.every="
    told = [[line for line in lines if line.startswith(begin)] for lines in heard]
    assert told == [[f"{begin}0"], [f"{begin}5"], [], [], []]
    assert (
        f"{jobs[-1][1]} stands at step 1, which is not before --stop-at 1; to go on, leave "
        "--stop-at out or name a later step"
    ) in heard[-1]


def committed_while_validating(world: World, made: RunConfig, run: Path) -> list[list[int]]:
    """What is committed before each batch of the validation of step 4."""
    original, seen = train.loop.at, []

    def at(phase: str, step: int) -> None:
        if (phase, step) == ("evaluate", 4):
            seen.append(committed(run))
            time.sleep(0.3)  # in which the save is written
        original(phase, step)

    train.loop.at = at
    train_run(world, made, run)
    return seen


def test_a_save_is_committed_while_the_run_validates(dataset: Path, tmp_path: Path) -> None:
    made = config(
        dataset, "steps=5", "checkpoint.every=4", "eval.every=4", "eval.samples=8", "micro_batch=1"
    )
    first, second = run_ranks(2, committed_while_validating, made, tmp_path)
    assert first[0] == second[0] == []
    assert first[-1] == second[-1] == [4]
    (lag,) = [
        row["checkpoint_lag_seconds"]
        for row in read_metrics(tmp_path)
        if row.get("checkpoint_step") == 4
    ]
    assert lag < 0.3 * (len(first) - 1), "the checkpoint is not late because of the validation"
