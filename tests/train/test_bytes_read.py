"""What is read from the files of a checkpoint, counted: little more than is wanted, and each file
is opened once.

Matrices are 1,024 times smaller than those of a model of 1.3 billion parameters, and so are chunks:
the proportions are those of a real one.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from model.config import ModelConfig, parameter_shapes
from tests.train.checkpoints import inventory
from tests.train.large import KEYS, ranges_of
from train import checkpoint, slices
from train.checkpoint import Checkpoint, open_checkpoint
from train.slice_reader import SliceReader
from train.slices import ITEM_BYTES, write_slices

SHAPES = parameter_shapes(
    ModelConfig(num_layers=4, hidden_size=64, num_heads=4, ffn_size=176, vocab_size=1000)
)
TOTAL = sum(map(math.prod, SHAPES.values()))
MOST = 1.1
"""Bytes that may be read for each that is wanted."""


def content(name: str, start: int, length: int) -> np.ndarray:
    """What is stored of a parameter; every element is another."""
    first = list(SHAPES).index(name) * 2**17 + start
    return np.arange(first, first + length, dtype=np.int32).view(np.float32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slices.CHUNK_BYTES == 32 << 10
    monkeypatch.setattr(slices, "CHUNK_BYTES", 32)


def write(run: Path, *, stage: int, num_ranks: int) -> Checkpoint:
    folder = checkpoint.begin(run, 1)
    files = []
    for rank in range(num_ranks):
        ranges = ranges_of(SHAPES, stage, rank, num_ranks)
        array = np.concatenate([content(*piece) for piece in ranges])
        arrays, tables = {key: [array] for key in KEYS}, dict.fromkeys(KEYS, ranges)
        total = TOTAL * ITEM_BYTES * len(KEYS)
        files.append(write_slices(folder, rank, arrays, tables, total_bytes=total))
    model = inventory(SHAPES)
    checkpoint.commit(folder, step=1, parameters=model, scalars={}, state={}, files=files)
    return open_checkpoint(run)


def check_resume(saved: Checkpoint, *, stage: int, rank: int, num_ranks: int) -> int:
    """Read what a rank of a resume needs; returns how many files were opened."""
    ranges = ranges_of(SHAPES, stage, rank, num_ranks)
    wanted = [(name, key, *place) for key in KEYS for name, *place in ranges]
    reader = SliceReader(saved.folder, saved.manifest)
    for (name, _, start, length), array in zip(wanted, reader.read_all(wanted), strict=True):
        assert np.array_equal(array, content(name, start, length))
    needed = ITEM_BYTES * sum(length for *_, length in wanted)
    assert needed <= reader.bytes_read <= MOST * needed
    return reader.num_opened


@pytest.mark.usefixtures("small_chunks")
def test_a_resume_reads_its_own_share(tmp_path: Path) -> None:
    one = write(tmp_path / "one", stage=1, num_ranks=1)
    for stage in (1, 3):
        for rank in (0, 31, 63):
            assert check_resume(one, stage=stage, rank=rank, num_ranks=64) == 1
    many = write(tmp_path / "many", stage=3, num_ranks=64)
    assert check_resume(many, stage=1, rank=0, num_ranks=1) == 64
    assert check_resume(many, stage=3, rank=5, num_ranks=64) == 1
    assert check_resume(many, stage=3, rank=1, num_ranks=16) == 4


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("num_files", [1, 5])
def test_an_export_reads_the_weights_once(tmp_path: Path, num_files: int) -> None:
    saved = write(tmp_path, stage=3, num_ranks=64)
    names = list(SHAPES)
    for number in range(num_files):
        part = names[number * len(names) // num_files : (number + 1) * len(names) // num_files]
        wanted = [(name, "param", 0, math.prod(SHAPES[name])) for name in part]
        for (name, *_, size), array in zip(wanted, saved.reader.read_all(wanted), strict=True):
            assert np.array_equal(array, content(name, 0, size))
    assert ITEM_BYTES * TOTAL <= saved.reader.bytes_read <= MOST * ITEM_BYTES * TOTAL
    assert saved.reader.num_opened == 64 * num_files


@pytest.mark.usefixtures("small_chunks")
def test_parameters_that_are_read_one_by_one_are_read_once_too(tmp_path: Path) -> None:
    saved = write(tmp_path, stage=3, num_ranks=64)
    for name, shape in SHAPES.items():
        found = saved.read(name)
        assert np.array_equal(found.ravel(), content(name, 0, found.size)) and found.shape == shape
    assert saved.reader.bytes_read <= MOST * ITEM_BYTES * TOTAL


@pytest.mark.usefixtures("small_chunks")
def test_what_is_held_has_a_bound(tmp_path: Path) -> None:
    saved = write(tmp_path, stage=3, num_ranks=4)
    tight = SliceReader(saved.folder, saved.manifest, held_bytes=0)
    roomy = SliceReader(saved.folder, saved.manifest)
    for reader in (tight, roomy):
        for start in range(0, 60, 2):
            found = reader.read("norm.weight", "param", start, 2)
            assert np.array_equal(found, content("norm.weight", start, 2))
    assert roomy.bytes_read <= tight.bytes_read / 2


def test_chunks_grow_with_the_checkpoint_and_stay_few() -> None:
    sizes = {1: 32 << 10, 32 << 30: 32 << 10, (32 << 30) + 1: 64 << 10, 84 * 10**9: 96 << 10}
    for total, expected in sizes.items():
        assert slices.chunk_bytes_of(total) == expected
    for billions in (1, 7, 70, 175, 1000):
        total = billions * 10**9 * 12
        assert total / slices.chunk_bytes_of(total) <= slices.NUM_CHUNKS
