"""Where documents end inside packed samples, and what follows from it for targets and attention.

    ignore     a sample is one run of tokens, whatever documents it holds
    labels     the first token of a document is no target: nothing before it tells of it
    attention  that, and positions count from 0 in every document, and tokens see only their own

EOS ends a document and belongs to it, so it is still a target. No text encodes to EOS (the control
pieces of sentencepiece and the special tokens of a tokenizer.json match no text, and `headrace
prepare` refuses text whose ids hold it), so one scan for it finds the documents; of one that a
sample cuts, the part begins at the sample's first token.
Samples of a best-fit plan bring the lengths of their parts instead, and the first token of a part
is never a target; nor is padding, which is a document of its own behind the last part.
Cost: 0.2 ms per 8,192 tokens for everything here; with "attention" also a mask of one byte for each
pair of tokens of a sequence, and attention kernels that read it instead of skipping half the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.targets import NO_TARGET

# B samples, T tokens of a sample, N documents or parts of them in all samples
Ints = NDArray[np.int64]


def document_ids(input_ids_BT: NDArray[Any], *, eos_id: int) -> Ints:
    """The document of every token, counted from 0 in each sample, int64 [B,T]."""
    ends_BT = input_ids_BT == eos_id
    doc_ids_BT = np.zeros(input_ids_BT.shape, dtype=np.int64)
    np.cumsum(ends_BT[:, :-1], axis=1, out=doc_ids_BT[:, 1:])
    return doc_ids_BT


def positions_in_documents(doc_ids_BT: Ints) -> Ints:
    """The place of every token in its document, or in the part that the sample holds."""
    places_T = np.arange(doc_ids_BT.shape[1], dtype=np.int64)
    begins_BT = np.where(_begins(doc_ids_BT), places_T, 0)
    positions_BT: Ints = places_T - np.maximum.accumulate(begins_BT, axis=1)
    return positions_BT


def mask_first_tokens(labels_BT: Ints, input_ids_BT: NDArray[Any], *, eos_id: int) -> None:
    """In place. No target where the next token belongs to another document than the input."""
    labels_BT[input_ids_BT == eos_id] = NO_TARGET


def mask_parts(labels_BT: Ints, lens: Sequence[Ints]) -> Ints:
    """Mask in place the labels that do not continue a part of their row, by the lengths of the
    parts of each; returns the part of every input, int64 [B,T]. Rows behind `lens` are dummies.
    """
    num_rows, num_tokens = labels_BT.shape
    parts = np.zeros((num_rows, num_tokens + 1), dtype=np.int64)
    for part, labels, sizes in zip(parts, labels_BT, lens, strict=False):
        used = int(sizes.sum())
        part[:used] = np.repeat(np.arange(len(sizes)), sizes)
        part[used:] = len(sizes)
        labels[(part[1:] != part[:-1]) | (part[1:] == len(sizes))] = NO_TARGET
    return parts[:, :-1]


def cu_seqlens(doc_ids_BT: Ints) -> tuple[NDArray[np.int32], int]:
    """(cumulative lengths int32 [N+1], longest): documents of a batch flattened to [B*T].

    As variable-length attention kernels take them; no document crosses from one row to the next.
    """
    begins = np.flatnonzero(_begins(doc_ids_BT))
    edges = np.append(begins, doc_ids_BT.size).astype(np.int32)
    return edges, int(np.diff(edges).max(initial=0))


def _begins(doc_ids_BT: Ints) -> NDArray[np.bool_]:
    """Whether a token is the first of its document in its row."""
    begins_BT = np.ones(doc_ids_BT.shape, dtype=np.bool_)
    np.not_equal(doc_ids_BT[:, 1:], doc_ids_BT[:, :-1], out=begins_BT[:, 1:])
    return begins_BT
