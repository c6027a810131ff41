"""The learning rate is a pure function with known corners."""

import pytest

from train.schedule import learning_rate
from train.settings import OptimConfig

OPTIM = OptimConfig(lr=1.0, min_lr_ratio=0.1)


def rate(step: int) -> float:
    return learning_rate(step, steps=110, warmup_steps=10, optim=OPTIM)


def test_corners() -> None:
    assert rate(1) == pytest.approx(0.1)
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)


def test_rises_then_falls() -> None:
    rates = [rate(step) for step in range(1, 111)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
