"""Verification finds every kind of damage and names it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data import shards
from data.config import DataError, DataUsageError, PrepareConfig
from data.manifest import read_manifest
from data.prepare import prepare
from data.shard_index import index_path, read_index
from data.verify import check_tokenizer, verify
from tests.data.texts import write_lines
from tests.data.tiny import documents, flip_bit, write_dataset


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 500)
    write_dataset(tmp_path, {"train/text": documents(60), "val/text": documents(5, seed=1)})
    return tmp_path


def test_an_intact_dataset_is_ok(dataset: Path) -> None:
    done = []
    found = verify(dataset, full=True, progress=done.append)
    manifest = read_manifest(dataset)
    assert found.ok
    assert done == list(manifest.shards)
    assert (found.num_shards, found.documents) == (len(manifest.shards), 65)
    assert found.num_chunks > found.num_shards
    assert found.tokens == manifest.num_tokens("train") + manifest.num_tokens("val")
    plain = json.loads(json.dumps(found.to_json()))
    assert (plain["ok"], plain["problems"], plain["full"]) == (True, [], True)


@pytest.mark.parametrize("array", ["tokens", "lens"])
def test_damage_is_named_by_shard_and_chunk_and_all_of_it_is(dataset: Path, array: str) -> None:
    expected = []
    for entry in read_manifest(dataset).shards[1:3]:
        chunk = read_index(index_path(dataset / entry.path)).chunks[1]
        offset = chunk.tokens_offset if array == "tokens" else chunk.lens_offset
        flip_bit(dataset / entry.path, offset, bit=3)
        expected.append((entry.path, chunk.key))

    found = verify(dataset)
    assert not found.ok
    assert [(problem.file, problem.chunk) for problem in found.problems] == expected
    assert f"{expected[0][0]}, chunk {expected[0][1]}: its" in found.problems[0].message
    assert "are damaged (xxh3 differs from the index)" in found.problems[0].message


def test_only_full_reads_the_tar_headers(dataset: Path) -> None:
    entry = read_manifest(dataset).shards[0]
    flip_bit(dataset / entry.path, 100)
    assert verify(dataset).ok
    (problem,) = verify(dataset, full=True).problems
    assert (problem.file, problem.chunk) == (entry.path, None)
    assert "damaged outside its arrays" in problem.message


def test_every_flipped_byte_of_a_shard_is_found_by_full(dataset: Path) -> None:
    path = dataset / read_manifest(dataset).shards[-1].path
    intact = path.read_bytes()
    for offset in range(0, len(intact), 601):
        flip_bit(path, offset, bit=offset % 8)
        assert [p.file for p in verify(dataset, full=True).problems] == [
            read_manifest(dataset).shards[-1].path
        ]
        path.write_bytes(intact)
    assert verify(dataset, full=True).ok


def test_sizes_missing_files_and_strays_are_named(dataset: Path) -> None:
    first, second, third = (dataset / entry.path for entry in read_manifest(dataset).shards[:3])
    os.truncate(first, 1000)
    second.unlink()
    shutil.copy(third, third.with_name("shard-000099.tar"))
    index_path(third).unlink()
    (dataset / "tokenizer.model").write_bytes(b"another tokenizer")

    messages = {problem.file: problem.message for problem in verify(dataset).problems}
    assert set(messages) == {
        "tokenizer.model",
        "train/text/shard-000099.tar",
        "train/text/shard-000000.tar",
        "train/text/shard-000001.tar",
        "train/text/shard-000002.idx.json",
    }
    assert "1000 bytes, the manifest says" in messages["train/text/shard-000000.tar"]
    assert "No such file" in messages["train/text/shard-000001.tar"]
    assert "is missing" in messages["train/text/shard-000002.idx.json"]
    assert "is not in the manifest" in messages["train/text/shard-000099.tar"]
    assert "not the tokenizer that the manifest names" in messages["tokenizer.model"]


def test_a_damaged_index_is_named(dataset: Path) -> None:
    path = index_path(dataset / read_manifest(dataset).shards[0].path)
    flip_bit(path, 50)
    (problem,) = verify(dataset).problems
    assert problem.file == "train/text/shard-000000.idx.json"
    assert "is damaged or was edited" in problem.message


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    texts = [np.array([5, 400, 2])]
    write_dataset(tmp_path, {"train/text": texts}, vocab_size=400)
    (problem,) = verify(tmp_path).problems
    assert problem.chunk == "000000-00000"
    assert "token id 400 is outside the vocabulary of 400 ids" in problem.message


def test_without_a_manifest_there_is_nothing_to_check_against(dataset: Path) -> None:
    flip_bit(dataset / "manifest.json", 10)
    with pytest.raises(DataError, match=r"manifest\.json is damaged or was edited"):
        verify(dataset)
    with pytest.raises(DataUsageError, match="is not a dataset"):
        verify(dataset / "train")


def test_the_special_tokens_beside_a_tokenizer_json_are_those_of_the_manifest(
    tmp_path: Path,
) -> None:
    letters = {letter: i for i, letter in enumerate("abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text('{"eos_token": "<end>", "pad_token": "<pad>"}')
    text = write_lines(tmp_path / "a.jsonl", ["abc def gh"])
    config, dataset = PrepareConfig(val_fraction=0.0), tmp_path / "dataset"
    prepare([str(text)], dataset, config, workers=1, tokenizer=tmp_path / "tokenizer.json")
    manifest = read_manifest(dataset)

    check_tokenizer(dataset, manifest.tokenizer_sha256, manifest.special_ids)
    assert verify(dataset).ok
    copy = dataset / "tokenizer_config.json"
    swapped = copy.read_text().replace("<end>", "<pad>")
    for content in (swapped, "\0" * 10, None):
        copy.write_text(content) if content else copy.unlink()
        (problem,) = verify(dataset).problems
        assert problem.file == "tokenizer_config.json"
        assert "restore it from a copy of the dataset" in problem.message
        with pytest.raises(DataError, match=r"tokenizer_config\.json is missing or (was|damaged)"):
            check_tokenizer(dataset, manifest.tokenizer_sha256, manifest.special_ids)
