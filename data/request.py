"""What a person asked of a preparation: inputs, output, settings, tokenizer and evaluation files.

The settings are recorded with the output and with the plan, and compared by every later call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data import vocabulary
from data.claim import differences, shown
from data.clean import Cleaner
from data.config import PrepareConfig
from data.decontaminate import evaluation_files
from data.tokenizer import tokenizer_file


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    inputs: tuple[str, ...]
    output: Path
    config: PrepareConfig
    tokenizer: Path | None
    cleaner: Cleaner
    content: dict[str, Any]
    """The settings as they are recorded and compared."""

    @classmethod
    def of(
        cls,
        inputs: Sequence[str],
        output: Path,
        config: PrepareConfig,
        tokenizer: Path | None,
        decontaminate: Sequence[Path],
    ) -> Request:
        """Raises DataUsageError for a tokenizer or evaluation files that cannot be used."""
        cleaner = Cleaner(config.clean, evaluation_files(tuple(decontaminate)))
        if tokenizer is not None and tokenizer.is_dir():
            tokenizer = tokenizer_file(tokenizer)
        given = tokenizer and vocabulary.tokenizer_identity(tokenizer, config)
        content: dict[str, Any] = {"config": config.model_dump(mode="json"), "tokenizer": given}
        if decontaminate:
            content["decontaminate"] = {file.path.name: file.xxh3 for file in cleaner.evaluation}
        return cls(tuple(inputs), output, config, tokenizer, cleaner, content)

    def differences(self, then: Mapping[str, Any]) -> list[str]:
        """What an earlier request asked for otherwise."""
        if "kind" in then["config"]:
            return [f"it was made by `headrace data {then['config']['kind']}`"]
        try:
            before = PrepareConfig.model_validate(then["config"]).settings()
        except ValidationError as error:
            what = error.errors()[0]
            key = ".".join(map(str, what["loc"]))
            return [f"this headrace does not know its settings: {key}: {what['msg']}"]
        own, brought = then.get("tokenizer"), self.content["tokenizer"]
        now = self.config.settings()
        if (own is None) != (brought is None):
            before, now = (
                {k: v for k, v in s.items() if k not in _TRAINING} for s in (before, now)
            )
        found = differences(before, now)
        if own != brought:
            found.append(f"--tokenizer: was {_told_tokenizer(own)}, is {_told_tokenizer(brought)}")
        held, holds = then.get("decontaminate") or {}, self.content.get("decontaminate") or {}
        for name in sorted({*held, *holds}):
            if held.get(name) != holds.get(name):
                was, now_is = (shown(side.get(name, "")[:8]) for side in (held, holds))
                found.append(f"--decontaminate {name}: was {was}, is {now_is}")
        return found


_TRAINING = ("vocab_size", "tokenizer_type", "user_symbols", "tokenizer_bytes")
"""Settings that mean nothing where a tokenizer is brought."""


def _told_tokenizer(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "none, so that one is trained"
    names = [f"{key} {value}" for key, value in identity.items() if key != "sha256"]
    return " with ".join([f"sha256 {identity['sha256'][:8]}", *names])
