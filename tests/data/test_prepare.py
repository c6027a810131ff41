"""A preparation loses nothing, repeats itself to the byte, and survives a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from data.config import DataError, DataUsageError, PrepareConfig
from data.manifest import read_manifest
from data.prepare import Summary, prepare
from data.tokenizer import load_tokenizer, tokenizer_file
from data.tokens import TokenSource
from data.verify import verify
from tests.data.texts import prose, write_lines

SETTINGS = {"vocab_size": 400, "val_fraction": 0.2, "part_bytes": 9_000, "shard_bytes": 30_000}


def run(path: Path, output: Path, *, workers: int = 1, **settings: object) -> Summary:
    config = PrepareConfig.model_validate(SETTINGS | settings)
    return prepare([str(path)], output, config, workers=workers)


def stored(dataset: Path, side: str) -> list[list[int]]:
    """Every document of a side as ids."""
    manifest = read_manifest(dataset)
    found: list[list[int]] = []
    for name in manifest.source_names(side):
        source = TokenSource(dataset, manifest, side, name)
        start = 0
        for document in source.documents(0, source.num_tokens):
            found.append(source.read(start, start + document.num_tokens).tolist())
            start += document.num_tokens
    return found


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long text of several pieces, small texts and JSON lines."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    (folder / "long.txt").write_text(prose(250_000))
    (folder / "short.txt").write_text(prose(500, seed=1))
    write_lines(folder / "lines.jsonl", [prose(400, seed=seed) for seed in range(2, 60)])
    return folder


@pytest.fixture(scope="module")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dataset") / "dataset"
    run(corpus, output)
    return output


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
    with pytest.raises(
        DataUsageError, match=r"begun by another command \(vocab_size: 400 then, 500 now\)"
    ):
        run(corpus, dataset, vocab_size=500)
    other = tmp_path / "corpus"
    shutil.copytree(corpus, other)
    text = (other / "short.txt").read_text()
    (other / "short.txt").write_text("X" + text[1:])
    with pytest.raises(DataUsageError, match=rf"corpus/short\.txt: {len(text)} bytes with hash"):
        run(other, dataset)
    (other / "more.txt").write_text("more")
    with pytest.raises(DataUsageError, match="input files: 3 then, 4 now"):
        run(other, dataset)
    with pytest.raises(DataUsageError, match=r"sha256: 'absent' then, '[0-9a-f]{64}' now"):
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


def bring(corpus: Path, output: Path, tokenizer: Path, **settings: object) -> Summary:
    config = PrepareConfig.model_validate({"val_fraction": 0.2} | settings)
    return prepare([str(corpus)], output, config, workers=1, tokenizer=tokenizer)


def test_a_brought_sentencepiece_model_is_used_as_it_is(
    corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    model = dataset / "tokenizer.model"
    summary = bring(corpus, tmp_path / "brought", model)
    assert (tmp_path / "brought" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert stored(tmp_path / "brought", "val") == stored(dataset, "val")
    assert summary.warnings == ()
    assert not summary.manifest.preparation["tokenizer"]["is_trained_here"]
    assert bring(corpus, tmp_path / "brought", model).was_complete


def test_a_brought_tokenizer_json_is_used_through_the_same_protocol(
    corpus: Path, tmp_path: Path
) -> None:
    vocabulary = {f"word{i}": i for i in range(70_000)} | {chr(i): 70_000 + i for i in range(10)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    letters = sorted(set("".join(path.read_text() for path in corpus.iterdir())))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(letters)
    tokenizer.save(str(tmp_path / "mine.json"))
    summary = bring(corpus, tmp_path / "dataset", tmp_path / "mine.json")
    assert (tmp_path / "dataset" / "tokenizer.json").is_file()
    assert summary.manifest.dtype == "<u4"
    assert summary.manifest.special_ids == {"eos": 70_010}
    own = load_tokenizer(tmp_path / "dataset")
    assert own.eos_id == 70_010
    ids = stored(tmp_path / "dataset", "val")
    assert all(document[-1] == 70_010 for document in ids)
    assert np.concatenate(ids).min() > 70_010 - 1


def test_a_tokenizer_that_loses_text_is_told(corpus: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((corpus / "long.txt").read_text().split("\n")),
        model_prefix=str(tmp_path / "other"),
        vocab_size=200,
        model_type="unigram",
        max_sentence_length=100_000,
        minloglevel=2,
    )
    summary = bring(corpus, tmp_path / "dataset", tmp_path / "other.model")
    lossy, unexportable = summary.warnings
    assert "the tokenizer is not lossless" in lossy
    assert "cannot be exported" in unexportable and "unigram" in unexportable


def test_a_tokenizer_and_a_vocabulary_size_contradict_each_other(
    corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataUsageError, match="give only one of them"):
        bring(corpus, tmp_path / "dataset", dataset / "tokenizer.model", vocab_size=300)


def test_the_sign_for_a_space_is_told(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [prose(500, seed=s) + "\u2581" for s in range(9)])
    summary = run(path, tmp_path / "dataset", vocab_size=350)
    assert summary.warnings == (
        "the text holds 9 characters U+2581, sentencepiece's sign for a space: they come back as "
        "spaces",
    )


KILLS = """
import os, signal, sys
from pathlib import Path
from data import prepare, shards
from data.config import PrepareConfig
import webdataset.writer

corpus, folder = sys.argv[1], Path(sys.argv[2])
settings = PrepareConfig.model_validate_json(sys.argv[3])

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def dying(call, name):
    # Counts the moments at which files come into being, and dies before or after the call-th.
    left = [call]
    for function in ("replace", "fsync", "mkdir"):
        def counting(*args, real=getattr(os, function), **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, function, counting)
    prepare.prepare([corpus], folder / name, settings, workers=1)

call = 1
while True:
    name = f"kill-{call}"
    status = child(lambda: dying(call, name))
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    complete = (folder / name / "manifest.json").exists()
    status = child(lambda: prepare.prepare([corpus], folder / name, settings, workers=1))
    assert status == 0, (call, status)
    print(name, complete, flush=True)
    call += 1
"""


def test_a_kill_at_any_moment_leaves_what_the_same_command_completes(
    tmp_path: Path,
) -> None:
    corpus = write_lines(tmp_path / "a.jsonl", [prose(300, seed=seed) for seed in range(40)])
    settings = PrepareConfig(vocab_size=330, val_fraction=0.2, part_bytes=5000, shard_bytes=6000)
    reference = tmp_path / "reference"
    prepare([str(corpus)], reference, settings, workers=1)
    command = [sys.executable, "-c", KILLS, str(corpus), str(tmp_path / "kills")]
    (tmp_path / "kills").mkdir()
    command.append(settings.model_dump_json())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = [line.split() for line in done.stdout.splitlines()]
    assert len(killed) > 25, "too few moments were tried"
    assert {complete for _, complete in killed} == {"True", "False"}
    expected = tree(reference)
    for name, _ in killed:
        assert tree(tmp_path / "kills" / name) == expected, name
