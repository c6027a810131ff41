"""A GPT in pure torch: token ids in, logits out. Runs in the type that its parameters are cast to.

`init_weights` is the only place that draws numbers. The value of a parameter depends on (seed,
name, shape) alone, never on the order of construction, the device or the number of ranks.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, Rotary, document_mask, rotary_tables
from model.config import ModelConfig, parameter_shapes
from model.layers import Embedding, Linear, RMSNorm, SwiGLU

# B batch, T tokens, D model, V vocabulary, P padded vocabulary


class Block(nn.Module):
    """Attention, then a feed-forward layer, each normalised before and added after."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLU(config.hidden_size, config.ffn_size)

    def forward(self, x_BTD: Tensor, rotary: Rotary, mask_B1TT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, mask_B1TT)
        y_BTD: Tensor = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return y_BTD


class GPT(nn.Module):
    """Next-token logits. Parameters are NaN until `init_weights` or a load fills them."""

    def __init__(self, config: ModelConfig) -> None:
        """ModelConfigError when config.vocab_size is still open."""
        super().__init__()
        parameter_shapes(config)
        self.config = config
        self.embedding = Embedding(config.padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.padded_vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] for int64 ids [B, T]; positions count from 0 unless given.

        With document ids no token sees another document; without, every token sees all before it.
        """
        config = self.config
        if position_ids_BT is None:
            position_ids_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        x_BTD = self.embedding(input_ids_BT)
        rotary = rotary_tables(
            position_ids_BT,
            num_heads=config.num_heads,
            head_size=config.head_size,
            theta=config.rope_theta,
            dtype=x_BTD.dtype,
        )
        mask_B1TT = None if doc_ids_BT is None else document_mask(doc_ids_BT)
        for block in self.blocks:
            if config.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, mask_B1TT, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, mask_B1TT)
        logits_BTP: Tensor = self.head(self.norm(x_BTD))
        return logits_BTP[..., : config.vocab_size]


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter by this table, in fp32 and rounded to the parameter's type.

        *norm.weight                                 1
        *.attention.output.weight, *.ffn.down.weight normal, init_std / sqrt(2 * num_layers)
        everything else                              normal, init_std

    The smaller ones keep the variance of the residual stream independent of depth (GPT-2: Radford
    et al. 2019, section 2.3).
    """
    config = model.config
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        to_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
        std = config.init_std / math.sqrt(2 * config.num_layers) if to_residual else config.init_std
        parameter.copy_(
            torch.randn(parameter.shape, generator=_generator(seed, name), dtype=torch.float32)
            * std
        )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"init/{seed}/{name}".encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit number.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
