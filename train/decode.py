"""From the text of a recipe and `key=value` overrides to a config, or to a refusal that helps.

An unknown key is refused with the one that was probably meant, a bad value with its key. No torch.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from train.config import ConfigError, FinetuneConfig, RunConfig

Config = TypeVar("Config", RunConfig, FinetuneConfig)


def load_config(
    kind: type[Config], recipe: str, overrides: Sequence[str] = (), *, name: str = "recipe"
) -> Config:
    """The config of a TOML recipe (its text) with `key=value` overrides, dotted keys, applied in
    order.

    Raises ConfigError that names the key, and the key that was probably meant.
    """
    try:
        table = tomllib.loads(recipe)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(table, override, kind)
    return decode(kind, table, name=name)


def decode(kind: type[Config], table: Mapping[str, Any], *, name: str = "config") -> Config:
    """`table` as a `kind`; ConfigError lists every key that is unknown or has a bad value."""
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(kind, item, name) for item in error.errors())
        ) from None


def flat_keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested mapping."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config of this kind may carry."""
    for key, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from known_keys(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _apply(table: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as optim.lr=3e-4"
        )
    if key in ("data", "model") and f"{key}.path" in known_keys(kind):
        key = f"{key}.path"
    *tables, leaf = key.strip().split(".")
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a table")
    table[leaf] = _value(text) if key.split(".")[-1] not in ("path", "val") else text


def _value(text: str) -> Any:
    # Whatever TOML can read is TOML; anything else is a bare string, so that data.path=a/b needs no
    # quotes.
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[BaseModel], item: Any, name: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        keys = list(known_keys(kind))
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5) or difflib.get_close_matches(
            key.split(".")[-1], keys, n=1, cutoff=0.5
        )
        hint = f"did you mean {near[0]!r}?" if near else "keys are: " + ", ".join(keys)
        return f"{name}: unknown key {key!r}; {hint}"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{name}: {key + ': ' if key else ''}{message}"
    return f"{name}: {key} = {item['input']!r}: {item['msg']}"
