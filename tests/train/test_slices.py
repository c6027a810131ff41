"""A rank's file is the one that safetensors writes, and its size is known before."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from train import slices
from train.slices import num_chunks, slices_bytes, write_slices

keys = st.sampled_from(["param", "exp_avg", "exp_avg_sq", "momentum_buffer", "\u00e4"])


@settings(deadline=None)
@given(st.dictionaries(keys, st.integers(0, 300), min_size=1))
def test_the_file_is_the_library_s_to_the_byte(sizes: dict[str, int]) -> None:
    generator = np.random.default_rng(len(sizes))
    arrays = {key: generator.standard_normal(n, dtype=np.float32) for key, n in sizes.items()}
    parts = {key: [array[:7], array[7:9], array[9:]] for key, array in arrays.items()}
    with TemporaryDirectory() as name:
        folder = Path(name)
        entry = write_slices(folder, 3, parts, {key: [("w", 0, sizes[key])] for key in sizes})
        path = folder / entry["name"]
        save_file(arrays, folder / "theirs")
        assert path.read_bytes() == (folder / "theirs").read_bytes()
        assert path.stat().st_size == entry["bytes"] == slices_bytes(sizes)
        found = load_file(path)
        for key, tensor in entry["tensors"].items():
            raw = path.read_bytes()[tensor["offset"] :][: 4 * sizes[key]]
            assert np.array_equal(np.frombuffer(raw, "<f4"), found[key])


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 10_000])
def test_chunks_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(slices, "CHUNK_BYTES", chunk_bytes)
    arrays = {key: np.arange(50, dtype=np.float32) for key in ("param", "exp_avg")}
    parts = {key: [array[:3], array[3:]] for key, array in arrays.items()}
    entry = write_slices(tmp_path, 0, parts, {key: [("w", 0, 50)] for key in parts})
    assert entry["chunk_bytes"] == chunk_bytes
    raw = (tmp_path / entry["name"]).read_bytes()
    cut = [raw[i : i + chunk_bytes] for i in range(0, len(raw), chunk_bytes)]
    assert entry["chunks"] == "".join(slices.xxhash.xxh3_64_hexdigest(part) for part in cut)
    assert len(cut) == num_chunks(entry["bytes"], chunk_bytes)


def test_arrays_that_are_no_contiguous_floats_are_made_so(tmp_path: Path) -> None:
    array = np.arange(20, dtype=np.float64)[::2]
    write_slices(tmp_path, 0, {"param": [array]}, {"param": [("w", 0, 10)]})
    assert np.array_equal(load_file(tmp_path / "rank-00000.safetensors")["param"], array)


def test_others_may_read_the_file_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    write_slices(tmp_path, 0, {"param": [np.zeros(1)]}, {"param": [("w", 0, 1)]})
    (tmp_path / "made").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
