"""`headrace recipes`: which recipes there are, and every key that one of them has.

What a key means, and what it is by default, is read from the fields of the config that the recipe
becomes; nothing is said twice. No torch.
"""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from launcher.recipes import Recipe, command_of, find_recipe, recipe_names
from train.config import FinetuneConfig, RunConfig
from train.decode import load_config

INDENT = "    "


@dataclass(frozen=True)
class Key:
    """A key of a recipe."""

    key: str
    value: Any
    default: Any
    """None where the recipe has to say it."""
    description: str


def list_recipes() -> list[dict[str, str]]:
    """Name, command and first sentence of every built-in recipe."""
    return [
        {"name": name, "command": command_of(recipe.text) or "", "about": _about(recipe)}
        for name, recipe in ((name, find_recipe(name)) for name in recipe_names())
    ]


def keys_of(name: str) -> list[Key]:
    """Every key of a recipe with its value in it, in the order of the config."""
    recipe = find_recipe(name)
    config: RunConfig | FinetuneConfig
    if command_of(recipe.text) == "finetune":
        config = load_config(FinetuneConfig, recipe.text, name=recipe.name)
    else:
        config = load_config(RunConfig, recipe.text, name=recipe.name)
    return list(_keys(config))


def show_recipes(name: str | None, *, as_json: bool) -> None:
    """Print the recipes, or the keys of one."""
    if name is not None:
        _show_keys(name, as_json=as_json)
        return
    listed = list_recipes()
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    width = max(len(recipe["name"]) for recipe in listed)
    for recipe in listed:
        print(f"{recipe['name']:{width}}  {recipe['command']:8}  {recipe['about']}")
    print("`headrace recipes NAME` shows every key of one; set them as KEY=VALUE")


def _show_keys(name: str, *, as_json: bool) -> None:
    keys = keys_of(name)
    if as_json:
        print(json.dumps([asdict(key) for key in keys], indent=2))
        return
    width = max(shutil.get_terminal_size().columns - len(INDENT), 40)
    for key in keys:
        default = "" if key.default is None else f"  (default {_text(key.default) or 'empty'})"
        print(f"{key.key}={_text(key.value)}{default}")
        for line in textwrap.wrap(key.description, width, break_on_hyphens=False):
            print(f"{INDENT}{line}")


def _keys(config: BaseModel, prefix: str = "") -> Iterator[Key]:
    """Every field of a config, tables opened."""
    values = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        inner = getattr(config, name)
        if isinstance(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            default = None
        description = " ".join((field.description or "").split())
        yield Key(f"{prefix}{name}", values[name], default, description)


def _about(recipe: Recipe) -> str:
    """The first sentence of the comment that a recipe begins with, without what is in brackets."""
    lines = []
    for line in recipe.text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    text = re.sub(r" \([^()]*\)", "", " ".join(lines))
    end = text.find(". ")
    return text[: end + 1] if end >= 0 else text


def _text(value: Any) -> str:
    """A value as it is written behind KEY=."""
    return value if isinstance(value, str) else json.dumps(value)
