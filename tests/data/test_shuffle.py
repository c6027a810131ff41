"""A shuffle loses and repeats nothing, mixes everything, and is the same however it was done."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from data import shuffle
from data.config import PrepareConfig
from data.documents import InputFile
from data.manifest import read_manifest
from data.prepare import prepare
from data.shuffle import document_key, num_buckets
from data.tokenizer import load_tokenizer
from tests.data.files import parquet
from tests.data.prepared import stored, tree
from tests.data.texts import prose, write_lines

PER_FILE = 100
GOLDEN = [1709972993921645002, 15404115624288689310]
CLEAN = {"dedup": "near", "normalize": True}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of them for the corpus, each made from several buffers."""
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 20_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that is read in another way; each document names its file and place."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()

    def texts(file: str) -> list[str]:
        return [f"<{file} {i}> {prose(250, seed=hash_of(file, i))}" for i in range(PER_FILE)]

    write_lines(folder / "a.jsonl", [*texts("a"), ""])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts("b"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    parquet(folder / "c.parquet", {"text": texts("c")})
    for number, text in enumerate(texts("d")):
        (folder / f"d{number:04}.txt").write_text(text)
    write_lines(folder / "e.jsonl", [text.replace("<a", "<e") for text in texts("a")])
    (folder / "long.txt").write_text("<f 0> " + prose(90_000, seed=5))
    return folder


def hash_of(file: str, number: int) -> int:
    return ord(file) * 1000 + number


def run(path: Path, output: Path, *, workers: int = 1, **settings: object) -> Path:
    values = {"vocab_size": 400, "val_fraction": 0.2, "part_bytes": 9_000, "shard_bytes": 50_000}
    prepare([str(path)], output, PrepareConfig.model_validate(values | settings), workers=workers)
    return output


def texts_of(dataset: Path, side: str) -> list[str]:
    tokenizer = load_tokenizer(dataset)
    return [tokenizer.decode(ids) for ids in stored(dataset, side)]


@pytest.fixture(scope="module")
def datasets(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In the order of the input and shuffled, raw and cleaned."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BUCKET_BYTES", 20_000)
        return {
            name: run(corpus, folder / name, **settings)
            for name, settings in {
                "raw": {},
                "raw shuffled": {"shuffle": True},
                "cleaned": {"clean": CLEAN},
                "cleaned shuffled": {"clean": CLEAN, "shuffle": True},
            }.items()
        }


@pytest.mark.parametrize("kind", ["raw", "cleaned"])
def test_the_same_documents_lie_on_the_same_sides(datasets: dict[str, Path], kind: str) -> None:
    plain, mixed = datasets[kind], datasets[f"{kind} shuffled"]
    for side in ("train", "val"):
        assert Counter(texts_of(plain, side)) == Counter(texts_of(mixed, side))
        assert texts_of(plain, side) != texts_of(mixed, side)
    then, now = read_manifest(plain), read_manifest(mixed)
    assert then.counts == now.counts and then.split_rule == now.split_rule
    assert then.tokenizer_sha256 == now.tokenizer_sha256
    assert now.preparation.pop("config") == {**then.preparation.pop("config"), "shuffle": True}
    assert now.preparation == then.preparation
    kept = 4 * PER_FILE + 1 if kind == "cleaned" else 5 * PER_FILE + 1
    assert now.counts["documents"] == kept


def places(dataset: Path, side: str = "train") -> list[tuple[str, int]]:
    found = [re.match(r"<(\w) (\d+)>", text) for text in texts_of(dataset, side)]
    return [(match[1], int(match[2])) for match in found if match]


def test_the_order_is_that_of_a_random_permutation(datasets: dict[str, Path]) -> None:
    order = places(datasets["raw shuffled"])
    count = len(order)
    pairs = list(itertools.pairwise(order))
    neighbours = sum(left[0] == right[0] and abs(left[1] - right[1]) == 1 for left, right in pairs)
    # Two of `count` places are neighbours: about 2 pairs in all are expected, whatever the order.
    assert neighbours < 10
    changes = sum(left[0] != right[0] for left, right in pairs)
    assert 0.7 < changes / count < 0.9, "four of five times another file follows"
    by_file = {name: [i for i, (file, _) in enumerate(order) if file == name] for name in "abcde"}
    for where in by_file.values():
        # The mean of n uniform places has a standard deviation of 0.29 / sqrt(n).
        assert abs(sum(where) / len(where) / count - 0.5) < 4 * 0.29 / len(where) ** 0.5
        tenths = Counter(10 * place // count for place in where)
        assert len(tenths) == 10, "every bucket mixes all files"
    numbers = [number for _, number in order]
    mean = sum(numbers) / count
    drift = sum((i / count - 0.5) * (number - mean) for i, number in enumerate(numbers)) / count
    assert abs(drift) < 4 * 0.29 * 0.29 * PER_FILE / count**0.5, "early documents are not early"


def test_the_order_is_that_of_the_keys(corpus: Path, datasets: dict[str, Path]) -> None:
    """Recomputed by hand from the files' numbers: JSON lines by byte, packed ones by number."""
    names = sorted(path.name for path in corpus.iterdir())
    key: dict[tuple[str, int], int] = {}
    for file in "ae":
        offset = 0
        for number, line in enumerate((corpus / f"{file}.jsonl").read_bytes().splitlines(True)):
            key[file, number] = document_key(0, names.index(f"{file}.jsonl"), offset)
            offset += len(line)
    for number in range(PER_FILE):
        key["b", number] = document_key(0, names.index("b.jsonl.gz"), number)
        key["c", number] = document_key(0, names.index("c.parquet"), number)
        key["d", number] = document_key(0, names.index(f"d{number:04}.txt"), 0)
    order = [place for place in places(datasets["raw shuffled"]) if place[0] != "f"]
    assert order == sorted(order, key=lambda place: key[place])


def test_keys_stay_what_they_are() -> None:
    assert [document_key(0, 0, 0), document_key(7, 3, 10**12)] == GOLDEN
    keys = [document_key(1, file, offset) for file in range(20) for offset in range(200)]
    tenths = Counter(10 * key >> 64 for key in keys)
    assert min(tenths.values()) > 320 and len(set(keys)) == 4000


@pytest.mark.parametrize(
    "settings", [{"part_bytes": 3_000_000, "shard_bytes": 10**9}, {"part_bytes": 4_000}]
)
def test_the_order_does_not_depend_on_the_parts(
    corpus: Path, datasets: dict[str, Path], tmp_path: Path, settings: dict[str, object]
) -> None:
    other = run(corpus, tmp_path / "dataset", shuffle=True, **settings)
    assert stored(other, "train") == stored(datasets["raw shuffled"], "train")


def test_the_order_does_not_depend_on_the_buckets(
    corpus: Path, datasets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 10**9)
    other = run(corpus, tmp_path / "dataset", shuffle=True)
    assert stored(other, "train") == stored(datasets["raw shuffled"], "train")


def test_the_bytes_do_not_depend_on_the_workers(
    corpus: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    other = run(corpus, tmp_path / "dataset", workers=2, clean=CLEAN, shuffle=True)
    assert tree(other) == tree(datasets["cleaned shuffled"])


def test_another_seed_is_another_order(
    corpus: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    other = run(corpus, tmp_path / "dataset", shuffle=True, seed=1, val_fraction=0)
    first = places(datasets["raw shuffled"])
    same = [place for place in places(other) if place in set(first)]
    assert sorted(same) == sorted(first) and same != first


def test_buckets_follow_from_the_bytes_of_the_input() -> None:
    files = [
        InputFile(Path("a.txt"), "a.txt", 1000),
        InputFile(Path("b.jsonl"), "b.jsonl", 1000),
        InputFile(Path("c.jsonl.gz"), "c.jsonl.gz", 1000),
        InputFile(Path("d.parquet"), "d.parquet", 1000),
    ]
    assert [num_buckets([file], 1000) for file in files] == [1, 1, 8, 8]
    assert num_buckets(files, 1000) == 18 and num_buckets(files, 10**6) == 1
