"""What a resume promises of the numbers to come, and against which attempt it looks."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.attempts import begin_attempt
from train.config import JobConfig
from train.opening import tell_promise
from train.promise import promise
from train.settings import TrainConfig
from train.world import World


@pytest.mark.parametrize(
    ("table", "changed", "device", "says"),
    [
        ({}, [], "cpu", "every number is, to the last bit"),
        ({}, ["checkpoint.every: 1 -> 2"], "cpu", "every number is, to the last bit"),
        (
            {},
            ["world_size: 1 -> 2"],
            "cpu",
            "(under dropout by more), because of world_size: 1 -> 2",
        ),
        ({}, ["zero.stage: 1 -> 2"], "cpu", "last digits, because of zero.stage: 1 -> 2"),
        ({}, ["torch: '1' -> '2'"], "cpu", "last digits, because of torch: '1' -> '2'"),
        ({}, ["instructions: 'AVX2' -> 'DEFAULT'"], "cpu", "because of instructions: 'AVX2' -> "),
        ({}, ["headrace's code: '1' -> '2'"], "cpu", "because of headrace's code: '1' -> '2'"),
        ({}, ["guard.outlier: 'off' -> 'skip'"], "cpu", "left out, because of guard.outlier: "),
        ({}, ["data.on_damage: 'fail' -> 'x'"], "cpu", "left out, because of data.on_damage: "),
        ({}, ["guard.check_every: 1 -> 2"], "cpu", "every number is, to the last bit"),
        ({}, ["guard.repeat_every: 1 -> 2"], "cpu", "every number is, to the last bit"),
        ({}, [], "cuda", "without train.deterministic=true"),
        ({"deterministic": True}, [], "cuda", "every number is, to the last bit"),
        ({"deterministic": True}, ["world_size: 1 -> 2"], "cuda", "because of world_size"),
        (
            {"reproducible": "across_world_sizes"},
            ["world_size: 1 -> 2"],
            "cuda",
            "every number is, to the last bit",
        ),
    ],
)
def test_a_resume_says_what_it_promises(
    table: dict[str, Any], changed: list[str], device: str, says: str
) -> None:
    assert says in promise(TrainConfig.model_validate(table), changed, device=device)


def told(
    world: World, run: Path, caplog: pytest.LogCaptureFixture, *, wrote: int, step: int = 3
) -> str:
    """What the last of three attempts says: the first on one rank, the others on two, the last of
    them with steps to skip.
    """
    config = JobConfig.model_validate({"precision": "fp32", "guard": {"skip_steps": [1, 4]}})
    sizes_and_configs = [(1, JobConfig(precision="fp32")), (2, JobConfig(precision="fp32"))]
    for number, (size, made) in enumerate([*sizes_and_configs, (2, config)], 1):
        begin_attempt(run, number, world_size=size, resumed_from=None, config=made, machine={})
    saved: Any = SimpleNamespace(state={"attempt": wrote}, step=step)
    work: Any = SimpleNamespace(config=config)
    with caplog.at_level(logging.INFO):
        tell_promise(world, run, work, 3, saved)
    return caplog.text


def test_the_attempt_that_wrote_the_checkpoint_counts_and_not_the_one_before(
    world_of_one: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second attempt died before it had saved anything."""
    assert "because of world_size: 1 -> 2" in told(world_of_one, tmp_path, caplog, wrote=1)


def test_steps_that_are_listed_after_they_were_taken_are_named(
    world_of_one: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = told(world_of_one, tmp_path, caplog, wrote=2)
    assert "left out, because of guard.skip_steps: [] -> [1, 4]" in text
    assert "world_size" not in text
    assert "guard.skip_steps comes too late for steps [1]: " in text
    assert "begin another --run with them" in text


def test_without_the_row_of_its_attempt_nothing_is_promised(
    world_of_one: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = told(world_of_one, tmp_path, caplog, wrote=7)
    assert "not known: " in text and "does not tell how attempt 7 was started" in text
    assert "to the last bit, that" not in text
