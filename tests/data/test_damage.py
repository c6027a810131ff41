"""Random damage to every file of a dataset: found, named, and never read as tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data import shards
from data.config import DataError
from data.manifest import read_manifest
from data.tokens import TokenSource
from data.verify import verify
from tests.data.tiny import documents, write_dataset

NUM_DAMAGES = 2_000
NUM_SOAK_DAMAGES = 10_000
TEXTS = documents(40, seed=5)
STREAM: NDArray[Any] = np.concatenate(TEXTS)
NUM_SHARDS = 4
"""Of the training split, at least; both datasets have these."""
SHARD = "train/text/shard-00000"

Files = dict[str, bytes]
Damaging = Callable[[np.random.Generator, Files, Files], Files]


@dataclass(frozen=True)
class Bench:
    """A dataset that is damaged and restored, over and over."""

    folder: Path
    clean: Files
    foreign: Files
    """The files of a dataset with other texts and the same names."""

    def write(self, damage: Files) -> None:
        for name, content in damage.items():
            path = self.folder / name
            if content:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)

    def restore(self, damage: Files) -> None:
        self.write({name: self.clean.get(name, b"") for name in damage})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    memory = Path("/dev/shm")
    folder = tmp_path_factory.mktemp("damage")
    if memory.is_dir():
        folder = Path(tempfile.mkdtemp(prefix="headrace-damage-", dir=memory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_TOKENS", 300)
        for name, texts in (("own", TEXTS), ("foreign", documents(40, seed=6))):
            sources = {"train/text": texts, "val/text": documents(3, seed=7)}
            write_dataset(folder / name, sources, shard_bytes=1600, named=True)
    yield Bench(folder / "own", _files(folder / "own"), _files(folder / "foreign"))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "count", [NUM_DAMAGES, pytest.param(NUM_SOAK_DAMAGES, marks=pytest.mark.slow)]
)
def test_no_damage_passes(bench: Bench, count: int) -> None:
    """Each damage, alone: `verify --full` names it, and a reader raises or returns the truth."""
    random = np.random.default_rng(count)
    kinds = list(DAMAGES)
    made = dict.fromkeys(kinds, 0)
    while sum(made.values()) < count:
        kind = kinds[sum(made.values()) % len(kinds)]
        damage = DAMAGES[kind](random, bench.clean, bench.foreign)
        if all(bench.clean.get(name) == content for name, content in damage.items()):
            continue
        bench.write(damage)
        try:
            what = f"damage {sum(made.values())}, {kind} of {sorted(damage)}"
            assert _named(bench.folder, damage), f"{what} was not found or called by another name"
            assert _is_safe(bench.folder), f"{what} was read as tokens"
        finally:
            bench.restore(damage)
        made[kind] += 1
        if sum(made.values()) % 500 == 0:
            assert verify(bench.folder, full=True).ok, "a false alarm on clean data"
    assert _files(bench.folder) == bench.clean
    assert min(made.values()) >= count // len(kinds)


def test_clean_data_gives_no_alarm(bench: Bench) -> None:
    found = verify(bench.folder, full=True)
    assert found.ok
    assert found.num_chunks > found.num_shards > 4
    assert _is_safe(bench.folder)


def test_a_manifest_that_was_edited_and_sealed_again_is_refused(bench: Bench) -> None:
    content = json.loads(bench.clean["manifest.json"])
    for edit in ({"vocab_size": 301}, {"block_tokens": 256}, {"shards": content["shards"][1:]}):
        bench.write({"manifest.json": _sealed(content | edit)})
        with pytest.raises(DataError, match=r"manifest\.json was edited and sealed again: its fin"):
            read_manifest(bench.folder)
    bench.restore({"manifest.json": b""})


def _named(folder: Path, damage: Files) -> bool:
    """Whether verification names every damaged file or its shard, and nothing else."""
    stems = {_stem(name) for name in damage}
    try:
        problems = verify(folder, full=True).problems
    except DataError as error:
        # Manifest and table: nothing else can be checked without them.
        return "manifest.json" in str(error) or "shards.npy" in str(error)
    named = {_stem(problem.file) for problem in problems}
    if "manifest.json" in damage:
        return bool(named)
    return named == stems and all(problem.file in problem.message for problem in problems)


def _stem(name: str) -> str:
    return name.removesuffix(".tar").removesuffix(".idx.json")


def _is_safe(folder: Path) -> bool:
    """Whether all tokens are read as they were, or refused."""
    try:
        source = TokenSource(folder, read_manifest(folder), "train", "text")
        found = source.read(0, source.num_tokens)
    except DataError:
        return True
    return bool(np.array_equal(found, STREAM))


def _files(folder: Path) -> Files:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _choose(random: np.random.Generator, files: Files) -> tuple[str, bytearray]:
    """Any file; shards most often."""
    shards = [name for name in files if name.endswith(".tar")]
    name = str(random.choice(shards if random.random() < 0.6 else sorted(files)))
    return name, bytearray(files[name])


def _flip(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    name, raw = _choose(random, clean)
    for _ in range(random.integers(1, 9)):
        raw[random.integers(len(raw))] ^= 1 << int(random.integers(8))
    return {name: bytes(raw)}


def _truncate(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    name, raw = _choose(random, clean)
    return {name: bytes(raw[: random.integers(1, len(raw))])}


def _punch(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """Zeros over 1 byte to 64 KiB, as a lost page or stripe leaves them."""
    name, raw = _choose(random, clean)
    start = int(random.integers(len(raw)))
    stop = min(start + int(2 ** random.uniform(0, 16)), len(raw))
    raw[start:stop] = bytes(stop - start)
    return {name: bytes(raw)}


def _append(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    name, raw = _choose(random, clean)
    return {name: bytes(raw) + random.bytes(int(random.integers(1, 1025)))}


def _move_block(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """A block that was written to another place of the same file."""
    name, raw = _choose(random, clean)
    size = min(int(random.integers(1, 4097)), len(raw) // 2)
    source, target = (int(random.integers(len(raw) - size + 1)) for _ in range(2))
    raw[target : target + size] = clean[name][source : source + size]
    return {name: bytes(raw)}


def _remove(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    names = [name for name in clean if name != "manifest.json"]
    return {str(random.choice(names)): b""}


def _swap(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """Two shards with each other's tar, index, or both."""
    a, b = (f"{SHARD}{i}" for i in random.choice(NUM_SHARDS, size=2, replace=False))
    ends = [[".tar"], [".idx.json"], [".tar", ".idx.json"]][random.integers(3)]
    return {x + end: clean[y + end] for end in ends for x, y in ((a, b), (b, a))}


def _replace(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """A stale tar, index or pair, intact in itself, from another dataset."""
    ends = [[".tar"], [".idx.json"], [".tar", ".idx.json"]][random.integers(3)]
    shard = f"{SHARD}{random.integers(NUM_SHARDS)}"
    return {shard + end: foreign[shard + end] for end in ends}


def _add(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    shard = f"{SHARD}{random.integers(NUM_SHARDS)}"
    end = str(random.choice([".tar", ".idx.json"]))
    return {f"train/text/shard-{random.integers(100, 999999):06d}{end}": clean[shard + end]}


def _edit_table(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    if random.random() < 0.1:
        return {"shards.npy": foreign["shards.npy"]}
    raw = bytearray(clean["shards.npy"])
    raw[random.integers(128, len(raw))] ^= int(random.integers(1, 256))
    return {"shards.npy": bytes(raw)}


def _edit_manifest(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """A value changed by someone who also seals the file again."""
    content = json.loads(clean["manifest.json"])
    entry = content["shards"][random.integers(len(content["shards"]))]
    key = str(random.choice(["bytes", "tokens", "documents", "sha256", "idx_sha256", "top", "few"]))
    if key == "top":
        top = str(random.choice(["vocab_size", "block_tokens"]))
        content[top] += int(random.integers(1, 100))
    elif key == "few":
        content["shards"].remove(entry)
    elif key.endswith("sha256"):
        entry[key] = random.bytes(32).hex()
    else:
        entry[key] += int(random.integers(1, 100))
    return {"manifest.json": _sealed(content)}


def _sealed(content: dict[str, Any]) -> bytes:
    """As data/durable.py seals a file, written again so that the test does not borrow its judge."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f'{body[:-1]},"sha256":"{hashlib.sha256(body.encode()).hexdigest()}"}}\n'.encode()


DAMAGES: dict[str, Damaging] = {
    "bit flips": _flip,
    "truncation": _truncate,
    "hole": _punch,
    "appended bytes": _append,
    "misplaced block": _move_block,
    "missing file": _remove,
    "swapped shards": _swap,
    "foreign shard": _replace,
    "extra shard": _add,
    "edited table": _edit_table,
    "edited manifest": _edit_manifest,
}
