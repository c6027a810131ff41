"""What a model costs: parameters, FLOPs per token, bytes of activations. Arithmetic, no torch."""

from __future__ import annotations

import math
from functools import cache

from model.config import ModelConfig, parameter_shapes


@cache
def num_parameters(config: ModelConfig, *, padded: bool = True) -> int:
    """Trainable values, tied ones once; `padded=False` leaves out what is cut at export."""
    total = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    tables = 1 if config.tie_embeddings else 2
    spare_rows = config.padded_vocab_size - config.vocab_size
    return total if padded else total - tables * spare_rows * config.hidden_size


def num_tensors(config: ModelConfig) -> int:
    """Parameter tensors, a tied one once."""
    return len(parameter_shapes(config))


@cache
def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs per token: 6 N + 12 L D T (arXiv 2204.02311, appendix B).

    N counts the matrices that multiply a token, so the head but not the lookup of the embedding.
    As in every published MFU, recomputed activations do not count and attention counts all T keys,
    although a causal kernel skips half of them.
    """
    matrices = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(config).items()
        if len(shape) == 2 and (config.tie_embeddings or name != "embedding.weight")
    )
    attention = 12 * config.num_layers * config.hidden_size * seq_len
    return float(6 * matrices + attention)


def activation_bytes(
    config: ModelConfig, *, micro_batch: int, seq_len: int, value_bytes: int
) -> int:
    """Bytes kept from the forward to the backward pass for a micro-batch of sequences.

    Per token a block keeps 6 D + 2 G K + 3 F values (two norms with input and output, query, the
    attention's output, key and value, three of the feed-forward layer) and H + 2 scalars in fp32;
    the end keeps 2 D values and the log-probabilities in fp32. With activation checkpointing each
    block keeps its input, and one block at a time the rest.
    """
    key_value = config.kv_heads * config.head_size
    values = 6 * config.hidden_size + 2 * key_value + 3 * config.ffn_size
    block = values * value_bytes + (config.num_heads + 2) * 4
    if config.activation_checkpointing:
        blocks = config.num_layers * config.hidden_size * value_bytes + block
    else:
        blocks = config.num_layers * block
    end = 2 * config.hidden_size * value_bytes + (config.vocab_size + 1) * 4
    return micro_batch * seq_len * (blocks + end)
