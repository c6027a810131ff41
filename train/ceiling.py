"""How fast a device multiplies matrices, measured: what MFU is a fraction of, and what tells that a
precision costs time here instead of saving it.
"""

from __future__ import annotations

import time

import torch

CEILING_SECONDS = 0.2
"""How long an attempt measures at its start."""
SLOW = 0.5
"""A share of the fp32 rate below which bf16 is advised against. CPUs with AVX-512 instructions for
it reach 2; with AVX2 alone it is 0.02 to 0.4, by the layout of the operands.
"""
TRIES = 3
"""Of which the best counts: others may be at work on the same CPU."""


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 0.0, size: int = 0
) -> float:
    """Measured FLOP/s of square matrix products on this device.

    The products are the three of a linear layer: of its output, and of the gradients of its input
    and its weight; their operands lie otherwise in memory, and some kernels mind. Values are
    random: constant ones draw less power, and a GPU multiplies them a tenth faster.
    """
    size = size or (8192 if device.type == "cuda" else 768)
    # A generator of its own: what training draws must not depend on what was measured.
    own = torch.Generator(device).manual_seed(0)
    x = torch.empty(size, size, device=device, dtype=dtype).uniform_(-1, 1, generator=own)
    weight, grad = x.clone(), x.clone()
    _multiply(x, weight, grad)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < (seconds or CEILING_SECONDS):
        _multiply(x, weight, grad)
        count += 3
    return count * 2.0 * size**3 / (time.perf_counter() - start)


def bf16_share(device: torch.device) -> float:
    """The rate of bf16 products as a share of that of fp32 ones."""

    def rate(dtype: torch.dtype) -> float:
        seconds = CEILING_SECONDS / TRIES
        return matmul_flops_per_second(device, dtype, seconds=seconds, size=384)

    return max(rate(torch.bfloat16) / rate(torch.float32) for _ in range(TRIES))


def _multiply(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> None:
    torch.mm(x, weight.t())
    torch.mm(grad, weight)
    torch.mm(grad.t(), x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
