"""The parts of a block that look at one token at a time. Parameters are NaN until filled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.pointwise import rms_norm, swiglu

# B batch, T tokens, D model, F feed-forward


class Linear(nn.Linear):
    """A matrix without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """NaN, so that a model that was never initialised cannot train unnoticed."""
        nn.init.constant_(self.weight, torch.nan)


class Embedding(nn.Embedding):
    """One row per token id."""

    def reset_parameters(self) -> None:
        """NaN, as in Linear."""
        nn.init.constant_(self.weight, torch.nan)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 for narrower types (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), torch.nan))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, ffn_size)
        self.up = Linear(hidden_size, ffn_size)
        self.down = Linear(ffn_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(swiglu(self.gate(x_BTD), self.up(x_BTD)))
        return y_BTD
