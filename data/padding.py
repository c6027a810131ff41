"""Examples of different lengths as padded micro-batches, dealt to ranks as in loader.py.

A micro-batch is as long as its longest example, rounded up to a multiple of 8. Padding stands on
the right and attention does not see it; a dummy attends to its first place alone, because a row
that attends to nothing gives NaN, whose gradient would reach every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from data.config import accumulation
from data.loader import Batch, sample_hash
from data.targets import NO_TARGET, Tokenized

# B examples of a micro-batch, T tokens of the longest one
MULTIPLE = 8


def padded_batches(
    examples: Sequence[Tokenized],
    samples: range,
    *,
    order: Callable[[range], list[int]],
    rank: int,
    num_ranks: int,
    micro_batch: int,
    max_tokens: int,
    pad_id: int,
) -> Iterator[Batch]:
    """This rank's micro-batches of one step: input_ids, attention_mask [B,T], labels [B,T] or [B],
    all int64, and data_hash, a scalar.

    `order` says which example each sample is. Places beyond the batch are dummies.
    """
    chosen = order(samples)
    for micro in range(accumulation(len(samples), num_ranks, micro_batch)):
        first = (micro * num_ranks + rank) * micro_batch
        places = range(first, min(first + micro_batch, len(samples)))
        batch = pad(
            [examples[chosen[place]] for place in places],
            num_rows=micro_batch,
            max_tokens=max_tokens,
            pad_id=pad_id,
            one_label=examples[0].labels.ndim == 0,
        )
        hashes = (
            sample_hash(samples.start + place, examples[chosen[place]].identity())
            for place in places
        )
        total = sum(hashes) % 2**64
        batch["data_hash"] = torch.tensor(total - 2**64 if total >= 2**63 else total)
        yield batch


def pad(
    examples: Sequence[Tokenized],
    *,
    num_rows: int,
    max_tokens: int,
    pad_id: int,
    one_label: bool = False,
) -> Batch:
    """The examples on top of each other, dummies below them up to `num_rows`.

    `max_tokens` bounds the width: padding never reaches beyond the positions that a model has.
    """
    longest = max((len(example.input_ids) for example in examples), default=1)
    assert longest <= max_tokens, "examples are cut before they are padded"
    width = min(-(-longest // MULTIPLE) * MULTIPLE, max_tokens)
    input_ids_BT = np.full((num_rows, width), pad_id, dtype=np.int64)
    attention_mask_BT = np.zeros((num_rows, width), dtype=np.int64)
    attention_mask_BT[:, 0] = 1
    labels = np.full(num_rows if one_label else (num_rows, width), NO_TARGET, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids_BT[row, :length] = example.input_ids
        attention_mask_BT[row, :length] = 1
        if one_label:
            labels[row] = example.labels
        else:
            labels[row, :length] = example.labels
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "attention_mask": torch.from_numpy(attention_mask_BT),
        "labels": torch.from_numpy(labels),
    }
