"""What a step was made of can be recomputed by anyone who has the dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data.config import DataError, DataUsageError
from data.inspect import Inspection, inspect
from data.loader import SampleStream, micro_batches
from data.manifest import read_manifest
from tests.data.tiny import EOS, documents, flip_bit, write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path, {"train/text": documents(60)})
    return tmp_path


@pytest.mark.parametrize("step", [1, 2, 200])
def test_the_hash_is_the_one_that_training_writes(dataset: Path, step: int) -> None:
    found = _inspect(dataset, step=step)
    stream = SampleStream(dataset, seq_len=32, seed=3)
    total = 0
    for rank in range(3):
        for batch in micro_batches(
            stream,
            first_sample=(step - 1) * 8,
            batch_samples=8,
            num_steps=1,
            rank=rank,
            num_ranks=3,
            micro_batch=2,
            num_workers=0,
        ):
            total += int(batch["data_hash"])
    assert found.data_hash == f"{total % 2**64:016x}"
    assert (found.first, found.last) == ((step - 1) * 8, step * 8)
    assert [sample.sample for sample in found.samples] == list(range(found.first, found.last))


def test_samples_show_their_documents(dataset: Path) -> None:
    texts = {" ".join(map(str, ids)) for ids in documents(60)}
    whole = 0
    for sample in _inspect(dataset, step=2).samples:
        assert sum(piece.num_tokens for piece in sample.pieces) == 33
        assert (sample.epoch, sample.source) == (0, "text")
        for piece in sample.pieces:
            assert any(piece.text in text for text in texts)
            ids = list(map(int, piece.text.split()))
            assert EOS not in ids[:-1]
            if piece.first_token == 0 and ids[-1] == EOS:
                whole += 1
                assert piece.text in texts
        inner = sample.pieces[1:]
        assert all(piece.first_token == 0 for piece in inner)
    assert whole > 0


def test_the_result_is_plain_values(dataset: Path) -> None:
    found = _inspect(dataset, step=1)
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["step"] == 1
    assert plain["data_hash"] == found.data_hash
    assert len(plain["samples"]) == 8
    assert set(plain["samples"][0]["pieces"][0]) == {
        "shard",
        "number",
        "first_token",
        "id",
        "num_tokens",
        "text",
    }


def test_a_step_before_the_first_is_refused(dataset: Path) -> None:
    with pytest.raises(DataUsageError, match="step 0 does not exist; steps count from 1"):
        _inspect(dataset, step=0)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(dataset: Path) -> None:
    (dataset / "tokenizer.model").write_bytes(b"another one")
    with pytest.raises(DataError, match=r"tokenizer\.model is not the tokenizer that .* was made"):
        inspect(dataset, step=1, seed=3, seq_len=32, batch_samples=8)


def test_damage_is_named(dataset: Path) -> None:
    path = dataset / read_manifest(dataset).shards[0].path
    flip_bit(path, path.stat().st_size // 3)
    with pytest.raises(DataError, match=r"shard-000000\.tar, chunk 000000-00000: its tokens are"):
        for step in range(1, 20):
            _inspect(dataset, step=step)


def _inspect(dataset: Path, *, step: int) -> Inspection:
    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, np.array(ids).tolist()))

    return inspect(dataset, step=step, seed=3, seq_len=32, batch_samples=8, decode=decode)
