"""Recipes and their keys can be found without reading our code."""

from __future__ import annotations

import json

import pytest

from launcher.catalog import keys_of, list_recipes, show_recipes
from launcher.recipes import find_recipe, recipe_names
from train.config import FinetuneConfig, RunConfig
from train.decode import known_keys, load_config


def test_recipes_are_listed_with_their_command_in_one_line_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_recipes(None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == recipe_names()
    assert "tiny-cpu  pretrain  A model of about a million parameters: seconds per run" in lines[-2]
    assert lines[-1].startswith("`headrace recipes NAME` shows every key of one")
    show_recipes(None, as_json=True)
    assert json.loads(capsys.readouterr().out) == list_recipes()


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_of_a_recipe_is_shown_with_value_default_and_meaning(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = FinetuneConfig if name in ("classify", "instruct") else RunConfig
    keys = keys_of(name)
    assert [key.key for key in keys] == list(known_keys(kind))
    assert all(key.description for key in keys)
    show_recipes(name, as_json=True)
    assert [row["key"] for row in json.loads(capsys.readouterr().out)] == list(known_keys(kind))
    # What is shown can be typed: all values together give the recipe again.
    text = find_recipe(name).text
    typed = [f"{key.key}={json.dumps(key.value)}" for key in keys if key.value not in ("", {}, [])]
    typed = [override for override in typed if not override.startswith("data.sources")]
    assert load_config(kind, text, typed) == load_config(kind, text)


def test_a_key_reads_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    show_recipes("tiny-cpu", as_json=False)
    shown = capsys.readouterr().out
    assert (
        "\noptim.lr=0.004  (default 0.0003)\n"
        "    Peak learning rate; 0, in fine-tuning only, takes it from the model's size.\n"
    ) in shown
    assert "\nprecision=bf16  (default bf16)\n" in shown
