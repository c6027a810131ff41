"""Recipes: one TOML file each, found by name here or by path anywhere.

A name is looked up among the files of this folder; anything with a slash or ending in .toml is a
path. What a recipe may contain is decided by `train/config.py`; this module only finds the text and
says which command it belongs to.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

FOLDER = Path(__file__).resolve().parent

Command = Literal["pretrain", "finetune"]


class RecipeError(ValueError):
    """A recipe that is not there or belongs to another command; the message lists what is there."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Recipe:
    """The text of a recipe and what messages call it."""

    name: str
    """Stem of the file: also the default name of a run."""
    path: Path
    text: str

    @property
    def is_file(self) -> bool:
        """Whether it is somebody's own file, not one of the built-in ones."""
        return self.path.parent.resolve() != FOLDER


def recipe_names() -> list[str]:
    """Names of the built-in recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_recipe(name: str, command: Command | None = None) -> Recipe:
    """The recipe called `name`, or in the file `name`.

    RecipeError when there is none, or when it belongs to another command than the one that is
    named.
    """
    if command and "=" in name and not Path(name).exists():
        raise RecipeError(
            f"{name!r} looks like a key=value override, but the recipe comes first: "
            f"headrace {command} {_first(command)} {name}"
        )
    path = Path(name) if _is_path(name) else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise RecipeError(_not_found(name, path))
    try:
        recipe = Recipe(path.stem, path, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not UTF-8 at byte {error.start}; a recipe is a TOML text file"
        ) from None
    belongs = command_of(recipe.text)
    if command and belongs not in (None, command):
        raise RecipeError(
            f"recipe {name!r} is for `headrace {belongs}`; this takes one for `headrace "
            f"{command}`, such as {_first(command)}"
        )
    return recipe


def command_of(text: str) -> Command | None:
    """Which command a recipe is for; None when it is not TOML (its reader says why)."""
    try:
        return "finetune" if "task" in tomllib.loads(text) else "pretrain"
    except tomllib.TOMLDecodeError:
        return None


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(".toml")


def _first(command: Command) -> str:
    return "classify" if command == "finetune" else "tiny-cpu"


def _not_found(name: str, path: Path) -> str:
    if _is_path(name):
        return f"no recipe file at {path}; built-in ones need no path: {', '.join(recipe_names())}"
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"no recipe named {name!r}; {hint}recipes: {', '.join(recipe_names())}. "
        f"A file of your own is given by path, such as ./{name}.toml"
    )
