"""Generation: greedy is the argmax, a seed repeats its text, the prompt is not printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.folders import CONTEXT, SHAPES, make_folder
from train import hf
from train.generate import GenerateError, generate

PROMPT = "the river runs"


def argmax_continuation(folder: Path, ids: list[int], count: int) -> list[int]:
    model, new = hf.load_causal(folder), []
    for _ in range(count):
        with torch.no_grad():
            best = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if best == 0:
            break
        new.append(best)
    return new


@pytest.mark.parametrize("shape", SHAPES)
def test_temperature_zero_takes_the_likeliest_token(tmp_path: Path, shape: str) -> None:
    folder = make_folder(tmp_path, shape)
    tokenizer = hf.load_tokenizer(folder)
    expected = argmax_continuation(folder, tokenizer.encode(PROMPT), 6)
    found = generate(folder, PROMPT, max_tokens=6, temperature=0)
    assert found == tokenizer.decode(expected)
    assert found and not found.startswith(PROMPT)


def test_a_seed_repeats_its_text_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    before = torch.random.get_rng_state()
    texts = [generate(folder, PROMPT, max_tokens=8, temperature=1, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_the_folder_recommends_does_not_shape_the_distribution(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    free = generate(folder, PROMPT, max_tokens=12, temperature=1, seed=5)
    path = folder / "generation_config.json"
    settings = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    assert generate(folder, PROMPT, max_tokens=12, temperature=1, seed=5) == free
    assert generate(folder, PROMPT, max_tokens=12, temperature=0) != free


def test_a_long_prompt_loses_its_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path)
    tokenizer = hf.load_tokenizer(folder)
    ids = tokenizer.encode(PROMPT * 20)
    expected = argmax_continuation(folder, ids[-(CONTEXT - 6) :], 6)
    assert generate(folder, PROMPT * 20, max_tokens=6, temperature=0) == tokenizer.decode(expected)
    assert f"has {len(ids)} tokens; its last {CONTEXT - 6} are used" in caplog.text


def test_an_empty_prompt_begins_a_document(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    expected = argmax_continuation(folder, [0], 4)
    found = generate(folder, "", max_tokens=4, temperature=0)
    assert found == hf.load_tokenizer(folder).decode(expected)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with pytest.raises(GenerateError, match=rf"context of {CONTEXT} tokens; write at most 63"):
        generate(folder, PROMPT, max_tokens=CONTEXT)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: write at least 1"),
        ({"temperature": -1.0}, r"temperature=-1.0: write 0 for the likeliest token, or 0.001 to"),
        ({"temperature": 1e-300}, r"temperature=1e-300: write 0 for the likeliest token"),
        ({"temperature": float("nan")}, "temperature=nan: write 0"),
        ({"seed": 2**64}, rf"seed={2**64}: write a number from 0 to 2\^64 - 1"),
        ({"prompt": "a\udcff"}, "the prompt is not UTF-8 at its character 2; is the terminal"),
    ],
)
def test_what_no_model_can_do_is_refused(
    request_: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GenerateError, match=message) as refused:
        generate(tmp_path, **{"prompt": PROMPT, **request_})
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("temperature", [0.001, 1000.0])
def test_the_extreme_temperatures_and_seeds_work(temperature: float, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    generate(folder, PROMPT, max_tokens=3, temperature=temperature, seed=2**64 - 1)


def test_by_default_as_many_tokens_are_added_as_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path, eos_token_id=None)
    tokenizer = hf.load_tokenizer(folder)
    room = CONTEXT - len(tokenizer.encode(PROMPT))
    assert generate(folder, PROMPT, temperature=0) == generate(
        folder, PROMPT, max_tokens=room, temperature=0
    )
    generate(folder, PROMPT * 20, temperature=0)
    assert f"its last {CONTEXT // 2} are used" in caplog.text
