"""An example as numbers: what the model reads, and which of its predictions count.

For a prompt with a response only the response's tokens are targets; for a text with a label the
label is the one target. What does not fit is cut where it hurts least, and the cut is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_TARGET = -100


@dataclass(frozen=True)
class Tokenized:
    """One example as numbers."""

    input_ids: NDArray[np.int64]
    """[T]"""
    labels: NDArray[np.int64]
    """[T], the target of every input (-100 for none); or [], the one label of the whole example."""
    is_cut: bool = False
    """Whether something of the example did not fit."""

    @property
    def num_targets(self) -> int:
        """Targets that count in the loss."""
        return int(np.count_nonzero(self.labels != NO_TARGET))

    def identity(self) -> NDArray[np.uint32]:
        """Inputs, then labels, modulo 2^32: what the hash of a sample covers."""
        return np.concatenate([self.input_ids, self.labels.reshape(-1)]).astype(np.uint32)


def prompt_with_response(
    prompt: Sequence[int], response: Sequence[int], *, max_tokens: int, prefix: Sequence[int] = ()
) -> Tokenized:
    """`prefix`, prompt, response as at most `max_tokens` inputs; the response's tokens are targets.

    When too long, the prompt loses tokens on its left; a response that alone is too long loses its
    end. `response` ends in the end-of-text id.
    """
    assert prompt and response, "there is a token to predict from, and one to predict"
    assert max_tokens > len(prefix), "the prefix leaves room for a target"
    # The last token is target only, so max_tokens inputs hold one token more.
    kept = response[: max_tokens + 1 - max(len(prefix), 1)]
    room = max_tokens + 1 - len(prefix) - len(kept)
    context = [*prefix, *prompt[max(len(prompt) - room, 0) :]]
    ids = np.array([*context, *kept], dtype=np.int64)
    labels = ids[1:].copy()
    labels[: len(context) - 1] = NO_TARGET
    is_cut = len(ids) < len(prefix) + len(prompt) + len(response)
    return Tokenized(ids[:-1], labels, is_cut)


def with_label(ids: Sequence[int], label: int, *, is_cut: bool = False) -> Tokenized:
    """A text and the index of its label."""
    return Tokenized(np.array(ids, dtype=np.int64), np.array(label, dtype=np.int64), is_cut)


def fingerprint(examples: Sequence[Tokenized]) -> str:
    """sha256 over every number of every example, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.input_ids, example.labels.reshape(-1)):
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
    return digest.hexdigest()
