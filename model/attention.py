"""Causal grouped-query attention with rotary positions, as in Llama.

Rotary tables are computed in fp32 in every forward pass: T x K / 2 cosines cost nothing beside a
block. As buffers they would be rounded whenever somebody casts the module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.layers import Linear
from model.pointwise import rotate

# B batch, T tokens, D model, H heads, G key and value heads, K head size

Rotary = tuple[Tensor, Tensor]
"""cos and sin of shape [T, H, K/2] or [B, T, H, K/2], or with 1 in the place of H."""


class Attention(nn.Module):
    """Every token attends to itself and to all before it in its sequence, or to those of them that
    a mask names (True: may be seen).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.kv_heads = config.kv_heads
        self.grouped = config.kv_heads != config.num_heads
        kv_size = config.kv_heads * config.head_size
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, kv_size)
        self.value = Linear(config.hidden_size, kv_size)
        self.output = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor, rotary: Rotary, mask_B1TT: Tensor | None = None) -> Tensor:
        heads = (-1, self.head_size)
        q_BTHK = rotate(self.query(x_BTD).unflatten(-1, heads), *rotary)
        cos, sin = (table[..., : self.kv_heads, :] for table in rotary)
        k_BTGK = rotate(self.key(x_BTD).unflatten(-1, heads), cos, sin)
        v_BTGK = self.value(x_BTD).unflatten(-1, heads)
        is_wide_cuda = q_BTHK.is_cuda and q_BTHK.dtype == torch.float32
        if self.grouped and is_wide_cuda:
            # No fp32 kernel there shares heads; torch would write out all T x T scores instead.
            shared = q_BTHK.shape[-2] // self.kv_heads
            k_BTGK, v_BTGK = (x.repeat_interleave(shared, -2) for x in (k_BTGK, v_BTGK))
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BTGK.transpose(1, 2),
            v_BTGK.transpose(1, 2),
            attn_mask=mask_B1TT,
            is_causal=mask_B1TT is None,
            enable_gqa=self.grouped and not is_wide_cuda,
        )
        y_BTD: Tensor = self.output(y_BHTK.transpose(1, 2).flatten(2))
        return y_BTD


def document_mask(doc_ids_BT: Tensor) -> Tensor:
    """[B, 1, T, T], True where the query's token may see the key's: not later, the same document.

    One byte for each pair of tokens.
    """
    num_tokens = doc_ids_BT.shape[1]
    causal_TT = torch.ones(
        num_tokens, num_tokens, dtype=torch.bool, device=doc_ids_BT.device
    ).tril_()
    same_BTT = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
    return same_BTT.logical_and_(causal_TT)[:, None]


def rotary_tables(
    position_ids: Tensor, *, num_heads: int, head_size: int, theta: float, dtype: torch.dtype
) -> Rotary:
    """Tables for positions of shape [T] or [B, T] (arXiv 2104.09864).

    The angles are computed in fp32; only their cosines and sines are rounded to `dtype`.
    """
    exponents = (
        torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    )
    angles = position_ids[..., None, None].float() * (1.0 / theta**exponents)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if position_ids.is_cuda:
        return cos, sin
    # CPU kernels work along contiguous runs: a row of all heads, not K/2 values, halves their time.
    heads = (*position_ids.shape, num_heads, head_size // 2)
    return cos.expand(heads).contiguous(), sin.expand(heads).contiguous()
