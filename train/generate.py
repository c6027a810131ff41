"""Continue a text with any Hugging Face language model, by transformers' own generate.

The seed, the temperature and the model decide the text: nothing else shapes the distribution,
whatever top-k or penalty the folder recommends. Temperature 0 takes the likeliest token each time.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

import torch

from train import hf
from train.device import best_device

log = logging.getLogger(__name__)

MAX_TOKENS = 128
"""Tokens to add when nobody says how many."""
TEMPERATURES = (0.001, 1000.0)
"""Below, logits divided by it overflow."""


class GenerateError(ValueError):
    """A request that the model cannot answer."""

    exit_code: ClassVar[int] = 2


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The text that follows `prompt`, of at most `max_tokens` tokens, ended by the end-of-text id.

    An empty prompt asks for the beginning of a document. A prompt that leaves no room for
    `max_tokens` in the model's context loses its left part, with a warning; by default it loses
    only what does not fit into half of the context, and at most MAX_TOKENS are added.
    """
    _check(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
    folder = Path(model)
    tokenizer = hf.load_tokenizer(folder)
    ids, max_tokens = _fit(tokenizer, prompt, hf.context_length(folder), max_tokens)
    device, dtype = best_device()
    module = hf.load_causal(folder, dtype=dtype).to(device)
    eos_id = module.generation_config.eos_token_id
    # A fresh one, because the folder's own may carry top-k, top-p and penalties.
    settings = type(module.generation_config)(
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_id if eos_id is None else eos_id,
        pad_token_id=tokenizer.fill_id,
    )
    module.generation_config = settings
    inputs = torch.tensor([ids], device=device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = module.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
        )
    # Decoding only what is new would lose the space that some tokenizers strip from a text's start.
    return _after(tokenizer, ids, output[0].tolist())


def _check(prompt: str, *, max_tokens: int | None, temperature: float, seed: int) -> None:
    """GenerateError for what no model can do."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise GenerateError(
            f"the prompt is not UTF-8 at its character {error.start + 1}; is the terminal or the "
            "file that it comes from in another encoding?"
        ) from None
    if max_tokens is not None and max_tokens < 1:
        raise GenerateError(f"max_tokens={max_tokens}: write at least 1")
    low, high = TEMPERATURES
    if temperature != 0 and not low <= temperature <= high:
        raise GenerateError(
            f"temperature={temperature}: write 0 for the likeliest token, or {low} to {high:g}"
        )
    if not 0 <= seed < 2**64:
        raise GenerateError(f"seed={seed}: write a number from 0 to 2^64 - 1")


def _fit(
    tokenizer: hf.FolderTokenizer, prompt: str, context: int | None, max_tokens: int | None
) -> tuple[list[int], int]:
    """Ids to continue, and how many tokens to add at most."""
    prefix, ids = tokenizer.prefix_ids, tokenizer.encode(prompt)
    if not prefix + ids:
        prefix = tokenizer.context_ids()
    if context is None:
        return prefix + ids, max_tokens or MAX_TOKENS
    if max_tokens is None:
        max_tokens = min(MAX_TOKENS, max(context - len(prefix) - len(ids), context // 2))
    room = context - max_tokens - len(prefix)
    if room < 0 or (ids and room == 0):
        raise GenerateError(
            f"max_tokens={max_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; write at most {context - len(prefix) - 1}"
        )
    if len(ids) > room:
        log.warning("the prompt has %d tokens; its last %d are used", len(ids), room)
    return prefix + ids[max(len(ids) - room, 0) :], max_tokens


def _after(tokenizer: hf.FolderTokenizer, prompt: list[int], whole: list[int]) -> str:
    before, text = tokenizer.decode(prompt), tokenizer.decode(whole)
    return (
        text[len(before) :] if text.startswith(before) else tokenizer.decode(whole[len(prompt) :])
    )
