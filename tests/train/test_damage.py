"""Random damage to a checkpoint: every one is found, the right file is named, the older checkpoint
is taken. And where nothing is damaged, nothing is said.

Real files are read by the real reader; a chunk is 64 bytes here, so that files of 300 bytes have
several. A sample runs by default, 10,000 damages and 1,000 clean loads in soak.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.train.checkpoints import SHAPES, values, write
from train import slices
from train.checkpoint import Checkpoint, committed, open_checkpoint, step_folder
from train.choice import Choice, choose, verified
from train.slice_reader import SliceReader

NUM_RANKS = 4
OLDER, NEWER = 10, 20
PAGE = 48
"""Bytes that are zeroed together."""

Kind = Callable[[random.Random, Path, Path], set[str] | None]


def flip_a_bit(chance: random.Random, folder: Path, older: Path) -> set[str]:
    path = chance.choice(sorted(folder.iterdir()))
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    return {path.name}


def truncate(chance: random.Random, folder: Path, older: Path) -> set[str]:
    path = chance.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    return {path.name}


def append(chance: random.Random, folder: Path, older: Path) -> set[str]:
    path = chance.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 100)))
    return {path.name}


def zero_a_page(chance: random.Random, folder: Path, older: Path) -> set[str] | None:
    path = chance.choice(sorted(folder.iterdir()))
    raw = bytearray(path.read_bytes())
    start = chance.randrange(len(raw))
    page = raw[start : start + PAGE]
    raw[start : start + PAGE] = bytes(len(page))
    path.write_bytes(raw)
    return {path.name} if any(page) else None


def swap_two_files(chance: random.Random, folder: Path, older: Path) -> set[str]:
    one, two = chance.sample(sorted(folder.glob("rank-*")), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return {one.name, two.name}


def put_in_a_stale_file(chance: random.Random, folder: Path, older: Path) -> set[str]:
    path = chance.choice(sorted(older.iterdir()))
    shutil.copy(path, folder)
    return {path.name}


def copy_another_checkpoint_over_it(chance: random.Random, folder: Path, older: Path) -> set[str]:
    for path in older.iterdir():
        shutil.copy(path, folder)
    return {"manifest.json"}


def copy_a_file_over_another(chance: random.Random, folder: Path, older: Path) -> set[str]:
    one, two = chance.sample(sorted(folder.iterdir()), 2)
    shutil.copy(one, two)
    return {two.name}


def remove_a_file(chance: random.Random, folder: Path, older: Path) -> set[str]:
    path = chance.choice(sorted(folder.glob("rank-*")))
    path.unlink()
    return {path.name}


def put_a_folder_in_a_file_s_place(chance: random.Random, folder: Path, older: Path) -> set[str]:
    path = chance.choice(sorted(folder.iterdir()))
    path.unlink()
    path.mkdir()
    return {path.name}


def garble_the_manifest(chance: random.Random, folder: Path, older: Path) -> set[str] | None:
    path = folder / "manifest.json"
    raw = bytearray(path.read_bytes())
    before = bytes(raw)
    for _ in range(chance.randrange(1, 9)):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    path.write_bytes(raw)
    return {path.name} if bytes(raw) != before else None


KINDS: list[Kind] = [
    flip_a_bit,
    truncate,
    append,
    zero_a_page,
    swap_two_files,
    put_in_a_stale_file,
    copy_another_checkpoint_over_it,
    copy_a_file_over_another,
    remove_a_file,
    put_a_folder_in_a_file_s_place,
    garble_the_manifest,
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slices, "CHUNK_BYTES", 64)
    for step in (OLDER, NEWER):
        write(tmp_path / "run", step, num_ranks=NUM_RANKS)
    return tmp_path / "run"


def loaded(run: Path, step: int, *, num_ranks: int = 3) -> Checkpoint:
    """Taken as ranks of a resume take it: each reads its own ranges, and no byte besides."""
    saved = open_checkpoint(run, step)
    for rank in range(num_ranks):
        wanted = []
        for key in saved.keys:
            for name, shape in saved.parameters.items():
                size = int(np.prod(shape))
                first, last = size * rank // num_ranks, size * (rank + 1) // num_ranks
                wanted.append((name, key, first, last - first))
        # What another rank has read and verified does not count.
        reader = SliceReader(saved.folder, saved.manifest)
        for (name, key, first, length), found in zip(wanted, reader.read_all(wanted), strict=True):
            stored = values(step)[f"{key}/{name}"]
            assert np.array_equal(found, stored[first : first + length])
    return saved


def check(choice: Choice, damaged: set[str] | None) -> None:
    """The newer one is taken, or the older one and the file is named because of which."""
    assert choice.taken is not None
    if damaged is None:
        assert (choice.taken.step, choice.passed_over) == (NEWER, ())
        return
    assert choice.taken.step == OLDER
    (passed,) = choice.passed_over
    assert passed.step == NEWER
    folder = step_folder(choice.run, NEWER)
    named = any(str(folder / name) in passed.reason for name in damaged)
    assert named, f"{passed.reason} names none of {damaged}"


def damage_many(run: Path, times: int, seed: int) -> Counter[str]:
    """Damage, look, and mend, so many times."""
    chance = random.Random(seed)
    folder, older = step_folder(run, NEWER), step_folder(run, OLDER)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    counts: Counter[str] = Counter()
    while counts.total() < times:
        kind = KINDS[counts.total() % len(KINDS)]
        damaged = kind(chance, folder, older)
        assert NEWER in committed(run)
        check(choose(run), damaged)
        if damaged is not None:
            counts[kind.__name__] += 1
        shutil.rmtree(folder)
        folder.mkdir()
        for name, raw in good.items():
            (folder / name).write_bytes(raw)
    return counts


@pytest.mark.parametrize(
    ("damages", "clean"), [(440, 50), pytest.param(10_010, 1000, marks=pytest.mark.slow)]
)
def test_every_damage_is_found_and_named_and_no_clean_load_is_refused(
    run: Path, damages: int, clean: int
) -> None:
    counts = damage_many(run, damages, seed=damages)
    print(dict(counts))
    assert counts.total() == damages and min(counts.values()) == damages // len(KINDS)
    for number in range(clean):
        check(choose(run, take=loaded if number % 2 else verified), None)


def test_a_resume_finds_every_flipped_bit_of_what_it_reads(run: Path) -> None:
    """A resume reads less than a verification: the ranges of each rank, in whole chunks."""
    path = step_folder(run, NEWER) / "rank-00002.safetensors"
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in range(header // 64 * 64, len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
        check(choose(run, take=loaded), {path.name})
    path.write_bytes(good)
    check(choose(run, take=loaded), None)
    assert set(SHAPES) == set(open_checkpoint(run).parameters)
