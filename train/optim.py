"""AdamW over two groups: matrices decay, everything else does not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from train.inventory import Dtype, Inventory, Parameter
from train.settings import OptimConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq")
"""State of the size of the parameters that `adamw` has after its first step. Checkpoints discover
what there is; this only tells how large the first one will be."""


def adamw(module: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """A fused AdamW over the module's trainable parameters; the learning rate is set per step by
    the engine.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def inventory_of(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, precision: Dtype
) -> Inventory:
    """What a model consists of that computes in `precision`; before anything is sharded."""
    groups = {
        id(parameter): number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    return {
        name: Parameter(
            shape=list(parameter.shape),
            dtype=precision,
            trainable=parameter.requires_grad,
            group=groups.get(id(parameter)),
        )
        for name, parameter in parameters.items()
    }


def gradient_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Global L2 norm of the gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def clip(parameters: list[torch.Tensor], clip_norm: float, norm: torch.Tensor | None) -> float:
    """Scale the gradients down to a norm, 0 being none; returns what it was."""
    norm = gradient_norm(parameters) if norm is None else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm or float("inf"), norm)
    return float(norm)


def finite_or_inf(norm: torch.Tensor) -> float:
    """A norm, or inf for one that is no number."""
    # DeepSpeed marks a norm that is no number as -1 and reports it as infinite.
    found = float(norm)
    return found if math.isfinite(found) and found >= 0 else math.inf


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
