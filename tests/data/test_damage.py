"""Random damage to every file of a dataset and of its packing plan: found, named, and never read as
tokens, as ids of documents or as samples.
"""

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
from data.pack import pack_dataset
from data.places import Place, place_of
from data.plans import plan_name
from data.samples import BestFit
from data.tokens import TokenSource
from data.verify import verify
from tests.data.tiny import cut, documents, write_dataset

NUM_DAMAGES = 1_500
NUM_SOAK_DAMAGES = 12_000
SHARD_BYTES, SEQ_LEN = 1600, 24
TEXTS = documents(40, seed=5)
STREAM: NDArray[Any] = np.concatenate(TEXTS)
NAMES = [
    f"train/text-{number}-{i}"
    for number, part in enumerate(cut(TEXTS, SHARD_BYTES))
    for i in range(len(part))
]
"""The ids of the documents."""
NUM_SHARDS = 4
"""Of the training split, at least; both datasets have these."""
SHARD = "train/text/shard-00000"
PLAN = plan_name(SEQ_LEN)

Files = dict[str, bytes]
Damaging = Callable[[np.random.Generator, Files, Files], Files]


@dataclass(frozen=True)
class Bench:
    """A dataset that is damaged and restored, over and over."""

    folder: Path
    clean: Files
    foreign: Files
    """The files of a dataset with other texts and the same names."""
    truths: list[list[Any]]
    """What READS gives of the clean dataset."""

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
            write_dataset(folder / name, sources, shard_bytes=SHARD_BYTES, named=True)
            pack_dataset(folder / name, seq_len=SEQ_LEN)
    own = folder / "own"
    truths = [read(place_of(own)) for read in READS.values()]
    yield Bench(own, files_of(own), files_of(folder / "foreign"), truths)
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
            assert _misread(bench) == [], f"{what} was believed"
        finally:
            bench.restore(damage)
        made[kind] += 1
        if sum(made.values()) % 500 == 0:
            assert verify(bench.folder, full=True).ok, "a false alarm on clean data"
    assert files_of(bench.folder) == bench.clean
    assert min(made.values()) >= count // len(kinds)


def test_clean_data_gives_no_alarm(bench: Bench) -> None:
    found = verify(bench.folder, full=True)
    assert found.ok
    assert found.num_chunks > found.num_shards > 4
    assert _misread(bench) == []
    assert bench.truths[:2] == [STREAM.tolist(), NAMES] and len(bench.truths[2]) > 100


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
    if PLAN in damage:
        # Nothing else of a plan can be checked without it.
        beside = {name for name in stems if name.startswith(f"{Path(PLAN).parent}/")}
        stems = stems - beside | {PLAN}
    return named == stems and all(problem.file in problem.message for problem in problems)


def _stem(name: str) -> str:
    return name.removesuffix(".tar").removesuffix(".idx.json")


def _misread(bench: Bench) -> list[str]:
    """What was read otherwise than it was, and not refused."""
    wrong = []
    for (what, read), truth in zip(READS.items(), bench.truths, strict=True):
        try:
            found = read(place_of(bench.folder))
        except DataError:
            continue
        if found != truth:
            wrong.append(what)
    return wrong


def _tokens(place: Place) -> list[int]:
    source = TokenSource(place, read_manifest(place), "train", "text")
    return source.read(0, source.num_tokens).tolist()


def _names(place: Place) -> list[str | None]:
    source = TokenSource(place, read_manifest(place), "train", "text")
    return [document.id for document in source.documents(0, source.num_tokens)]


def _samples(place: Place) -> list[list[int]]:
    manifest = read_manifest(place)
    tokens = TokenSource(place, manifest, "train", "text")
    samples = BestFit(tokens, place, manifest, "train", SEQ_LEN)
    count = samples.geometry.num_samples
    rows = np.zeros((count, SEQ_LEN + 1), dtype=np.uint32)
    samples.read_rows([sample * SEQ_LEN for sample in range(count)], rows, range(count))
    return rows.tolist()


READS: dict[str, Callable[[Place], list[Any]]] = {
    "tokens": _tokens,
    "ids": _names,
    "samples": _samples,
}


def files_of(folder: Path) -> Files:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _choose(random: np.random.Generator, files: Files) -> tuple[str, bytearray]:
    """Any file; shards most often, then plans."""
    shards = [name for name in files if name.endswith(".tar")]
    plans = [name for name in files if name.startswith("packing/")]
    among = [shards, plans, sorted(files)][random.choice(3, p=[0.5, 0.2, 0.3])]
    name = str(random.choice(among or sorted(files)))
    return name, bytearray(files[name])


def flip(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    name, raw = _choose(random, clean)
    for _ in range(random.integers(1, 9)):
        raw[random.integers(len(raw))] ^= 1 << int(random.integers(8))
    return {name: bytes(raw)}


def truncate(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    name, raw = _choose(random, clean)
    return {name: bytes(raw[: random.integers(1, len(raw))])}


def punch(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """Zeros over 1 byte to 64 KiB, as a lost page or stripe leaves them."""
    name, raw = _choose(random, clean)
    start = int(random.integers(len(raw)))
    stop = min(start + int(2 ** random.uniform(0, 16)), len(raw))
    raw[start:stop] = bytes(stop - start)
    return {name: bytes(raw)}


def append(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    name, raw = _choose(random, clean)
    return {name: bytes(raw) + random.bytes(int(random.integers(1, 1025)))}


def move_block(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
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


def _replace_plan(random: np.random.Generator, clean: Files, foreign: Files) -> Files:
    """Files of a plan, intact in themselves, of another shard or of another dataset."""
    plans = [plan_name(SEQ_LEN, f"{SHARD}{i}.tar") for i in range(NUM_SHARDS)]
    a, b = (str(name) for name in random.choice(plans, size=2, replace=False))
    stale = {name: raw for name, raw in foreign.items() if name.startswith("packing/")}
    ways = [
        {a: clean[b], b: clean[a]}, {a: foreign[a]}, {PLAN: foreign[PLAN]}, stale,
    ]  # fmt: skip
    return ways[random.integers(len(ways))]


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
    "bit flips": flip,
    "truncation": truncate,
    "hole": punch,
    "appended bytes": append,
    "misplaced block": move_block,
    "missing file": _remove,
    "swapped shards": _swap,
    "foreign shard": _replace,
    "replaced plan": _replace_plan,
    "extra shard": _add,
    "edited table": _edit_table,
    "edited manifest": _edit_manifest,
}
