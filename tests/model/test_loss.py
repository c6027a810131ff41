from __future__ import annotations

import torch
from torch.nn import functional as F

from model.loss import IGNORED, token_loss_sum


def _case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 7, 11, generator=generator)).to(dtype)
    labels = torch.randint(11, (2, 7), generator=generator)
    labels[0, 3:5] = IGNORED
    return logits, labels


def test_loss_is_the_sum_over_places_with_a_target() -> None:
    logits, labels = _case(torch.float32)
    by_hand = sum(
        -F.log_softmax(logits[b, t], -1)[labels[b, t]]
        for b in range(2)
        for t in range(7)
        if labels[b, t] != IGNORED
    )
    torch.testing.assert_close(token_loss_sum(logits, labels), by_hand)


def test_dummies_change_neither_loss_nor_gradient() -> None:
    logits, labels = _case(torch.float32)
    logits.requires_grad_()
    labels[1] = IGNORED
    both = token_loss_sum(logits, labels)
    (grad,) = torch.autograd.grad(both, logits)
    assert torch.equal(both, token_loss_sum(logits[:1], labels[:1]))
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    none = token_loss_sum(logits, torch.full_like(labels, IGNORED))
    assert none == 0
    assert torch.autograd.grad(none, logits)[0].count_nonzero() == 0


def test_narrow_logits_are_summed_in_fp32() -> None:
    logits, labels = _case(torch.bfloat16)
    loss = token_loss_sum(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, token_loss_sum(logits.float(), labels))
    assert token_loss_sum(logits.double(), labels).dtype == torch.float64


def test_logits_cut_from_a_padded_head_need_no_copy_first() -> None:
    logits, labels = _case(torch.float32)
    padded = F.pad(logits, (0, 5))[..., :11]
    assert torch.equal(token_loss_sum(padded, labels), token_loss_sum(logits, labels))
