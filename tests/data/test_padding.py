"""Padded micro-batches: the same samples at every layout, and padding that nobody can notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.padding import pad, padded_batches
from data.targets import NO_TARGET, Tokenized, prompt_with_response, with_label

EXAMPLES = [
    prompt_with_response([10 + i] * (1 + i % 5), [50 + i, 2], max_tokens=30) for i in range(7)
]
LABELLED = [with_label([10 + i] * (1 + i % 5), i % 3) for i in range(7)]


def rotated(samples: range) -> list[int]:
    return [(3 * sample + 1) % 7 for sample in samples]


def batches(
    examples: list[Tokenized], samples: range, rank: int, num_ranks: int, micro_batch: int
) -> list[dict[str, torch.Tensor]]:
    return list(
        padded_batches(
            examples,
            samples,
            order=rotated,
            rank=rank,
            num_ranks=num_ranks,
            micro_batch=micro_batch,
            max_tokens=30,
            pad_id=99,
        )
    )


def real_rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    rows = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        if (labels != NO_TARGET).any():
            length = int(mask.sum())
            rows.append((ids[:length].tolist(), labels.reshape(-1)[:length].tolist()))
    return rows


@pytest.mark.parametrize("examples", [EXAMPLES, LABELLED], ids=["responses", "labels"])
@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(1, 5), (1, 2), (2, 2), (3, 1), (4, 3)])
def test_every_layout_holds_the_same_samples_in_order(
    examples: list[Tokenized], num_ranks: int, micro_batch: int
) -> None:
    samples = range(10, 15)
    by_rank = [
        batches(examples, samples, rank, num_ranks, micro_batch) for rank in range(num_ranks)
    ]
    assert len({len(found) for found in by_rank}) == 1
    rows = [
        row for micro in zip(*by_rank, strict=True) for batch in micro for row in real_rows(batch)
    ]
    expected = [examples[index] for index in rotated(samples)]
    assert rows == [(e.input_ids.tolist(), e.labels.reshape(-1).tolist()) for e in expected]
    total = sum(int(batch["data_hash"]) for found in by_rank for batch in found) % 2**64
    whole = int(batches(examples, samples, 0, 1, 5)[0]["data_hash"]) % 2**64
    assert total == whole


def test_the_hash_covers_sample_inputs_and_labels() -> None:
    def hash_of(examples: list[Tokenized], first: int) -> int:
        return int(batches(examples, range(first, first + 1), 0, 1, 1)[0]["data_hash"])

    relabelled = [with_label(e.input_ids.tolist(), (int(e.labels) + 1) % 3) for e in LABELLED]
    assert len({hash_of(LABELLED, 0), hash_of(LABELLED, 7), hash_of(relabelled, 0)}) == 3


def test_dummies_have_no_target_and_attend_to_one_place() -> None:
    batch = pad(EXAMPLES[:1], num_rows=3, max_tokens=30, pad_id=99)
    assert (batch["labels"][1:] == NO_TARGET).all()
    assert batch["attention_mask"][1:].sum(-1).tolist() == [1, 1]
    assert (batch["input_ids"][1:] == 99).all()


def test_the_width_is_a_multiple_of_eight_within_the_context() -> None:
    def width(length: int, max_tokens: int) -> int:
        example = with_label(list(range(length)), 0)
        rows = pad([example], num_rows=1, max_tokens=max_tokens, pad_id=9, one_label=True)
        return rows["input_ids"].shape[1]

    assert [width(3, 64), width(8, 64), width(9, 64), width(9, 10)] == [8, 8, 16, 10]


def test_labels_of_texts_are_one_number_each() -> None:
    batch = pad(LABELLED[:2], num_rows=3, max_tokens=30, pad_id=9, one_label=True)
    assert batch["labels"].tolist() == [0, 1, NO_TARGET]
    assert batch["labels"].dtype == torch.int64
    assert np.array_equal(LABELLED[1].identity(), [11, 11, 1])
