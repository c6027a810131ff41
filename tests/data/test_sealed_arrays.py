"""No row of a damaged array is taken for what it is not, whichever bit or byte is gone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data.config import DataError
from data.sealed_arrays import SealedArray, load, save

DAMAGED = r"a\.npy is damaged or was edited.*; remove .* and run the same command again"
ARRAYS = {
    "keys": np.sort(np.random.default_rng(0).integers(0, 2**64 - 1, 3000, np.uint64)),
    "equal keys": np.repeat(np.arange(3, dtype=np.uint64), 700),
    "table": np.sort(np.random.default_rng(1).integers(0, 900, (1000, 4), np.uint64), axis=0),
    "wide": np.ones((3, 9000), np.uint8),
    "empty": np.zeros((0, 2), np.int64),
    "signatures": np.random.default_rng(2).integers(0, 9, (50, 60), np.uint64),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_rows_are_those_that_were_saved(tmp_path: Path, name: str) -> None:
    array, path = ARRAYS[name], tmp_path / "a.npy"
    save(path, array)
    assert np.array_equal(load(path), array) and load(path).dtype == array.dtype
    assert np.array_equal(np.load(path), array), "others read it, too"
    stored, rng = SealedArray(path), random.Random(0)
    for _ in range(50):
        start, stop = sorted(rng.choices(range(len(array) + 1), k=2))
        assert np.array_equal(stored.rows(start, stop), array[start:stop])
    places = np.array([rng.randrange(len(array)) for _ in range(99 if len(array) else 0)], np.int64)
    assert np.array_equal(stored.take(places), array[places])


@pytest.mark.parametrize("name", ["keys", "equal keys", "table", "empty"])
def test_ranges_are_those_of_a_sorted_search(tmp_path: Path, name: str) -> None:
    array, path = ARRAYS[name], tmp_path / "a.npy"
    save(path, array)
    keys = array.reshape(len(array), -1)[:, 0].tolist() if len(array) else []
    rng = random.Random(0)
    for _ in range(60):
        first, last = sorted(rng.choices([0, 1, 2, 3, 2**64 - 1, 500, *keys], k=2))
        expected = [row for row, key in enumerate(keys) if first <= key <= last]
        assert np.array_equal(SealedArray(path).between(first, last), array[expected])


@pytest.mark.parametrize("name", ["keys", "equal keys", "table", "signatures", "empty"])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, name: str) -> None:
    array, path = ARRAYS[name], tmp_path / "a.npy"
    save(path, array)
    raw, rng = path.read_bytes(), random.Random(0)
    for place in [*range(0, 140, 7), *rng.choices(range(len(raw)), k=60), *range(-60, 0)]:
        bad = bytearray(raw)
        bad[place] ^= 1 << rng.randrange(8)
        refused(path, bytes(bad), DAMAGED)
    for size in (0, 1, 31, 32, 127, 128, len(raw) // 2, len(raw) - 1):
        refused(path, raw[:size], DAMAGED)
    refused(path, raw + b"\0", DAMAGED)


def test_a_search_that_a_changed_bit_leads_astray_is_found(tmp_path: Path) -> None:
    """Or gives what was there: rows that the search did not need may be damaged."""
    array, path = ARRAYS["keys"], tmp_path / "a.npy"
    save(path, array)
    raw, rng, num_found = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        bad = bytearray(raw)
        bad[128 + rng.randrange(array.nbytes)] ^= 0x80
        path.write_bytes(bytes(bad))
        first, last = sorted(rng.choices(array.tolist(), k=2))
        try:
            rows: NDArray[Any] = SealedArray(path).between(first, last)
        except DataError:
            num_found += 1
            continue
        assert np.array_equal(rows, array[(array >= first) & (array <= last)])
    assert num_found > 50


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=DAMAGED):
        load(tmp_path / "a.npy")


def refused(path: Path, raw: bytes, match: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(DataError, match=match):
        load(path)
