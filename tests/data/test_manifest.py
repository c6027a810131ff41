"""The manifest is the commit point, and nothing in it can change unseen."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from data.config import DataError, DataUsageError
from data.durable import read_sealed, write_sealed
from data.manifest import ShardEntry, read_manifest, read_table
from tests.data.tiny import documents, flip_bit, write_dataset


def test_what_is_written_is_read(tmp_path: Path) -> None:
    texts = {"train/b": documents(40), "train/a": documents(9), "val/a": documents(3, seed=1)}
    written = write_dataset(tmp_path, texts)
    manifest = read_manifest(tmp_path)

    assert manifest == written
    assert manifest.source_names("train") == ["a", "b"]
    assert manifest.source_names("val") == ["a"]
    assert manifest.num_tokens("val") == sum(map(len, documents(3, seed=1)))
    assert sum(s.documents for s in manifest.source_shards("train", "b")) == 40
    assert manifest.dtype == "<u2"
    table = read_table(tmp_path, manifest.table_sha256)
    assert [bytes(path).decode() for path in table["path"]] == [s.path for s in manifest.shards]
    assert table["tokens"].tolist() == [s.tokens for s in manifest.shards]


def test_equal_datasets_have_equal_bytes_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name, {"train/text": documents(40)})
    first, second = tmp_path / "one", tmp_path / "two"
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 5
    assert [(first / f).read_bytes() for f in files] == [(second / f).read_bytes() for f in files]


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    base = write_dataset(tmp_path / "a", {"train/x": documents(20), "train/y": documents(5)})
    same = write_dataset(tmp_path / "b", {"train/x": documents(20), "train/y": documents(5)})
    other = write_dataset(
        tmp_path / "c", {"train/x": documents(20, seed=1), "train/y": documents(5)}
    )
    blocks = write_dataset(
        tmp_path / "d", {"train/x": documents(20), "train/y": documents(5)}, block_tokens=256
    )
    assert base.fingerprint == same.fingerprint
    assert len({base.fingerprint, other.fingerprint, blocks.fingerprint}) == 3
    assert base.source_fingerprint("train", "x") != other.source_fingerprint("train", "x")
    assert base.source_fingerprint("train", "y") == other.source_fingerprint("train", "y")


def test_the_seal_is_the_end_of_canonical_json(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train/text": documents(5)})
    text = (tmp_path / "manifest.json").read_text()
    assert list(json.loads(text))[-1] == "sha256"
    assert text.endswith('"}\n')
    content = read_sealed(tmp_path / "manifest.json")
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert text.startswith(body[:-1])


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train/text": documents(5)})
    path = tmp_path / "manifest.json"
    intact = path.read_bytes()
    for offset in range(len(intact)):
        flip_bit(path, offset, bit=offset % 8)
        with pytest.raises(DataError, match=r"manifest\.json is damaged or was edited: .* sha256"):
            read_manifest(tmp_path)
        path.write_bytes(intact)
    read_manifest(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_cut_manifest_is_no_manifest(tmp_path: Path, keep: int) -> None:
    write_dataset(tmp_path, {"train/text": documents(5)})
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"manifest\.json (is damaged|was not written by)"):
        read_manifest(tmp_path)


def test_a_damaged_table_is_found(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train/text": documents(5)})
    flip_bit(tmp_path / "shards.npy", 150)
    with pytest.raises(DataError, match=r"shards\.npy is missing or damaged"):
        read_manifest(tmp_path)
    (tmp_path / "shards.npy").unlink()
    with pytest.raises(DataError, match=r"shards\.npy is missing or damaged"):
        read_manifest(tmp_path)


def test_what_is_no_dataset_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        DataUsageError, match=r"no such directory \(looked in .*\); write it with `headrace prepare"
    ):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(DataUsageError, match=r"is not a dataset: it holds no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "headrace.lock.json").write_text("{}")
    with pytest.raises(
        DataUsageError, match=r"has not finished .* run the same `headrace prepare`"
    ):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(DataUsageError, match=r"was not written by `headrace prepare`"):
        read_manifest(tmp_path)
    write_sealed(tmp_path / "manifest.json", {"format": "headrace-checkpoint", "version": 1})
    with pytest.raises(DataUsageError, match=r"was not written by `headrace prepare`"):
        read_manifest(tmp_path)
    assert DataUsageError.exit_code == 2


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / "manifest.json", {"format": "headrace-dataset", "version": 2})
    with pytest.raises(DataUsageError, match="has format version 2, this headrace reads 1"):
        read_manifest(tmp_path)


def test_a_sealed_manifest_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train/text": documents(5)})
    content = read_sealed(tmp_path / "manifest.json")
    content["shards"][0]["path"] = "../../etc/passwd"
    write_sealed(tmp_path / "manifest.json", content)
    with pytest.raises(DataError, match=r"holds what no headrace writes: .*shards\.0\.path"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "path", ["train/../x.tar", "/etc/x.tar", "train/x.tar", "test/a/x.tar", "train/a/../x.tar", ""]
)
def test_a_shard_cannot_lie_outside_the_dataset(path: str) -> None:
    with pytest.raises(ValidationError):
        ShardEntry(path=path, bytes=1, sha256="0" * 64, idx_sha256="0" * 64, tokens=1, documents=1)


def test_a_source_keeps_its_rows_together_in_the_table(tmp_path: Path) -> None:
    # "a-b/" sorts before "a/", "a.b/" too: the rows of a source must not be torn apart.
    texts = {f"train/{name}": documents(20, seed=i) for i, name in enumerate(["a", "a-b", "a.b"])}
    manifest = write_dataset(tmp_path, texts, shard_bytes=1000)
    names = [entry.source for entry in manifest.shards]
    assert len(names) > 6
    changes = int(np.sum([a != b for a, b in itertools.pairwise(names)]))
    assert changes == 2
