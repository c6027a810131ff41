"""Where documents end, found by one scan for EOS, equals what the shards store of their lengths."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.boundaries import cu_seqlens, document_ids, mask_first_tokens, positions_in_documents
from data.config import Boundaries, DataUsageError
from data.loader import Batch, SampleStream, micro_batches
from data.manifest import read_manifest, write_manifest
from tests.data.tiny import EOS, documents, write_dataset

SEQ_LEN = 64
BATCH = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset")
    # Documents of one to 200 tokens: of EOS alone, too, and longer than several samples.
    write_dataset(path, {"train/a": documents(60), "train/b": documents(90, seed=1)})
    return path


@pytest.fixture
def stream(folder: Path) -> SampleStream:
    return SampleStream(folder, seq_len=SEQ_LEN, seed=0)


def _batches(stream: SampleStream, boundaries: Boundaries, num_workers: int = 0) -> list[Batch]:
    return list(
        micro_batches(
            stream,
            first_sample=0,
            batch_samples=BATCH,
            num_steps=3,
            rank=1,
            num_ranks=2,
            micro_batch=4,
            num_workers=num_workers,
            boundaries=boundaries,
        )
    )


def test_the_scan_finds_the_documents_that_the_shards_store(stream: SampleStream) -> None:
    num_cut = 0
    for sample in range(stream.num_samples_per_epoch):
        tokens = stream.tokens(sample)[None]
        parts = stream.documents(sample)
        lengths = [part.num_tokens for part in parts]
        doc_ids = document_ids(tokens, eos_id=stream.eos_id)
        assert doc_ids[0].tolist() == np.repeat(np.arange(len(parts)), lengths).tolist()
        edges, longest = cu_seqlens(doc_ids)
        assert np.diff(edges).tolist() == lengths
        assert longest == max(lengths)
        num_cut += parts[0].first_token > 0
    assert num_cut > 10


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4))
def test_ids_positions_labels_and_lengths_follow_a_walk_over_the_tokens(
    rows: list[list[int]],
) -> None:
    tokens = np.array(rows, dtype=np.int64)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    doc_ids, positions, expected_labels, edges = [], [], [], [0]
    for row in rows:
        document = place = 0
        for token, following in itertools.pairwise(row):
            doc_ids.append(document)
            positions.append(place)
            ends = token == EOS
            expected_labels.append(-100 if ends else following)
            document, place = (document + 1, 0) if ends else (document, place + 1)
            if ends:
                edges.append(len(doc_ids))
        edges += [len(doc_ids)] * (edges[-1] != len(doc_ids))
    found = document_ids(inputs, eos_id=EOS)
    assert found.dtype == np.int64
    assert found.flatten().tolist() == doc_ids
    assert positions_in_documents(found).flatten().tolist() == positions
    mask_first_tokens(labels, inputs, eos_id=EOS)
    assert labels.flatten().tolist() == expected_labels
    lengths, longest = cu_seqlens(found)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == edges
    assert longest == int(np.diff(edges).max())


def test_boundaries_change_neither_samples_nor_their_hash(stream: SampleStream) -> None:
    plain = _batches(stream, "ignore")
    num_masked = 0
    for boundaries in ("labels", "attention"):
        for batch, other in zip(plain, _batches(stream, boundaries), strict=True):
            assert set(batch) == {"input_ids", "labels", "position_ids", "data_hash"}
            assert torch.equal(batch["input_ids"], other["input_ids"])
            assert torch.equal(batch["data_hash"], other["data_hash"])
            ends = batch["input_ids"] == EOS
            assert torch.equal(other["labels"], batch["labels"].masked_fill(ends, -100))
            # EOS itself is still a target, where it is not all there is of a document.
            assert torch.equal(other["labels"] == EOS, (batch["labels"] == EOS) & ~ends)
            num_masked += int(ends.sum())
            if boundaries == "labels":
                assert set(other) == set(batch)
                assert torch.equal(batch["position_ids"], other["position_ids"])
    assert num_masked > 10


def test_attention_adds_document_ids_and_restarts_positions(stream: SampleStream) -> None:
    for batch in _batches(stream, "attention"):
        doc_ids, positions = batch["doc_ids"], batch["position_ids"]
        assert doc_ids.shape == batch["input_ids"].shape
        assert doc_ids.dtype == positions.dtype == torch.int64
        starts = positions == 0
        assert starts[:, 0].all()
        assert torch.equal(starts.cumsum(1) - 1, doc_ids)
        assert torch.equal(starts[:, 1:], batch["input_ids"][:, :-1] == EOS)


def test_loader_processes_give_the_same_boundaries(stream: SampleStream) -> None:
    for here, there in zip(
        _batches(stream, "attention"), _batches(stream, "attention", num_workers=1), strict=True
    ):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_dataset_without_an_end_of_text_id_is_refused(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, {"train/a": documents(60)})
    write_manifest(
        tmp_path,
        manifest.shards,
        tokenizer=tmp_path / manifest.tokenizer_file,
        vocab_size=manifest.vocab_size,
        special_ids={},
        preparation={},
        split_rule="written by a test",
        block_tokens=manifest.block_tokens,
    )
    assert read_manifest(tmp_path).special_ids == {}
    stream = SampleStream(tmp_path, seq_len=SEQ_LEN, seed=0)
    assert _batches(stream, "ignore")
    with pytest.raises(DataUsageError, match=r"no end-of-text id.*write data\.boundaries=ignore"):
        _batches(stream, "labels")
