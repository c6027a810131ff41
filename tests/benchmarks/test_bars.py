"""A benchmark that misses a bar fails, and says which."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks import data_speed, scale
from tests.benchmarks.bars import Bar, judge


def speed(**changes: float) -> dict[str, Any]:
    """Figures that reach every bar, but for the changed ones."""
    kept = {"ours": 1.3, "mosaicml-streaming": 0.2, "prepare": 0.95, "waiting": 0.004, **changes}
    return {
        "loading": {name: {"ratio": kept[name]} for name in ("ours", "mosaicml-streaming")},
        "preparing": {"prepare": {"ratio": kept["prepare"]}},
        "waiting": {"mean_wait_share": kept["waiting"]},
    }


def opening(**changes: float) -> dict[str, dict[str, float]]:
    row = {"wall_seconds": 0.4, "cpu_seconds": 0.4, "rank_mb": 60.0, "open_files": 40.0}
    row = {**row, "together_mb": 150.0, **changes}
    return {"0 workers": row, "2 workers": {**row, "each_worker_mb": 500.0, "wall_seconds": 9.0}}


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"ours": 0.99}, "loading over memmap is 0.99, it has to be at least 1"),
        ({"mosaicml-streaming": 0.25}, "loading over mosaicml-streaming is 5.2, it has to be at"),
        ({"prepare": 0.89}, "preparing over sentencepiece encode is 0.89, it has to be at least"),
        ({"waiting": 0.01}, "mean waiting share of a 50 ms step is 0.01, it has to be below 0.01"),
        ({"waiting": float("nan")}, "mean waiting share"),
    ],
)
def test_a_bar_of_speed_that_is_missed_is_named(
    capsys: pytest.CaptureFixture[str], figures: dict[str, float], told: str
) -> None:
    assert judge(data_speed.bars(speed(**figures))) == 1
    assert f"missed: {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"wall_seconds": 2.0}, "0 workers: wall_seconds is 2, it has to be below 2"),
        ({"cpu_seconds": 2.5}, "2 workers: cpu_seconds is 2.5, it has to be below 2"),
        ({"together_mb": 202.0}, "2 workers: together_mb is 202, it has to be below 200"),
        ({"rank_mb": 201.0}, "2 workers: rank_mb is 201, it has to be below 200"),
        ({"open_files": 257.0}, "0 workers: open_files is 257, it has to be below 257"),
    ],
)
def test_a_bar_of_scale_that_is_missed_is_named(
    capsys: pytest.CaptureFixture[str], figures: dict[str, float], told: str
) -> None:
    assert judge(scale.bars(opening(**figures))) == 1
    assert f"missed: {told}" in capsys.readouterr().err


def test_what_is_reached_or_not_installed_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    figures = speed()
    del figures["loading"]["mosaicml-streaming"]
    assert judge([*data_speed.bars(speed()), *data_speed.bars(figures)]) == 0
    assert judge([*scale.bars(opening()), Bar("exactly", 1.0, at_least=1.0)]) == 0
    assert capsys.readouterr().err == ""
