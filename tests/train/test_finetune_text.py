"""What a model is tuned on: the tokens of prompt and response, and their loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.targets import NO_TARGET
from tests.train.folders import CONTEXT, SHAPES, make_folder
from tests.train.test_finetune import SPELLS, config, spoken, write
from train import hf
from train.finetune import finetuning, prepare_examples

__all__ = ["spoken"]  # a fixture


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_that_of_transformers(tmp_path: Path, spoken: Path, shape: str) -> None:
    folder = make_folder(tmp_path / "model", shape)
    made = config("task=instruct", f"model={folder}", f"data={spoken}", f"data.val={spoken}")
    made, examples = prepare_examples(made)
    task = finetuning(made, examples, num_ranks=1).task
    model = hf.load_causal(folder)
    total = 0.0
    for prompt, response in SPELLS.items():
        tokenizer = hf.load_tokenizer(folder)
        before, after = tokenizer.encode(prompt + "\n"), [*tokenizer.encode(response), 0]
        labels = torch.tensor([[NO_TARGET] * len(before) + after])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([before + after]), labels=labels)
        total += float(output.loss) * len(after)
    (batch,) = task.micro_batches(1, 1, rank=0, num_ranks=1)
    once = [index for index in range(5)][:3]
    rows = {key: value[once] for key, value in batch.items() if key != "data_hash"}
    with torch.no_grad():
        # The first three samples are the three examples, in some order.
        assert float(task.loss_sum(model, rows)) == pytest.approx(total, rel=1e-5)


def test_a_chat_template_is_used_where_the_folder_has_one(
    tmp_path: Path, spoken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    folder = make_folder(tmp_path / "model", chat_template=template)
    made = config("task=instruct", f"model={folder}", f"data={spoken}", f"data.val={spoken}")
    with caplog.at_level("INFO", logger="train"):
        made, examples = prepare_examples(made)
    assert "prompt template: the folder's chat template" in caplog.text
    tokenizer = hf.load_tokenizer(folder)
    for example, (prompt, response) in zip(examples.train, SPELLS.items(), strict=True):
        targets = example.labels[example.labels != NO_TARGET].tolist()
        assert tokenizer.decode(targets) == response and targets[-1] == 0
        read = tokenizer.decode(example.input_ids.tolist())
        assert read == f"[user] {prompt}[assistant] {response}"


def test_what_does_not_fit_is_cut_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "the mill " * n, "response": "the wheel"} for n in (1, 2, 50, 60)]
    data = write(tmp_path / "long.jsonl", rows)
    folder = make_folder(tmp_path / "model", bos=True)
    made = config("task=instruct", f"model={folder}", f"data={data}", f"data.val={data}")
    with caplog.at_level("INFO", logger="train"):
        made, examples = prepare_examples(made)
    assert made.seq_len == CONTEXT
    assert "4 of 8 examples are longer than seq_len=64 and lost the beginning" in caplog.text
    tokenizer = hf.load_tokenizer(folder)
    for example in examples.train:
        ids = [*example.input_ids.tolist(), int(example.labels[-1])]
        assert ids[0] == 1 and len(ids) <= CONTEXT + 1
        assert tokenizer.decode(ids).endswith("the mill \nthe wheel") and ids[-1] == 0
