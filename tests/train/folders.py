"""Tiny Hugging Face folders with random weights, made by transformers, and their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SHAPES = ("gpt2", "qwen3", "mistral")
CONTEXT = 64
TEXT = (
    "the river runs over the old mill wheel and the wheel turns the stone\n"
    "where does the water come from? it comes from the hills behind the village.\n"
)


def make_tokenizer(folder: Path, *, bos: bool = False, chat_template: str | None = None) -> None:
    """A byte-level BPE that can spell every text; id 0 is <eos>, id 1 is <bos>."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", **({"bos_token": "<bos>"} if bos else {})
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def make_folder(
    folder: Path,
    shape: str = "gpt2",
    *,
    bos: bool = False,
    chat_template: str | None = None,
    **changes: Any,
) -> Path:
    """A language model of 2 layers and width 32 with random weights; returns `folder`."""
    make_tokenizer(folder, bos=bos, chat_template=chat_template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(shape, **{"vocab_size": 320, "eos_token_id": 0, **changes})
    model.save_pretrained(folder)
    return folder


def _model(shape: str, **options: Any) -> Any:
    if shape == "gpt2":
        # Without dropout the numbers do not depend on the micro-batch.
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(**{"bos_token_id": 0, **still, **sizes, **options})
        return transformers.GPT2LMHeadModel(config)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
    }
    if shape == "qwen3":
        return transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**{"bos_token_id": None, **sizes, **options})
        )
    # Its head is the embedding; the window of attention is shorter than the context.
    own = {"bos_token_id": None, "tie_word_embeddings": True, "sliding_window": 32}
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**own, **sizes, **options})
    )
