"""The id of a document survives to training: stored beside its tokens, checked, and shown."""

from __future__ import annotations

import json
import random
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data import shards
from data.config import DataError, PrepareConfig
from data.inspect import inspect
from data.lookup import look_up
from data.manifest import read_manifest
from data.names import lines_of, names_of
from data.phases import Phases, first_phase
from data.prepare import Summary, prepare
from data.shard_index import index_path, read_index
from data.sources import open_datasets
from data.stream import SampleStream
from data.tokens import TokenSource
from data.verify import verify
from tests.data.files import tar
from tests.data.prepared import stored, tree
from tests.data.texts import prose
from tests.data.tiny import flip_bit
from tests.data.warcs import Warc, html

SETTINGS = {"vocab_size": 320, "val_fraction": 0.2, "part_bytes": 9_000, "shard_bytes": 30_000}
TEXTS = [prose(300, seed=seed) for seed in range(3)]


def run(inputs: list[Path], output: Path, *, workers: int = 1, **settings: object) -> Summary:
    config = PrepareConfig.model_validate(SETTINGS | settings)
    return prepare(list(map(str, inputs)), output, config, workers=workers)


def names(dataset: Path) -> list[str | None]:
    """The id of every stored document, training side first."""
    manifest = read_manifest(dataset)
    found: list[str | None] = []
    for side in ("train", "val"):
        for name in manifest.source_names(side):
            source = TokenSource(dataset, manifest, side, name)
            found += [document.id for document in source.documents(0, source.num_tokens)]
    return found


def shard(dataset: Path) -> Path:
    return dataset / read_manifest(dataset).shards[0].path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with ids, a long text that the split cuts, and small ones."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    (folder / "deep").mkdir(parents=True)
    rows = [{"text": prose(400, seed=i), "meta": {"id": f"doc/{i}\n\\\ud800"}} for i in range(40)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "long.txt").write_text(prose(250_000))
    (folder / "deep" / "note.md").write_text(prose(500, seed=99))
    return folder


@pytest.fixture(scope="module")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dataset") / "dataset"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_TOKENS", 4000)
        run([corpus], output, id_field="meta.id")
    return output


@given(st.lists(st.text(st.characters(exclude_categories=()))))
def test_any_id_comes_back_exactly_and_takes_one_line(ids: list[str]) -> None:
    lines = lines_of(ids)
    assert names_of(lines) == ids
    assert len(lines.decode().splitlines()) == lines.count(b"\n") == len(ids)


def test_every_stored_document_has_its_id(dataset: Path) -> None:
    found = names(dataset)
    ids = [f"doc/{i}\n\\\ud800" for i in range(40)]
    assert sorted(
        name for name in found if name not in ("corpus/long.txt", "corpus/deep/note.md")
    ) == sorted(ids)
    assert found.count("corpus/deep/note.md") == 1
    assert found.count("corpus/long.txt") > 2, "a document that the split cuts keeps its id"
    assert set(names_on(dataset, "train")) & set(names_on(dataset, "val")) == {"corpus/long.txt"}


def names_on(dataset: Path, side: str) -> list[str | None]:
    source = TokenSource(dataset, read_manifest(dataset), side, "main")
    return [document.id for document in source.documents(0, source.num_tokens)]


def test_tokens_and_indexes_are_as_without_ids(corpus: Path, dataset: Path, tmp_path: Path) -> None:
    run([corpus], tmp_path / "plain")
    for side in ("train", "val"):
        assert stored(tmp_path / "plain", side) == stored(dataset, side)
    assert set(names(tmp_path / "plain")) == {None}
    content = json.loads(index_path(shard(tmp_path / "plain")).read_text())
    assert list(content["chunks"][0]) == [
        "documents",
        "key",
        "lens_offset",
        "lens_xxh3",
        "tokens",
        "tokens_offset",
        "tokens_xxh3",
    ]
    with tarfile.open(shard(tmp_path / "plain")) as archive:
        assert archive.getnames() == ["000000-00000.lens.npy", "000000-00000.tokens.npy"]
    config = read_manifest(tmp_path / "plain").preparation["config"]
    assert "id_field" not in config
    assert read_manifest(dataset).preparation["config"] == {**config, "id_field": "meta.id"}


def test_the_bytes_do_not_depend_on_the_workers(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run([corpus], tmp_path / f"{workers}", workers=workers, id_field="meta.id")
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tar_and_webdataset_read_the_shard(dataset: Path) -> None:
    index = read_index(index_path(shard(dataset)))
    chunk = index.chunks[0]
    listed = subprocess.run(["tar", "tf", shard(dataset)], capture_output=True, text=True)
    assert listed.stdout.split()[:3] == [
        f"000000-00000.{name}" for name in ("ids.txt", "lens.npy", "tokens.npy")
    ]
    samples = list(webdataset.WebDataset(str(shard(dataset)), shardshuffle=False).decode())
    assert len(samples) == len(index.chunks) > 1
    lines = samples[0]["ids.txt"].splitlines()
    assert len(lines) == len(samples[0]["lens.npy"]) == chunk.documents
    assert chunk.ids_bytes == sum(len(line.encode()) + 1 for line in lines), "the stated cost"


@pytest.mark.parametrize("at", ["first", "last", "inside"])
def test_damage_in_ids_is_named_and_harms_no_token(dataset: Path, tmp_path: Path, at: str) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", dataset, copy], check=True)
    chunk = read_index(index_path(shard(copy))).chunks[1]
    assert chunk.ids_offset is not None
    inside = random.Random(0).randrange(1, chunk.ids_bytes - 1)
    place = {"first": 0, "last": chunk.ids_bytes - 1, "inside": inside}[at]
    flip_bit(shard(copy), chunk.ids_offset + place)
    result = verify(copy)
    assert [(problem.file, problem.chunk) for problem in result.problems] == [
        ("train/main/shard-000000.tar", chunk.key)
    ]
    message = rf"shard-000000\.tar, chunk {chunk.key}: its document ids are damaged"
    with pytest.raises(DataError, match=message):
        names(copy)
    source = TokenSource(copy, read_manifest(copy), "train", "main")
    clean = TokenSource(dataset, read_manifest(dataset), "train", "main")
    whole = (0, source.num_tokens)
    assert np.array_equal(source.read(*whole), clean.read(*whole)), "training reads no ids"


def test_verify_finds_nothing_in_a_whole_dataset(dataset: Path) -> None:
    assert verify(dataset, full=True).ok


def test_a_step_leads_back_to_the_documents(dataset: Path) -> None:
    found = inspect(dataset, step=2, seed=1, seq_len=64, batch_samples=8)
    pieces = [piece for sample in found.samples for piece in sample.pieces]
    whole = names_on(dataset, "train")
    counts = [entry.documents for entry in read_manifest(dataset).source_shards("train", "main")]
    for piece in pieces:
        number = int(piece.shard.removesuffix(".tar").rpartition("-")[2])
        assert piece.id == whole[sum(counts[:number]) + piece.number]


FORMATS = {
    "a.jsonl": "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)),
    "a.json": json.dumps([{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]),
    "a.csv": "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_records_give_their_ids(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMATS[name])
    summary = run([tmp_path / name], tmp_path / "out", id_field="id", val_fraction=0)
    assert names(tmp_path / "out") == ["0", "1", "2"]
    assert not any("have no id" in warning for warning in summary.warnings)


@pytest.mark.parametrize("field", ["id", "meta.id"])
def test_parquet_gives_its_ids(tmp_path: Path, field: str) -> None:
    rows = [{"text": text, "id": i, "meta": {"id": f"m{i}"}} for i, text in enumerate(TEXTS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    run([tmp_path / "a.parquet"], tmp_path / "out", id_field=field, val_fraction=0)
    assert names(tmp_path / "out") == [f"{'m' * (field != 'id')}{i}" for i in range(3)]


def test_what_has_no_id_is_called_by_its_place_and_a_person_is_told(tmp_path: Path) -> None:
    rows = [{"text": TEXTS[0], "id": 7}, {"text": TEXTS[1]}, {"text": TEXTS[2], "id": None}]
    lines = [json.dumps(row) + "\n" for row in rows]
    files = {
        "a.jsonl": "".join(lines).encode(),
        "b.csv": b"text\nthe mill\n",
        "c.tar": tar([("web/1.txt", b"the river")]),
        "d.txt": b"the wheel",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    warc = Warc()
    warc.page("http://a.org/1", html().encode())
    warc.write(tmp_path / "e.warc")
    inputs = [tmp_path / name for name in (*files, "e.warc")]
    summary = run(inputs, tmp_path / "out", id_field="id", val_fraction=0)
    second, third = len(lines[0]), len(lines[0]) + len(lines[1])
    assert names(tmp_path / "out") == [
        "7",
        f"a.jsonl:{second}",
        f"a.jsonl:{third}",
        "b.csv:1",
        "c.tar:web/1",
        "d.txt",
        "http://a.org/1",
    ]
    assert summary.warnings[-1] == (
        "3 of 7 documents have no id 'id' (--id-field); they are called by their file and the "
        "place in it"
    )


def test_ids_follow_their_documents_through_cleaning(corpus: Path, tmp_path: Path) -> None:
    clean = {"dedup": "exact", "normalize": True}
    (tmp_path / "twin.md").write_bytes((corpus / "deep" / "note.md").read_bytes())
    inputs = [corpus / "lines.jsonl", corpus / "deep", tmp_path / "twin.md"]
    run(inputs, tmp_path / "out", id_field="meta.id", clean=clean, val_fraction=0)
    kept = [*(f"doc/{i}\n\\\ud800" for i in range(40)), "deep/note.md"]
    assert names(tmp_path / "out") == kept
    shuffled = tmp_path / "shuffled"
    summary = run(inputs, shuffled, id_field="meta.id", clean=clean, val_fraction=0, shuffle=True)
    assert sorted(map(repr, names(shuffled))) == sorted(map(repr, kept)) != list(map(repr, kept))
    assert not any("--id-field" in warning for warning in summary.warnings)
    texts = dict(zip(kept, stored(tmp_path / "out", "train"), strict=True))
    assert [texts[name] for name in names(shuffled)] == list(stored(shuffled, "train"))


def test_a_document_that_is_looked_up_says_its_id(dataset: Path) -> None:
    opened = open_datasets(dataset, seq_len=64)
    stream = SampleStream(opened, seq_len=64, seed=1)
    phases = Phases([first_phase(8, opened.slots(), opened.fingerprints(), seq_len=64)])
    found = look_up(stream, phases, shard="train/main/shard-000000.tar", number=3, steps=5)
    assert found.id == names_on(dataset, "train")[3]
