"""A preparation loses nothing, repeats itself to the byte, and refuses what is not its own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece

from data.claim import LOCK
from data.config import DataError, DataUsageError, PrepareConfig
from data.durable import read_sealed, write_sealed
from data.manifest import read_manifest
from data.prepare import prepare
from data.tokenizer import load_tokenizer, tokenizer_file
from data.verify import verify
from tests.data.prepared import SETTINGS, run, stored, tree
from tests.data.prepared import corpus as corpus
from tests.data.prepared import dataset as dataset
from tests.data.texts import prose


def test_nothing_is_lost_and_nothing_is_on_both_sides(corpus: Path, dataset: Path) -> None:
    tokenizer = load_tokenizer(dataset)
    texts = {
        side: [tokenizer.decode(ids) for ids in stored(dataset, side)] for side in ("train", "val")
    }
    # Runs of the long text lie on both sides; put in the order of the text they are the text.
    everything = texts["train"] + texts["val"]
    for path in corpus.glob("*.txt"):
        text = path.read_text()
        runs = sorted((text.find(part), part) for part in everything if part in text)
        assert "".join(part for _, part in runs) == text
    lines = [json.loads(x)["text"] for x in (corpus / "lines.jsonl").read_text().splitlines()]
    assert all(texts["train"].count(line) + texts["val"].count(line) == 1 for line in lines)
    counts = read_manifest(dataset).counts
    assert counts["documents"] == 60
    assert counts["files"] == 3
    for side in ("train", "val"):
        assert counts[f"text_bytes_{side}"] == sum(len(text.encode()) for text in texts[side]) > 0
        assert counts[f"documents_{side}"] == len(texts[side])
        assert counts[f"tokens_{side}"] == sum(map(len, stored(dataset, side)))
    assert sum(map(len, everything)) == sum(len(t) for t in lines) + sum(
        len(path.read_text()) for path in corpus.glob("*.txt")
    )


def test_a_document_is_its_ids_and_an_end(dataset: Path) -> None:
    vendor = sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))
    for side in ("train", "val"):
        for ids in stored(dataset, side):
            assert ids == [*vendor.encode(vendor.decode(ids[:-1])), 2]


def test_a_long_document_has_the_ids_of_the_whole_text(tmp_path: Path) -> None:
    text = prose(600_000)
    (tmp_path / "a.txt").write_text(text)
    run(tmp_path / "a.txt", tmp_path / "dataset", val_fraction=0)
    vendor = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "dataset" / "tokenizer.model")
    )
    assert stored(tmp_path / "dataset", "train") == [[*vendor.encode(text), 2]]


def test_the_dataset_verifies_and_states_how_it_was_made(dataset: Path) -> None:
    assert verify(dataset, full=True).ok
    manifest = read_manifest(dataset)
    assert manifest.special_ids == {"unk": 0, "bos": 1, "eos": 2, "pad": 3}
    assert (manifest.vocab_size, manifest.dtype) == (400, "<u2")
    assert "0.2 * 2^64" in manifest.split_rule and "65536 bytes" in manifest.split_rule
    preparation = manifest.preparation
    assert preparation["config"]["vocab_size"] == 400
    assert preparation["tokenizer"]["differ_after_decoding"] == 0
    assert preparation["tokenizer"]["character_coverage"] == 1.0
    assert len(manifest.source_shards("train", "main")) == 3
    assert "corpus" not in (dataset / "manifest.json").read_text(), "no path is in the manifest"


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(
    corpus: Path, dataset: Path, tmp_path: Path, workers: int
) -> None:
    run(corpus, tmp_path / "dataset", workers=workers)
    assert tree(tmp_path / "dataset") == tree(dataset)


def test_the_documents_do_not_depend_on_the_parts(
    corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    run(corpus, tmp_path / "dataset", part_bytes=2**20, shard_bytes=2**30)
    for side in ("train", "val"):
        assert stored(tmp_path / "dataset", side) == stored(dataset, side)


def test_the_fingerprint_is_of_the_content(corpus: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "elsewhere")
    summary = run(tmp_path / "elsewhere", tmp_path / "dataset")
    assert summary.manifest.fingerprint == read_manifest(dataset).fingerprint


def test_the_same_command_says_complete_and_writes_nothing(corpus: Path, dataset: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    summary = run(corpus, dataset)
    assert summary.was_complete
    assert summary.manifest == read_manifest(dataset)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_another_command_is_refused_with_the_difference(
    corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    before = tree(dataset)
    with pytest.raises(DataUsageError) as refused:
        run(corpus, dataset, vocab_size=500, bos=True, clean={"dedup": "near"}, part_bytes=9)
    assert str(refused.value) == (
        f"{dataset} was begun by another command:\n"
        "  --bos: was off, is on\n"
        "  --dedup: was off, is near\n"
        "  part_bytes: was 9000, is 9\n"
        "  --vocab-size: was 400, is 500\n"
        "give the same input and settings to continue it, or name another output"
    )
    newer = shutil.copytree(dataset, tmp_path / "newer")
    claim = read_sealed(newer / LOCK)
    write_sealed(newer / LOCK, {**claim, "config": {**claim["config"], "later": 1}})
    with pytest.raises(DataUsageError, match="does not know its settings: later: Extra inputs"):
        run(corpus, newer)
    other = tmp_path / "corpus"
    shutil.copytree(corpus, other)
    text = (other / "short.txt").read_text()
    (other / "short.txt").write_text("X" + text[1:])
    with pytest.raises(
        DataUsageError, match=rf"corpus/short\.txt: was {len(text)} bytes with hash"
    ):
        run(other, dataset)
    (other / "more.txt").write_text("more")
    with pytest.raises(DataUsageError, match="input files: was 3, is 4"):
        run(other, dataset)
    with pytest.raises(
        DataUsageError,
        match=r"--tokenizer: was none, so that one is trained, is sha256 [0-9a-f]{8}\n",
    ):
        prepare(
            [str(corpus)],
            dataset,
            PrepareConfig(),
            workers=1,
            tokenizer=tokenizer_file(dataset),
        )
    assert tree(dataset) == before


def test_a_strangers_directory_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(DataUsageError, match=r"not empty and was not begun.*thesis\.tex"):
        run(corpus, tmp_path / "mine")
    with pytest.raises(DataUsageError, match="lies inside the input"):
        run(corpus, corpus / "dataset")
    assert not (corpus / "dataset").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 270}, "need at least --vocab-size 3"),
        ({"vocab_size": 9000}, "too large for this text"),
        ({"text_field": "body"}, "no field 'body': its keys are 'text'"),
    ],
)
def test_a_refusal_writes_nothing(
    corpus: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(corpus, tmp_path / "dataset", **settings)
    assert not (tmp_path / "dataset").exists()


def test_input_that_changes_meanwhile_is_noticed(corpus: Path, tmp_path: Path) -> None:
    mine = tmp_path / "corpus"
    shutil.copytree(corpus, mine)

    def touch(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if stage == "encode":
            os.utime(mine / "short.txt", ns=(1, 1))

    with pytest.raises(DataError, match="the input changed while it was being prepared"):
        prepare(
            [str(mine)],
            tmp_path / "dataset",
            PrepareConfig.model_validate(SETTINGS),
            workers=1,
            progress=touch,
        )
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def test_progress_ends_complete_in_every_stage(corpus: Path, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def note(stage: str, done: int, total: int) -> None:
        assert last.get(stage, (0, 0))[0] <= done <= total
        last[stage] = (done, total)

    settings = PrepareConfig.model_validate(SETTINGS)
    prepare([str(corpus)], tmp_path / "dataset", settings, workers=2, progress=note)
    assert list(last) == ["read", "survey", "tokenizer", "encode", "commit"]
    assert all(done == total > 0 for done, total in last.values())


def test_nothing_is_held_out_at_fraction_zero(corpus: Path, tmp_path: Path) -> None:
    summary = run(corpus, tmp_path / "dataset", val_fraction=0)
    assert summary.manifest.source_names("val") == []
    assert summary.manifest.counts["text_bytes_val"] == 0


def test_bos_is_stored_when_asked_for(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "dataset", bos=True)
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in stored(tmp_path / "dataset", "train"))


def test_skipped_lines_are_counted_and_told(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text((corpus / "lines.jsonl").read_text() + "{oops\n\n")
    summary = run(path, tmp_path / "dataset", max_bad_lines=1)
    assert summary.warnings == ("1 JSON lines were skipped: 1 broken JSON",)
    assert summary.manifest.counts["bad_lines"] == summary.manifest.counts["dropped"] == 1
    assert summary.manifest.preparation["bad_lines"] == {"broken JSON": 1}
    assert summary.manifest.preparation["dropped"] == {"blank line": 1}
