"""Every token is predicted once, with the context that is promised; scores count every text."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataError, DataUsageError, PrepareConfig
from data.instruct import Example, hold_out
from data.prepare import prepare
from data.split import HASH_RANGE, piece_hash
from data.targets import NO_TARGET
from tests.data.tiny import documents, write_dataset
from tests.train.folders import CONTEXT, SHAPES, TEXT, make_folder, make_tokenizer
from train import evaluate as evaluate_module
from train import hf
from train.evaluate import evaluate, windows


@given(st.integers(1, 200), st.integers(1, 2), st.integers(3, 40))
def test_windows_make_every_token_a_target_once(length: int, before: int, size: int) -> None:
    ids = list(range(100, 100 + length))
    seen: list[int] = []
    for number, window in enumerate(windows(ids, context_ids=[7] * before, max_tokens=size)):
        assert len(window.input_ids) <= size
        targets = window.labels[window.labels != NO_TARGET]
        seen += targets.tolist()
        # Targets stand at the end, each directly behind its input.
        assert (window.labels[len(window.labels) - len(targets) :] == targets).all()
        assert (window.input_ids[1:] == window.labels[:-1])[window.labels[:-1] != NO_TARGET].all()
        if number:
            assert len(window.input_ids) == size and size - len(targets) >= size // 2 - 1
    assert seen == ids


def brute_force(folder: Path, text: str) -> list[float]:
    """-ln p of every token of a text behind id 0, each in a forward pass of its own."""
    model, tokenizer = hf.load_causal(folder), hf.load_tokenizer(folder)
    stream = [0, *tokenizer.encode(text)]
    losses = []
    for target in range(1, len(stream)):
        end = CONTEXT
        while end < target:
            end += CONTEXT // 2
        start = max(min(end, len(stream) - 1) - CONTEXT, 0)
        with torch.no_grad():
            logits = model(torch.tensor([stream[start:target]])).logits[0, -1]
        losses.append(-float(logits.double().log_softmax(-1)[stream[target]]))
    return losses


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("repeats", [1, 5])
def test_perplexity_is_that_of_every_single_token(tmp_path: Path, shape: str, repeats: int) -> None:
    folder = make_folder(tmp_path / "model", shape, initializer_range=0.5)
    text = TEXT * repeats + "\u4e2d"
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    losses = brute_force(folder, text)
    assert (len(losses) > 2 * CONTEXT) == (repeats == 5)
    found = evaluate(folder, file)
    assert list(found) == ["loss", "perplexity", "bits_per_byte", "num_tokens"]
    assert found["num_tokens"] == len(losses)
    # fp32 logits in another batch shape.
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    bits = sum(losses) / math.log(2) / len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_texts_are_measured_one_by_one_in_any_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "model")
    texts = [TEXT * 3, "the", TEXT[:40], "mill " * 30]
    file = tmp_path / "texts.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["body"], *([text] for text in texts)])
    losses = [loss for text in texts for loss in brute_force(folder, text)]
    whole = evaluate(folder, file, text_column="body")
    monkeypatch.setattr(evaluate_module, "_LOGITS", 1)
    single = evaluate(folder, file, text_column="body")
    for found in (whole, single):
        assert found["num_tokens"] == len(losses)
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_tokenizer_that_adds_bos_starts_from_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", bos=True)
    file = tmp_path / "text.txt"
    file.write_text("the mill")
    ids = hf.load_tokenizer(folder).encode("the mill")
    with torch.no_grad():
        logits = hf.load_causal(folder)(torch.tensor([[1, *ids[:-1]]])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids))
    found = evaluate(folder, file)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["num_tokens"] == len(ids)


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[str]]:
    """A .jsonl of documents, and those that are validation at a fraction of 0.2."""
    texts = [f"{TEXT[:30]} {number}\n\n  {TEXT[40:60]}\u4e2d" for number in range(60)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    held = [text for text in texts if piece_hash(text.encode(), 0) < 0.2 * HASH_RANGE]
    assert 3 < len(held) < 30
    return path, held


def test_a_dataset_measures_like_its_validation_texts(
    tmp_path: Path, corpus: tuple[Path, list[str]]
) -> None:
    path, held = corpus
    folder = make_folder(tmp_path / "model")
    config = PrepareConfig(val_fraction=0.2)
    tokenizer = folder / "tokenizer.json"
    prepare([str(path)], tmp_path / "dataset", config, workers=1, tokenizer=tokenizer)
    plain = tmp_path / "held.jsonl"
    plain.write_text("\n".join(json.dumps({"text": text}) for text in held))
    found, expected = evaluate(folder, tmp_path / "dataset"), evaluate(folder, plain)
    assert found["num_tokens"] == expected["num_tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    # The same tokenizer in other bytes is the same tokenizer.
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=1))
    assert evaluate(folder, tmp_path / "dataset") == found


def test_a_dataset_of_another_tokenizer_is_refused(
    tmp_path: Path, corpus: tuple[Path, list[str]]
) -> None:
    folder = make_folder(tmp_path / "model")
    config = PrepareConfig(val_fraction=0.2, vocab_size=300)
    prepare([str(corpus[0])], tmp_path / "dataset", config, workers=1)
    message = (
        r"dataset was prepared with another tokenizer \(tokenizer\.model, sha256 \w{12}\) than the "
        r"one in .*model; .*headrace prepare .*--tokenizer .*tokenizer\.json`"
    )
    with pytest.raises(DataUsageError, match=message):
        evaluate(folder, tmp_path / "dataset")


def test_a_dataset_without_validation_texts_is_refused(
    tmp_path: Path, corpus: tuple[Path, list[str]]
) -> None:
    folder = make_folder(tmp_path / "model")
    config = PrepareConfig(val_fraction=0)
    tokenizer = folder / "tokenizer.json"
    prepare([str(corpus[0])], tmp_path / "dataset", config, workers=1, tokenizer=tokenizer)
    with pytest.raises(DataUsageError, match=r"no validation split; .*`--val-fraction` above 0"):
        evaluate(folder, tmp_path / "dataset")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text\.txt does not exist"),
        (b"", r"text\.txt is empty"),
        (b"ab\xff", r"text\.txt: not UTF-8 \(invalid start byte at byte 2\).*iconv"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    folder = make_folder(tmp_path / "model")
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        evaluate(folder, tmp_path / "text.txt")


def test_a_model_without_an_end_of_text_cannot_start(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(hf.ModelFolderError, match=r'name one as "eos_token"'):
        evaluate(folder, folder / "config.json")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    base = make_folder(tmp_path / "base", "qwen3", initializer_range=0.5)
    model = hf.load_classifier(base, ["mill", "river", "stone"], seed=1)
    overlay = {"model_max_length": 12, "pad_token": "<eos>"}
    hf.save_folder(model, tmp_path / "hf", tokenizer_from=base, tokenizer_config=overlay)
    return tmp_path / "hf"


def examples_file(folder: Path, num_rows: int = 70) -> tuple[Path, list[Example]]:
    words = TEXT.split()
    rows = [
        Example(" ".join(words[i % 9 : i % 9 + 1 + i % 12]) + f" {i}", ("mill", "river")[i % 2])
        for i in range(num_rows)
    ]
    path = folder / "examples.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("body", "kind"), *((e.text, e.target) for e in rows)])
    return path, rows


def predictions(folder: Path, rows: list[Example]) -> list[str]:
    """One by one, by transformers' own calls."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row.text, truncation=True, return_tensors="pt")).logits
        found.append(model.config.id2label[int(logits.argmax())])
    return found


@pytest.mark.parametrize("split", ["all", "val"])
def test_a_classifier_is_scored_on_what_transformers_predicts(
    classifier: Path, tmp_path: Path, split: str
) -> None:
    path, rows = examples_file(tmp_path)
    if split == "val":
        rows = hold_out(rows, path)[1]
    predicted = predictions(classifier, rows)
    found = evaluate(classifier, path, text_column="body", label_column="kind", split=split)
    assert list(found["per_class"]) == ["mill", "river", "stone"]
    expected = np.zeros((3, 3), dtype=int)
    for row, label in zip(rows, predicted, strict=True):
        expected[("mill", "river").index(row.target), list(found["per_class"]).index(label)] += 1
    assert found["confusion_matrix"] == expected.tolist()
    assert found["accuracy"] == pytest.approx(np.trace(expected) / len(rows))
    json.dumps(found, allow_nan=False)


def test_labels_and_files_that_do_not_fit_the_classifier_are_refused(
    classifier: Path, tmp_path: Path
) -> None:
    path, _ = examples_file(tmp_path)
    with pytest.raises(DataError, match=r"choose one with --label-column=NAME"):
        evaluate(classifier, path, text_column="body")
    with pytest.raises(DataError, match=r"the label '.*' is not one of .*'mill', 'river', 'stone'"):
        evaluate(classifier, path, text_column="body", label_column="body")
    with pytest.raises(DataUsageError, match=r"is a classifier and .* is a directory"):
        evaluate(classifier, tmp_path)


def test_a_dataset_whose_tokenizer_was_swapped_is_refused(tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    write_dataset(dataset, {"train/main": documents(5), "val/main": documents(5)})
    (dataset / "tokenizer.model").write_bytes(b"another one")
    with pytest.raises(DataError, match=r"tokenizer\.model is not the tokenizer that .* was made"):
        evaluate(make_folder(tmp_path / "model"), dataset)


@pytest.mark.parametrize("has_folder", [False, True])
def test_a_run_directory_is_no_model_and_the_message_says_which_is(
    has_folder: bool, tmp_path: Path
) -> None:
    for name in ("config.json", "attempts.jsonl"):
        (tmp_path / name).write_text("{}")
    message = rf"is a run directory .*; `headrace export {tmp_path} OUT` makes one: name OUT"
    if has_folder:
        make_folder(tmp_path / "hf")
        message = rf"is a run directory .*; its own is {tmp_path / 'hf'}: name that"
    with pytest.raises(hf.NoModelFolder, match=message) as refused:
        evaluate(tmp_path, tmp_path / "text.txt")
    assert refused.value.exit_code == 2


def test_tokenizers_of_tests_spell_every_text(tmp_path: Path) -> None:
    make_tokenizer(make_folder(tmp_path))
    tokenizer = hf.load_tokenizer(tmp_path)
    text = TEXT + " \u4e2d\u6587 \U0001f600 \t\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
