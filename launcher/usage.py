"""From what was typed to values: a config of several options, or a usage error that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

Config = TypeVar("Config", bound="BaseModel")
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""Of words that a command does not take; typer gives it no name."""


def parse(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """`values` as a config; a bad one is a usage error."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(first["input"], dict):
            # What several options say together; the message names them.
            raise typer.BadParameter(first["msg"].removeprefix("Value error, ")) from None
        names = [name for name in first["loc"] if isinstance(name, str)]
        option = "--" + names[-1].replace("_", "-")
        raise typer.BadParameter(f"{option} {first['input']}: {first['msg']}") from None


def names(option: str, value: str | None) -> tuple[str, ...]:
    """The names in a list with commas; an empty one is a usage error."""
    if value is None:
        return ()
    found = tuple(name.strip() for name in value.split(","))
    if "" in found:
        raise typer.BadParameter(
            f"{option} {value!r}: a name is empty; leave out the comma too many, or the option"
        )
    return found


class NotTaken(ValueError):
    """Words that a command does not take."""


def parsed(command: str, words: Sequence[str]) -> dict[str, Any]:
    """What `headrace COMMAND` reads out of these words, by parameter. NotTaken when it would refuse
    them. Nothing is run.
    """
    from typer.main import get_command

    from launcher.cli import app

    group: Any = get_command(app)
    context = group.make_context("headrace", [command], resilient_parsing=True)
    parser = group.get_command(context, command)
    if "--help" in words:
        raise NotTaken("--help makes nothing")
    try:
        found: dict[str, Any] = parser.make_context(command, list(words), parent=context).params
    except USAGE_ERROR as error:
        told = error.format_message() if hasattr(error, "format_message") else error
        raise NotTaken(str(told)) from None
    return found
