"""The shape of a model: every choice that decides its parameters, and their names and shapes.

Imports neither torch nor numpy, so that plans and refusals on a login node answer at once. A shape
that no Hugging Face architecture can express has no key here: what can be configured can be
exported.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

VOCAB_MULTIPLE = 64
"""The embedding and the head have a multiple of this many rows, as tensor cores want them."""


class ModelConfigError(ValueError):
    """A model that cannot be built; the message names the key and what to write instead."""

    exit_code: ClassVar[int] = 2


class ModelConfig(BaseModel):
    """The [model] table of a pretraining recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dialect: Literal["llama"] = "llama"
    """Family of architectures. llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention,
    no biases."""
    vocab_size: Annotated[int, Field(ge=0)] = 0
    """Token ids; 0 is taken from the dataset's tokenizer."""
    num_layers: PositiveInt = 12
    """Transformer blocks."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream; a multiple of 2 * num_heads."""
    num_heads: PositiveInt = 12
    """Query heads of every attention layer."""
    num_kv_heads: Annotated[int, Field(ge=0)] = 0
    """Key and value heads, shared by groups of query heads; 0 means num_heads."""
    ffn_size: PositiveInt = 2048
    """Width between the matrices of the feed-forward layer."""
    max_seq_len: Annotated[int, Field(ge=0)] = 0
    """Longest sequence that the model is meant for, in tokens; 0 means the run's seq_len."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary wavelengths; larger reaches further."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use one matrix as embedding and as head."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial matrices; those that write to the residual stream get
    1 / sqrt(2 num_layers) of it."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and compute the rest again in the backward pass: a third
    more work, far less memory."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with 0 resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head; those beyond vocab_size are cut at export."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            unit = 2 * self.num_heads
            above = -(-self.hidden_size // unit) * unit
            raise ModelConfigError(
                f"hidden_size={self.hidden_size} is no multiple of 2 * num_heads={unit}, and "
                "rotary positions turn pairs of a head's values; "
                f"write hidden_size={above}, or another num_heads"
            )
        if self.num_heads % self.kv_heads:
            fits = ", ".join(
                str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0
            )
            raise ModelConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"these do: {fits}"
            )
        return self


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, in the order of the model.

    ModelConfigError while vocab_size is open.
    """
    if not config.vocab_size:
        raise ModelConfigError(
            "model.vocab_size is 0, which means the vocabulary of the dataset's tokenizer, and no "
            "dataset is named here; write model.vocab_size=N"
        )
    hidden, ffn, kv = config.hidden_size, config.ffn_size, config.kv_heads * config.head_size
    block: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (hidden,),
        "attention.query.weight": (hidden, hidden),
        "attention.key.weight": (kv, hidden),
        "attention.value.weight": (kv, hidden),
        "attention.output.weight": (hidden, hidden),
        "ffn_norm.weight": (hidden,),
        "ffn.gate.weight": (ffn, hidden),
        "ffn.up.weight": (ffn, hidden),
        "ffn.down.weight": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.padded_vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.padded_vocab_size, hidden)
    return shapes
