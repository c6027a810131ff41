"""AdamW over two groups: matrices decay, everything else does not."""

from __future__ import annotations

import torch

from train.tables import OptimConfig

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
