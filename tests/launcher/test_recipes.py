"""Recipes are found by name or path, belong to one command, and say what a config can hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.recipes import RecipeError, find_recipe, recipe_names
from train.config import FinetuneConfig, RunConfig
from train.decode import load_config

COMMANDS = {
    "tiny-cpu": "pretrain",
    "llama-1b": "pretrain",
    "llama-7b": "pretrain",
    "instruct": "finetune",
    "classify": "finetune",
}


def test_every_recipe_is_a_valid_config_of_its_command() -> None:
    assert recipe_names() == sorted(COMMANDS)
    for name, command in COMMANDS.items():
        recipe = find_recipe(name, command)  # type: ignore[arg-type]
        kind = RunConfig if command == "pretrain" else FinetuneConfig
        assert load_config(kind, recipe.text, name=name).precision == "bf16"


def test_a_recipe_is_found_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text("steps = 3\n")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "mine.toml"), "mine.toml", "./mine.toml"):
        recipe = find_recipe(name, "pretrain")
        assert (recipe.name, recipe.text) == ("mine", "steps = 3\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-cp", r"no recipe named 'tiny-cp'; did you mean 'tiny-cpu'\? recipes: classify, "),
        ("zzz", r"no recipe named 'zzz'; recipes: classify, instruct, llama-1b, llama-7b, tiny-"),
        ("./gone.toml", r"no recipe file at gone\.toml; built-in ones need no path: classify"),
        ("data=X", r"'data=X' looks like a key=value override, but the recipe comes first: "
                   r"headrace pretrain tiny-cpu data=X"),
        ("classify", r"is for `headrace finetune`; this takes one for `headrace pretrain`, such"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_not_there_is_refused_with_help(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        find_recipe(name, "pretrain")
    assert raised.value.exit_code == 2


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"steps = 3 \xff")
    with pytest.raises(RecipeError, match=r"bad\.toml: not UTF-8 at byte 10"):
        find_recipe(str(path), "pretrain")


def test_a_killed_try_of_the_small_recipe_is_no_whole_run() -> None:
    recipe = find_recipe("tiny-cpu", "pretrain")
    assert 0 < load_config(RunConfig, recipe.text, ["steps=60"]).checkpoint.every <= 20
    assert load_config(RunConfig, recipe.text, ["checkpoint.every=20"]).checkpoint.every == 20
