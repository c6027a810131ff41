"""Pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from train.settings import OptimConfig


def learning_rate(step: int, *, steps: int, warmup_steps: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (1 .. steps): linear warm-up, then a cosine to lr *
    min_lr_ratio.

    The last warm-up step runs at the peak and the last step of the run at the floor.
    """
    if step <= warmup_steps:
        return optim.lr * step / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def due(every: int, step: int) -> bool:
    """Whether something that happens `every` so many steps, 0 being never, happens at this one."""
    return every > 0 and step % every == 0
