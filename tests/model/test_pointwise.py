from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from model.attention import rotary_tables
from model.pointwise import rms_norm, rotate, swiglu


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def _tables(num_tokens: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(num_tokens)
    return rotary_tables(
        positions, num_heads=2, head_size=head_size, theta=100.0, dtype=torch.float64
    )


def test_gradients_equal_finite_differences() -> None:
    cos, sin = _tables(3, 8)
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (_random(2, 3, 8), _random(8)))
    assert gradcheck(swiglu, (_random(2, 3, 5), _random(3, 2, 5).view(2, 3, 5)))
    assert gradcheck(lambda x: rotate(x, cos, sin), (_random(2, 3, 2, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs_own(dtype: torch.dtype) -> None:
    x, weight = _random(4, 16, 64, dtype=dtype), _random(64, dtype=dtype)
    grad = torch.linspace(-1, 1, 4 * 16 * 64).view(4, 16, 64).to(dtype)
    ours = rms_norm(x, weight, 1e-5)
    theirs = F.rms_norm(x, (64,), weight, 1e-5)
    # Both compute in fp32 and differ by the order of a sum over 64 values; bf16 keeps 8 bits.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    ours_grad = torch.autograd.grad(ours, (x, weight), grad)
    theirs_grad = torch.autograd.grad(theirs, (x, weight), grad)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=2 * tolerance, atol=2 * tolerance)


def test_rms_norm_in_bf16_loses_only_the_final_rounding() -> None:
    x = _random(8, 256, dtype=torch.bfloat16).detach()
    weight = torch.ones(256, dtype=torch.bfloat16)
    exact = rms_norm(x.double(), weight.double(), 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5), exact.float().to(torch.bfloat16))


def test_swiglu_is_silu_times_up() -> None:
    gate, up = _random(2, 3, 5), _random(3, 2, 5).view(2, 3, 5)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)


def test_rotation_depends_on_distances_alone() -> None:
    q, k = _random(1, 1, 1, 16), _random(1, 1, 16).view(1, 1, 1, 16)
    products = []
    for shift in (0, 5, 1000):
        positions = torch.tensor([shift, shift + 3])
        tables = rotary_tables(positions, num_heads=1, head_size=16, theta=1e4, dtype=torch.float64)
        turned_q = rotate(q, *(table[1:] for table in tables))
        turned_k = rotate(k, *(table[:1] for table in tables))
        products.append(float((turned_q * turned_k).detach().sum()))
    # The angles are fp32: at position 1000 they are rounded to 2^-14.
    assert products == pytest.approx([products[0]] * 3, rel=1e-3)
    plain = float((q * k).detach().sum())
    assert products[0] != pytest.approx(plain, rel=1e-2)
