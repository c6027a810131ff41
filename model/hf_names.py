"""The name table between our parameters and transformers' LlamaForCausalLM.

Pure dict -> dict: every matrix has the same layout on both sides, so a conversion renames and, on
our side, pads the vocabulary. Files are read and written elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from model.config import ModelConfig, ModelConfigError, parameter_shapes

HF_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.ffn.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.ffn.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.ffn.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Ours -> theirs; {} is the number of the block."""

PADDED = ("embedding.weight", "head.weight")
"""One row per token id; ours have padded_vocab_size rows, theirs vocab_size."""


class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, key: slice, /) -> Self: ...


Array = TypeVar("Array", bound=_Array)


def hf_name(name: str) -> str:
    """Their name of a parameter of ours."""
    layer = re.search(r"\d+", name)
    return HF_NAMES[re.sub(r"\d+", "{}", name)].format(layer[0] if layer else "")


def to_hf_array(name: str, array: Array, config: ModelConfig) -> Array:
    """One parameter of ours as they store it: without the padding of the vocabulary."""
    return array[: config.vocab_size] if name in PADDED else array


def to_hf_state(state: Mapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    """Our parameters under their names. Views where nothing is cut; numpy or torch."""
    return {
        hf_name(name): to_hf_array(name, state[name], config) for name in parameter_shapes(config)
    }


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their parameters under our names, the vocabulary padded with zeros.

    ModelConfigError when one is missing or has another shape, or when one is left over.
    """
    ours = {}
    for name, shape in parameter_shapes(config).items():
        theirs = hf_name(name)
        if theirs not in state:
            raise ModelConfigError(
                f"the weights have no {theirs!r}; they are of another architecture"
            )
        tensor = state[theirs]
        cut = (config.vocab_size, *shape[1:]) if name in PADDED else shape
        if tuple(tensor.shape) != cut:
            raise ModelConfigError(
                f"{theirs!r} has shape {tuple(tensor.shape)}, config.json asks for {cut}"
            )
        ours[name] = F.pad(tensor, (0, 0, 0, shape[0] - cut[0])) if shape != cut else tensor
    known = {hf_name(name) for name in ours}
    # A tied head repeats the embedding, and old files carry the rotary frequencies.
    left = [n for n in state if n not in known and not _implied(n, config)]
    if left:
        raise ModelConfigError(
            f"the weights have {left[0]!r}, which a Llama without biases does not"
        )
    return ours


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, without the special token ids and the dtype."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        # The first is read by transformers 5, the second by everybody else.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }


def from_hf_config(table: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Llama's config.json; ModelConfigError names what we cannot express."""
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    heads = table.get("num_attention_heads", 0)
    head_size = table.get("hidden_size", 0) // heads if heads else 0
    asked = {
        "model_type": (table.get("model_type"), "llama"),
        "hidden_act": (table.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(table.get("attention_bias")), False),
        "mlp_bias": (bool(table.get("mlp_bias")), False),
        "head_dim": (table.get("head_dim") or head_size, head_size),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for key, (found, ours) in asked.items():
        if found != ours:
            raise ModelConfigError(f"config.json has {key}={found!r}; only {ours!r} can be read")
    try:
        return ModelConfig(
            vocab_size=table["vocab_size"],
            num_layers=table["num_hidden_layers"],
            hidden_size=table["hidden_size"],
            num_heads=heads,
            num_kv_heads=table.get("num_key_value_heads") or heads,
            ffn_size=table["intermediate_size"],
            max_seq_len=table.get("max_position_embeddings", 0),
            rope_theta=rope.get("rope_theta", table.get("rope_theta", 10_000.0)),
            norm_eps=table.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(table.get("tie_word_embeddings")),
            init_std=table.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ModelConfigError(f"config.json has no key {error.args[0]!r}") from None
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ModelConfigError(f"config.json: {reasons}") from None


def _implied(name: str, config: ModelConfig) -> bool:
    tied_head = config.tie_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith("rotary_emb.inv_freq")
