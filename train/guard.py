"""The numeric guard: which steps are not taken, and when a run goes back.

A step whose loss or gradient norm is no number, or by `guard.outlier` out of the ordinary, is
skipped: no update, so that weights, moments and their counters stay; its samples count as consumed
and the learning rate goes on by the step's number. A step on the skip list is skipped without a
forward pass; for all that follows the two are the same.

Ordinary means at most `guard.sigmas` robust deviations above the median of the last `guard.window`
good steps; nothing is out of the ordinary before so many are known. Values of steps that were
skipped or high never enter. All of this state is in every checkpoint, so that a resumed run decides
as the uninterrupted one. Costs 0.1 ms a step. No torch here.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from train.settings import GuardConfig

Decision = Literal["step", "skip", "roll back", "give up"]

SIGMA_PER_MAD = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations."""
SMALLEST_SIGMA = 1e-3
"""As a fraction of the median: where nothing varies, rounding is no outlier."""


class NonFiniteLoss(ValueError):
    """The loss or the gradient is NaN, infinite or out of bounds too many times in a row; nothing
    of the last step is saved.
    """

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Verdict:
    """What one rank thinks of a step before it is taken."""

    is_bad: bool
    """The step must not be taken."""
    is_high: bool
    """Loss or gradient norm is no number, or above its bound."""
    reason: str
    """Why; empty for a good step."""


class Guard:
    """Judges steps, counts, and remembers. Every rank has one, and all of them decide alike."""

    def __init__(
        self,
        config: GuardConfig,
        state: Mapping[str, Any] | None = None,
        *,
        rollbacks: Sequence[Sequence[int]] = (),
    ) -> None:
        """`state` is that of a checkpoint, `rollbacks` the steps of each rollback of the run so
        far.
        """
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._bad: list[int] = []
        self._high: list[int] = []
        self._rolled_back: set[int] = {step for steps in rollbacks for step in steps}
        self.rollbacks = len(rollbacks)
        self._restore(state or {})

    def lists(self, step: int) -> str:
        """Why this step is skipped without a look at it; empty when it is not."""
        if step in self._config.skip_steps:
            return "listed in guard.skip_steps"
        return "listed by a rollback" if step in self._rolled_back else ""

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """This rank's opinion; changes nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict(True, True, f"loss {loss}, gradient norm {grad_norm}")
        if self._config.outlier == "off" and self._config.rollback == 0:
            return Verdict(False, False, "")
        loss_reason = self._above("loss", loss, self._losses)
        norm_reason = self._above("gradient norm", grad_norm, self._norms)
        return Verdict(
            is_bad=self._config.outlier == "skip" and bool(loss_reason or norm_reason),
            is_high=bool(loss_reason or norm_reason),
            reason=", ".join(filter(None, [loss_reason, norm_reason])),
        )

    def settle(
        self, step: int, *, loss: float, grad_norm: float, is_bad: bool, is_high: bool
    ) -> Decision:
        """What becomes of the step, once the ranks have agreed on what it is; counts it."""
        self._bad = [*self._bad, step] if is_bad else []
        self._high = [*self._high, step] if is_high else []
        too_many = len(self._bad) > self._config.max_skips
        if self.rollbacks < self._config.rollback and (
            too_many or len(self._high) >= self._config.patience
        ):
            return "roll back"
        if too_many:
            return "give up"
        if is_bad:
            return "skip"
        if not is_high:
            self._losses.append(loss)
            self._norms.append(grad_norm)
        return "step"

    @property
    def num_missing(self) -> int:
        """Good steps that have to come before anything is out of the ordinary."""
        asked = self._config.outlier != "off" or self._config.rollback > 0
        return self._config.window - len(self._losses) if asked else 0

    @property
    def spike(self) -> range:
        """The steps since the trouble began: what a rollback lists."""
        return range(min(self._bad + self._high), max(self._bad + self._high) + 1)

    @property
    def skipped(self) -> list[int]:
        """The steps in a row that were not taken, the last one included."""
        return list(self._bad)

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Be as at the checkpoint that has `state`, but for one more rollback and its steps."""
        self._rolled_back.update(self.spike)
        self.rollbacks += 1
        self._restore(state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "bad": list(self._bad),
            "high": list(self._high),
            "rollbacks": self.rollbacks,
            "skip_steps": sorted(self._rolled_back),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._losses = deque(state.get("losses", ()), maxlen=self._config.window)
        self._norms = deque(state.get("grad_norms", ()), maxlen=self._config.window)
        self._bad = list(state.get("bad", ()))
        self._high = list(state.get("high", ()))
        # A rollback is recorded in events.jsonl first, so that a checkpoint may know less.
        self.rollbacks = max(self.rollbacks, state.get("rollbacks", 0))
        self._rolled_back.update(state.get("skip_steps", ()))

    def _above(self, what: str, value: float, known: deque[float]) -> str:
        if len(known) < self._config.window:
            return ""
        limit = bound(known, self._config.sigmas)
        if value <= limit:
            return ""
        return (
            f"{what} {value:.6g} is above {limit:.6g}, {self._config.sigmas:g} sigmas over the "
            f"last {len(known)} good steps"
        )


def trouble_began(state: Mapping[str, Any]) -> int:
    """The first of the bad or high steps in a row that end at a checkpoint with this state; 0 when
    its last step was a good one.
    """
    return min([*state.get("bad", ()), *state.get("high", ())], default=0)


def bound(values: Iterable[float], sigmas: float) -> float:
    """The median plus `sigmas` standard deviations, estimated by the median absolute deviation."""
    known = list(values)
    middle = statistics.median(known)
    deviation = SIGMA_PER_MAD * statistics.median(abs(value - middle) for value in known)
    return middle + sigmas * max(deviation, SMALLEST_SIGMA * abs(middle))
