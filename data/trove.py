"""What datatrove gives: text from HTML, and published quality rules. Alone imports datatrove.

Its filters are called one document at a time, with its own thresholds (0.10.1); its readers and
executors are not used. Words and sentences are spaCy's blank English ones, so the rules are for
English. Nothing is fetched: filters that need a download are not offered (bad words, language,
fastText and perplexity models), nor is the one over addresses. Cost: 4 s to start; then about 1 s
per 250 KB of text for all four rules. Memory: about 100 times the longest document.
"""

from __future__ import annotations

import importlib.metadata
import logging
from functools import lru_cache
from typing import Any

from data.config import DatatroveRule, missing_extra

MAX_CHARACTERS = 2**22
"""A longer document is dropped: spaCy holds all its words at once."""
TOO_LONG = f"over {MAX_CHARACTERS >> 20} Mi characters"
NEEDED = ("datatrove", "spacy")


def check_rules() -> dict[str, str]:
    """The versions that decide. DataUsageError where the extra is not installed."""
    try:
        _filters()
        return {name: importlib.metadata.version(name) for name in NEEDED}
    except ImportError as error:
        raise missing_extra("--filter-datatrove", "datatrove", error) from None


def apply_rules(text: str, rules: tuple[DatatroveRule, ...]) -> tuple[str, str | None]:
    """The text as the rules leave it, and the first one that drops it, in datatrove's words.

    Only c4 changes text: it takes lines out. Each rule sees what the one before has left.
    """
    from datatrove.data import Document

    if len(text) > MAX_CHARACTERS:
        return text, TOO_LONG
    document = Document(text=text, id="")
    for rule in rules:
        found = _filters()[rule].filter(document)
        is_kept, reason = found if isinstance(found, tuple) else (found, "dropped")
        if not is_kept:
            return text, f"{rule}: {reason}"
    return document.text, None


def text_of(html: str) -> str:
    """The main text of a page; empty where there is none."""
    try:
        return _extractor().extract(html) or ""
    except ImportError as error:
        raise missing_extra("reading WARC files", "datatrove", error) from None


@lru_cache(maxsize=1)
def _filters() -> dict[DatatroveRule, Any]:
    import spacy  # noqa: F401 (datatrove asks for it only at the first document)
    from datatrove.pipeline import filters

    return {
        "gopher-repetition": filters.GopherRepetitionFilter(),
        "gopher-quality": filters.GopherQualityFilter(),
        "c4": filters.C4QualityFilter(),
        "fineweb-quality": filters.FineWebQualityFilter(),
    }


@lru_cache(maxsize=1)
def _extractor() -> Any:
    from datatrove.pipeline.extractors import Trafilatura

    # It reports every page that it cannot parse; those are counted here.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    # Its deduplication remembers earlier pages of the process, so text would depend on who reads.
    return Trafilatura(deduplicate=False)
