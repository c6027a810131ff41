"""A plan that is missing, stale, unfinished or damaged is found before it is believed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data import plans
from data.config import DataError, DataUsageError
from data.durable import read_sealed, write_sealed
from data.manifest import read_manifest
from data.pack import finished_plan, pack_dataset
from data.places import place_of
from data.sources import open_datasets
from data.verify import verify
from tests.data.test_pack import SEQ_LEN, read, stream_of
from tests.data.test_pack import dataset as dataset
from tests.data.test_pack import packed as packed
from tests.data.tiny import documents, flip_bit, write_dataset


def test_an_unfinished_plan_is_none(packed: Path) -> None:
    (packed / "packing" / str(SEQ_LEN) / "plan.json").unlink()
    assert finished_plan(place_of(packed), read_manifest(packed), SEQ_LEN) is None
    assert [p.file for p in verify(packed).problems] == [f"packing/{SEQ_LEN}/plan.json"]


def test_a_plan_that_is_missing_or_stale_is_refused_with_the_command(packed: Path) -> None:
    with pytest.raises(DataUsageError) as refused:
        stream_of(packed, seq_len=32)
    assert f"make it with `headrace data pack {packed} --seq-len 32`" in str(refused.value)
    assert "or write data.packing=concat" in str(refused.value)
    write_dataset(packed, {"train/a": documents(80)})
    with pytest.raises(
        DataUsageError, match=r"made for data of fingerprint .* --seq-len 24` again"
    ):
        stream_of(packed)
    with pytest.raises(DataUsageError, match=r"--seq-len 513: samples of .* hold 1 to 512 targets"):
        pack_dataset(packed, seq_len=513)
    write_dataset(packed, {"train/a": [np.array([2])] * 5})
    pack_dataset(packed, seq_len=SEQ_LEN)
    with pytest.raises(DataUsageError, match=r"'a' of split 'train' holds no document of two tok"):
        stream_of(packed)


def test_every_damage_of_a_plan_is_found(packed: Path) -> None:
    files = sorted(path for path in (packed / "packing").rglob("*") if path.is_file())
    random = np.random.default_rng(0)
    for path in files:
        intact = path.read_bytes()
        name = path.relative_to(packed).as_posix()
        for _ in range(5):
            flip_bit(path, int(random.integers(len(intact))), int(random.integers(8)))
            (problem,) = verify(packed).problems
            assert problem.file == name
            assert f"`headrace data pack {packed} --seq-len 24`" in problem.message
            path.write_bytes(intact)
        path.write_bytes(intact[:-8])
        assert [p.file for p in verify(packed).problems] == [name]
        path.write_bytes(intact)
    assert verify(packed, full=True).ok


def test_damage_is_found_when_the_dataset_is_opened_for_training(packed: Path) -> None:
    """Of the plan of the held-out split, too, which nobody reads before the first validation."""
    for shard in ("train/b/shard-000001", "val/text/shard-000000"):
        path = packed / "packing" / str(SEQ_LEN) / f"{shard}.npy"
        intact = path.read_bytes()
        flip_bit(path, len(intact) - 3)
        make = f"make the plan again with `headrace data pack {packed} --seq-len {SEQ_LEN}`"
        with pytest.raises(DataError) as refused:
            open_datasets(packed, seq_len=SEQ_LEN, packing="best_fit")
        is_damaged = f"{path} is damaged: its sha256 is not the one in plan.json"
        assert str(refused.value) == f"{is_damaged}; {make}"
        path.unlink()
        with pytest.raises(DataError) as refused:
            open_datasets(packed, seq_len=SEQ_LEN, packing="best_fit")
        assert str(refused.value) == f"{path} is damaged: it is missing; {make}"
        assert open_datasets(packed, seq_len=SEQ_LEN).packing == "concat"
        path.write_bytes(intact)
    assert open_datasets(packed, seq_len=SEQ_LEN, packing="best_fit").packing == "best_fit"


def test_a_reader_meets_damage_before_it_believes_a_number(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large plan only so much is hashed at first; the rest when it is used."""
    monkeypatch.setattr(plans, "CHECKED_BYTES", 100)
    path = packed / "packing" / str(SEQ_LEN) / "train" / "a" / "shard-000000.npy"
    intact = path.read_bytes()
    flip_bit(path, len(intact) - 3)
    with pytest.raises(DataError, match=r"shard-000000\.npy is damaged: its sha256 .* `headrace"):
        read(stream_of(packed))
    path.unlink()
    with pytest.raises(DataError, match=r"is damaged: it is missing; make the .* --seq-len 24`"):
        read(stream_of(packed))
    path.write_bytes(intact)
    read(stream_of(packed))


def test_a_plan_that_was_edited_and_sealed_again_is_found_by_full(packed: Path) -> None:
    folder = packed / "packing" / str(SEQ_LEN)
    path = folder / "train" / "a" / "shard-000000.npy"
    numbers = np.load(path, allow_pickle=False)
    numbers[-1] -= 1
    np.save(path, numbers, allow_pickle=False)
    content = read_sealed(folder / "plan.json")
    content["files"][0] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_sealed(folder / "plan.json", content)
    assert verify(packed).ok
    (problem,) = verify(packed, full=True).problems
    assert "is not what the lengths of the documents give" in problem.message
