"""One document through the stages of cleaning, and the account of what each stage did.

A stage keeps a document, changes it or drops it for a reason, by its text alone; so every process
that cleans the same document gets the same. Whether a document repeats another is not seen here:
data/dedup.py says so for the whole input.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.config import CleanConfig
from data.decontaminate import EvaluationFile, load_evaluation
from data.language import check_languages, language_of
from data.privacy import mask
from data.quality import broken_rule
from data.trove import apply_rules, check_rules

STAGES = (
    "normalize",
    "language",
    "filter",
    "filter_datatrove",
    "decontaminate",
    "mask_pii",
    "dedup",
)
"""In this order; each sees what the one before has left."""
_BOM = "\ufeff"


@dataclass
class StageCount:
    """What came into a stage and what left it. Bytes are of UTF-8."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""
    found: Counter[str] = field(default_factory=Counter)
    """What was changed or met, by kind."""

    def add(self, other: StageCount) -> None:
        """Take in the count of other documents."""
        self.documents_in += other.documents_in
        self.bytes_in += other.bytes_in
        self.documents_out += other.documents_out
        self.bytes_out += other.bytes_out
        self.dropped += other.dropped
        self.found += other.found

    def to_json(self) -> dict[str, Any]:
        """Plain values, with sorted keys."""
        counts = {"dropped": self.dropped, "found": self.found}
        return vars(self) | {key: dict(sorted(value.items())) for key, value in counts.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StageCount:
        """What `to_json` gave."""
        counts = {key: Counter(value[key]) for key in ("dropped", "found")}
        return cls(**{**value, **counts})


Account = dict[str, StageCount]


def merge(account: Account, other: Account) -> None:
    """Add the counts of other documents to an account."""
    for stage in STAGES:
        if stage in other:
            account.setdefault(stage, StageCount()).add(other[stage])


@dataclass(frozen=True)
class Cleaner:
    """The stages that are on, but for the search for duplicates."""

    config: CleanConfig
    evaluation: tuple[EvaluationFile, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether any stage is."""
        return self != Cleaner(CleanConfig())

    def check(self) -> dict[str, str]:
        """Versions of the packages that decide. DataUsageError for what cannot be done here."""
        versions: dict[str, str] = {}
        if self.config.language:
            versions |= check_languages(self.config.language)
        if self.config.filter_datatrove:
            versions |= check_rules()
        if self.evaluation:
            load_evaluation(self.evaluation)
        return versions

    def changed(self, text: bytes) -> bytes:
        """A document that no stage drops, as it is stored."""
        if self.config.normalize:
            text = _normal(text.decode(), Counter()).encode()
        if "c4" in self.config.filter_datatrove:
            text = apply_rules(text.decode(), ("c4",))[0].encode()
        return mask(text.decode())[0].encode() if self.config.mask_pii else text

    def clean(self, text: bytes, account: Account) -> str | None:
        """The document as it is stored, None when it is dropped; `account` takes the count."""
        found: str | None = text.decode()
        size = len(text)
        for stage, is_on in (
            ("normalize", self.config.normalize),
            ("language", bool(self.config.language)),
            ("filter", self.config.filter),
            ("filter_datatrove", bool(self.config.filter_datatrove)),
            ("decontaminate", bool(self.evaluation)),
            ("mask_pii", self.config.mask_pii),
        ):
            if not is_on or found is None:
                continue
            count = account.setdefault(stage, StageCount())
            count.documents_in += 1
            count.bytes_in += size
            found = self._stage(stage, found, count)
            if found is not None:
                size = len(found.encode())
                count.documents_out += 1
                count.bytes_out += size
        return found

    def _stage(self, stage: str, text: str, count: StageCount) -> str | None:
        if stage == "normalize":
            normal = _normal(text, count.found)
            if not normal:
                count.dropped["nothing left"] += 1
            return normal or None
        if stage == "filter":
            if (rule := broken_rule(text)) is not None:
                count.dropped[rule] += 1
            return text if rule is None else None
        if stage == "language":
            return self._in_language(text, count)
        if stage == "filter_datatrove":
            kept, rule = apply_rules(text, self.config.filter_datatrove)
            if rule is not None:
                count.dropped[rule] += 1
                return None
            count.found["documents that c4 took lines from"] += kept != text
            return kept
        if stage == "decontaminate":
            overlaps = load_evaluation(self.evaluation).overlaps(text)
            for name, times in overlaps.items():
                count.found[f"13-grams of {name}"] += times
            if overlaps:
                # Reasons sum up to the documents, so one that meets two files has one reason.
                count.dropped[f"overlaps {' and '.join(sorted(overlaps))}"] += 1
            return None if overlaps else text
        masked, kinds = mask(text)
        count.found += kinds
        return masked

    def _in_language(self, text: str, count: StageCount) -> str | None:
        code, confidence = language_of(text)
        if code not in self.config.language:
            count.dropped[f"language {code}"] += 1
        elif confidence < self.config.language_min:
            count.dropped[f"language {code}, but less sure than {self.config.language_min}"] += 1
        else:
            count.found[f"documents in {code}"] += 1
            return text
        return None


def _normal(text: str, found: Counter[str]) -> str:
    """NFC without NUL and without marks of byte order at the start; documents changed by kind."""
    steps: dict[str, Callable[[str], str]] = {
        # First: a mark may stand behind it.
        "NUL": lambda text: text.replace("\0", ""),
        "byte order mark": lambda text: text.lstrip(_BOM),
        "not NFC": lambda text: unicodedata.normalize("NFC", text),
    }
    for kind, step in steps.items():
        if (changed := step(text)) != text:
            found[kind] += 1
            text = changed
    return text
