"""Folders are loaded without running their code, and refused when something of them is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.folders import CONTEXT, SHAPES, make_folder, make_tokenizer
from train import hf


@pytest.fixture(params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", request.param)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_written_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    model = hf.load_causal(folder)
    hf.save_folder(model, tmp_path / "out", tokenizer_from=folder)
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert hf.context_length(folder) == CONTEXT
    assert hf.labels_of(folder) is None


def test_a_classifier_keeps_its_labels_and_its_head(folder: Path, tmp_path: Path) -> None:
    labels = ["yes", "no", "maybe"]
    model = hf.load_classifier(folder, labels, seed=3)
    again = hf.load_classifier(folder, labels, seed=3)
    other = hf.load_classifier(folder, labels, seed=4)
    assert torch.equal(model.score.weight, again.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    hf.save_folder(
        model, tmp_path / "out", tokenizer_from=folder, tokenizer_config={"model_max_length": 9}
    )
    assert hf.labels_of(tmp_path / "out") == labels
    assert hf.load_tokenizer(tmp_path / "out").max_tokens == 9
    loaded = hf.load_classifier(tmp_path / "out")
    assert torch.equal(loaded.score.weight, model.score.weight)
    with pytest.raises(hf.ModelFolderError, match=r"a classifier for \['yes'.*start from the lang"):
        hf.load_classifier(tmp_path / "out", ["yes", "no"])
    with pytest.raises(hf.ModelFolderError, match=r"is a classifier and predicts no text"):
        hf.load_causal(tmp_path / "out")


def test_a_classifier_reads_past_padding(folder: Path) -> None:
    model = hf.load_classifier(folder, ["a", "b"])
    ids = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 0, 0], [0] * 5])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        beside = model(input_ids=padded, attention_mask=mask).logits
    # Another shape sums in another order; fp32 and values near 1.
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-5, atol=1e-6)
    assert beside.isfinite().all()


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(hf.ModelFolderError, match=r"only pytorch_model\.bin, which can run code"):
        hf.load_causal(folder)


def test_code_in_a_folder_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    edit(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    with pytest.raises(hf.ModelFolderError, match=r"config\.json names no model that transformers"):
        hf.load_causal(folder)


def test_missing_weights_are_refused_instead_of_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "norm" in name or "ln_" in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (hf.load_causal, lambda path: hf.load_classifier(path, ["a", "b"])):
        with pytest.raises(hf.ModelFolderError, match=rf"lacks 1 weights .* such as .*{gone}"):
            load(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(hf.ModelFolderError, match=r"model\.safetensors cannot be read: "):
        hf.load_causal(folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "has no config.json"), (tmp_path / "no", "is no directory")):
        with pytest.raises(hf.ModelFolderError, match=rf"{message}; make one .*headrace export"):
            hf.load_tokenizer(path)
    folder = make_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(hf.ModelFolderError, match=r"tokenizer cannot be loaded"):
        hf.load_tokenizer(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", vocab_size=100)
    with pytest.raises(hf.ModelFolderError, match=r"id \d+, outside the model's vocabulary of 100"):
        hf.load_tokenizer(folder).encode("the river")


def test_inputs_are_cut_where_the_tokenizer_cuts_them(tmp_path: Path) -> None:
    tokenizer = hf.load_tokenizer(make_folder(tmp_path / "model", bos=True))
    (short, was_cut), (long, was_long) = tokenizer.encode_inputs(["the", "the " * 50], max_tokens=8)
    assert (short[0], was_cut) == (1, False)
    assert (long[0], len(long), was_long) == (1, 8, True)
    assert tokenizer.encode("the")[0] != 1
    assert tokenizer.prefix_ids == tokenizer.context_ids() == [1]


def test_a_text_stands_behind_the_end_of_another(tmp_path: Path) -> None:
    tokenizer = hf.load_tokenizer(make_folder(tmp_path / "model"))
    assert (tokenizer.prefix_ids, tokenizer.context_ids(), tokenizer.fill_id) == ([], [0], 0)


def test_a_tokenizer_without_special_tokens_cannot_pad(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    make_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = hf.load_tokenizer(folder)
    assert tokenizer.context_ids() == []
    with pytest.raises(hf.ModelFolderError, match=r"no padding and no end-of-sequence token"):
        _ = tokenizer.fill_id
