"""Measure a Hugging Face folder: perplexity and bits per byte, or the scores of a classifier.

Perplexity: every token of every text is predicted exactly once. A text stands behind the
end-of-text id, as documents do in training; one that is longer than the model's context is read
in windows that overlap by half, and only what no earlier window predicted counts, so that behind
the first window every prediction sees at least half a context. That costs twice the forward passes
of windows that do not overlap. Bits per byte divide by the UTF-8 bytes of the text, so models with
different tokenizers can be compared.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.config import DataError, DataUsageError
from data.instruct import Example, hold_out, read_examples
from data.padding import pad
from data.targets import NO_TARGET, Tokenized, with_label
from model.loss import token_loss_sum
from train import hf
from train.device import best_device
from train.examples_task import confusion
from train.scores import classification_scores
from train.texts import read_texts

log = logging.getLogger(__name__)

SAY_SECONDS = 10.0
"""How long a measurement is silent at most."""
MAX_WINDOW = 4096
"""Longest window in tokens, for models whose context is longer."""
_LOGITS = 2**26
"""Logits of a forward pass: 256 MiB in fp32."""
_GROUP = 64
"""Batches that are sorted by length together, to waste little on padding."""

Split = Literal["all", "train", "val"]


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    split: Split = "all",
) -> dict[str, Any]:
    """Scores of the folder on a dataset's validation split or on a file; JSON-able.

    A language model: loss (nats per token), perplexity, bits_per_byte, num_tokens. A classifier:
    what `classification_scores` gives; `split` chooses the examples of the file that fine-tuning
    trained on or held out.
    """
    if hf.labels_of(model) is None:
        return evaluate_language_model(model, data, text_column=text_column)
    columns = {"--text-column": text_column, "--label-column": label_column}
    if Path(data).is_dir():
        raise DataUsageError(
            f"{model} is a classifier and {data} is a directory; name a .jsonl or .csv file"
        )
    examples = read_examples(data, columns)
    if split != "all":
        examples = hold_out(examples, data)[split == "val"]
    return evaluate_classifier(model, examples)


def evaluate_language_model(
    model: str | Path, data: str | Path, *, text_column: str = "text"
) -> dict[str, float]:
    """loss, perplexity, bits_per_byte and num_tokens of a language model."""
    tokenizer = hf.load_tokenizer(model)
    context_ids = tokenizer.context_ids()
    if not context_ids:
        raise hf.ModelFolderError(
            f"{model}: its tokenizer has no end-of-sequence and no begin-of-sequence token, so the "
            'first token of a text has nothing to follow; name one as "eos_token" in its '
            "tokenizer_config.json"
        )
    max_tokens = min(hf.context_length(model) or MAX_WINDOW, MAX_WINDOW)
    num_bytes = 0

    def all_windows() -> Iterator[Tokenized]:
        nonlocal num_bytes
        for text in read_texts(data, model, tokenizer, text_column=text_column):
            num_bytes += text.num_bytes
            yield from windows(text.ids, context_ids=context_ids, max_tokens=max_tokens)

    device, dtype = best_device()
    module = hf.load_causal(model, dtype=dtype).to(device)
    module.config.use_cache = False
    rows = max(_LOGITS // (max_tokens * tokenizer.num_embeddings), 1)
    loss_sum, num_tokens = 0.0, 0
    said = time.monotonic()
    for chunk in _batched(all_windows(), rows):
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            log.info("%s tokens measured", f"{num_tokens:,}")
        batch = pad(chunk, num_rows=len(chunk), max_tokens=max_tokens, pad_id=0)
        logits, labels = _forward(module, batch, device)
        loss_sum += float(token_loss_sum(logits, labels))
        num_tokens += sum(window.num_targets for window in chunk)
    if not num_tokens:
        raise DataError(f"{data} holds no text that the model's tokenizer gives an id for")
    loss = loss_sum / num_tokens
    return {
        "loss": loss,
        # A model far from the text overflows; infinity is no JSON.
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss_sum / math.log(2) / num_bytes,
        "num_tokens": num_tokens,
    }


def evaluate_classifier(model: str | Path, examples: Sequence[Example]) -> dict[str, Any]:
    """`classification_scores` of a classifier on examples with its labels."""
    labels = hf.labels_of(model)
    assert labels is not None, "the folder is a classifier"
    index = {label: number for number, label in enumerate(labels)}
    if unknown := sorted({example.target for example in examples} - index.keys()):
        raise DataError(
            f"the label {unknown[0]!r} is not one of {model}, which has "
            f"{', '.join(repr(label) for label in labels[:20])}; is it the right column?"
        )
    tokenizer = hf.load_tokenizer(model)
    max_tokens = min(tokenizer.max_tokens, hf.context_length(model) or tokenizer.max_tokens)
    inputs = tokenizer.encode_inputs([e.text for e in examples], max_tokens=max_tokens)
    rows = [
        with_label(ids, index[example.target])
        for (ids, _), example in zip(inputs, examples, strict=True)
    ]
    device, dtype = best_device()
    module = hf.load_classifier(model, dtype=dtype).to(device)
    confusion_LL = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    for chunk in _batched(rows, 32):
        batch = pad(
            chunk,
            num_rows=len(chunk),
            max_tokens=max_tokens,
            pad_id=tokenizer.fill_id,
            one_label=True,
        )
        confusion_LL += confusion(*_forward(module, batch, device))
    return classification_scores(confusion_LL.numpy(), labels)


def windows(
    ids: Sequence[int], *, context_ids: Sequence[int], max_tokens: int
) -> Iterator[Tokenized]:
    """A text in windows of at most `max_tokens` inputs in which every id is a target exactly once.

    The text stands behind `context_ids`, which are no targets.
    """
    assert 0 < len(context_ids) < max_tokens, "the context leaves room for the text"
    stream = np.array([*context_ids, *ids], dtype=np.int64)
    next_target, end = len(context_ids), 0
    while next_target < len(stream):
        step = max_tokens if end == 0 else max(max_tokens // 2, 1)
        end = min(end + step, len(stream) - 1)
        start = max(end - max_tokens, 0)
        labels = stream[start + 1 : end + 1].copy()
        labels[: next_target - start - 1] = NO_TARGET
        yield Tokenized(stream[start:end], labels)
        next_target = end + 1


def _forward(
    module: Any, batch: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    placed = {key: value.to(device) for key, value in batch.items()}
    labels = placed.pop("labels")
    with torch.inference_mode():
        return module(**placed).logits, labels


def _batched(rows: Iterable[Tokenized], size: int) -> Iterator[list[Tokenized]]:
    """Lists of `size` rows of similar length."""
    rows = iter(rows)
    while group := list(islice(rows, size * _GROUP)):
        group.sort(key=lambda row: len(row.input_ids), reverse=True)
        for first in range(0, len(group), size):
            yield group[first : first + size]
