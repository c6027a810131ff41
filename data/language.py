"""The language of a text, by py3langid. The only module that imports it.

Its model (97 languages, 4.6 MB, BSD licence) comes inside the package as arrays, never pickled;
nothing is fetched. A text is judged by three samples of 2,048 characters: where it begins, its
middle and its end, so that a head in another language does not decide. Of English sentences of 30
characters one in ten is less sure than 0.65, of ten such sentences in a row none. Scores are 32-bit
sums, so another machine can differ in the 7th digit, and a document exactly at the limit fall on
the other side there. (lingua's models are 96 MB, take 900 MB of memory, and 15 ms for a sentence.)
Cost: 1 s to load, then 0.1 to 3 ms per document.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from functools import lru_cache
from typing import Any

from data.config import DataUsageError, missing_extra

SAMPLE_CHARACTERS = 2048
_WIDER = {"yue": "zh", "wuu": "zh"}
"""Written alike in most texts, and parts of one language in ISO 639-3."""


def language_of(text: str) -> tuple[str, float]:
    """ISO 639 code and confidence in [0, 1]."""
    scores: Counter[str] = Counter()
    for code, score in _model().rank(_samples(text)):
        scores[_WIDER.get(code, code)] += score
    return scores.most_common(1)[0]


def check_languages(codes: tuple[str, ...]) -> dict[str, str]:
    """The version that decides. DataUsageError for a language that the model does not know."""
    known = sorted(set(_model().labels) - set(_WIDER))
    if unknown := [code for code in codes if code not in known]:
        raise DataUsageError(
            f"--language {','.join(codes)}: {', '.join(unknown)} is no language that can be told; "
            f"those are {', '.join(known)}"
        )
    return {"py3langid": importlib.metadata.version("py3langid")}


def _samples(text: str) -> str:
    size, length = SAMPLE_CHARACTERS, len(text)
    if length <= 3 * size:
        return text
    middle = (length - size) // 2
    return "\n".join((text[:size], text[middle : middle + size], text[-size:]))


@lru_cache(maxsize=1)
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise missing_extra("--language", "language", error) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
