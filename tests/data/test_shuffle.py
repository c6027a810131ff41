"""A shuffle loses and repeats nothing, mixes everything, and is the same however it was done."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shuffle
from data.config import PrepareConfig
from data.documents import Reading
from data.inputs import find_files
from data.jobs import do
from data.manifest import read_manifest
from data.prepare import prepare
from data.readers import cut_parts
from data.shuffle import (
    BucketJob,
    ScatterJob,
    bucket_jobs,
    document_key,
    num_scattered,
    scatter_jobs,
)
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


@given(
    texts=st.lists(st.tuples(st.text(max_size=400), st.integers(1, 60)), max_size=12),
    packing=st.sampled_from(["plain", "gzip", "xz", "zstd"]),
    bucket_bytes=st.integers(60, 3_000),
)
@settings(max_examples=40, deadline=None)
def test_no_bucket_is_larger_than_its_share_however_the_input_is_packed(
    texts: list[tuple[str, int]], packing: str, bucket_bytes: int
) -> None:
    """Lines of one letter pack a hundredfold; what a process holds must not follow from that."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
        folder = Path(name)
        lines = [text * repeats for text, repeats in texts]
        file = packed(folder / "a.jsonl", lines, packing)
        inputs = find_files([str(file)])
        parts = cut_parts(inputs, 10**6)
        scattered = scatter_jobs(folder / "scatter", inputs, parts, Reading(), None, seed=3)
        buckets = done(folder / "shuffle", scattered)
        sizes = [job.lines.stat().st_size for job in buckets]
        total, longest = sum(sizes), max(json_bytes(lines), default=0)
        assert len(buckets) == max(1, -(-total // bucket_bytes))
        assert sum(job.lines.read_bytes().count(b"\n") for job in buckets) == num_scattered(
            scattered
        )
        # The mean is bounded to the byte; the keys are random, so one may have a few lines more.
        assert total / len(buckets) <= bucket_bytes
        assert max(sizes) <= 6 * (bucket_bytes + longest)


def test_a_file_that_packs_three_hundredfold_makes_as_many_buckets_as_its_text(
    tmp_path: Path,
) -> None:
    texts = [f"{number} {'spam ' * 2_000}" for number in range(60)]
    counts = {}
    for packing in ("plain", "xz"):
        file = packed(tmp_path / packing / "a.jsonl", texts, packing)
        inputs = find_files([str(file)])
        scattered = scatter_jobs(
            tmp_path / packing / "scatter",
            inputs,
            cut_parts(inputs, 10**7),
            Reading(),
            None,
            seed=3,
        )
        counts[packing] = len(done(tmp_path / packing / "shuffle", scattered))
    assert (tmp_path / "plain" / "a.jsonl").stat().st_size > 300 * file.stat().st_size
    assert counts["plain"] == counts["xz"] == -(-sum(json_bytes(texts)) // 20_000) > 20


def packed(path: Path, texts: Sequence[str], packing: str) -> Path:
    """The texts as JSON lines in a file."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    suffix, pack = {
        "plain": ("", bytes),
        "gzip": (".gz", gzip.compress),
        "xz": (".xz", lzma.compress),
        "zstd": (".zst", zstandard.ZstdCompressor().compress),
    }[packing]
    path = path.with_name(path.name + suffix)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pack(content))
    return path


def json_bytes(texts: Sequence[str]) -> list[int]:
    """Of the lines in which texts are scattered."""
    return [len(json.dumps({"text": text}, ensure_ascii=False).encode()) + 1 for text in texts]


def done(folder: Path, scattered: list[ScatterJob]) -> list[BucketJob]:
    """Both passes; the buckets."""
    for job in scattered:
        do(job)
    buckets = bucket_jobs(folder, scattered)
    for bucket in buckets:
        do(bucket)
    return buckets
