"""Documents that repeat an evaluation: 13 words in a row that also stand in one of its files.

The length is GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix C); words are compared without
case and punctuation. Of JSON lines and .csv every string is a text, a file of any other name is one
text. Texts under 13 words cannot be found, and are counted. Cost: about 1 s per 8 MB of documents;
every process that reads documents reads the evaluation files once. Memory: 16 bytes per word of
them.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.config import DataError, DataUsageError
from data.tables import TableError, table_rows
from data.words import ngram_hashes, word_hashes, words_of

NGRAM_WORDS = 13


@dataclass(frozen=True)
class EvaluationFile:
    """A file whose texts must not be trained on; the hash is of its content."""

    path: Path
    xxh3: str


@dataclass(frozen=True)
class Evaluation:
    """The 13-grams of some files: sorted hashes, and the first file that holds each."""

    hashes: NDArray[np.uint64]
    owners: NDArray[np.uint16]
    report: tuple[dict[str, Any], ...]
    """Of every file: name, texts, those too short to be found, different 13-grams."""

    def overlaps(self, text: str) -> Counter[str]:
        """How many 13-grams of a document stand in which file."""
        hashes = ngram_hashes(word_hashes(words_of(text)), NGRAM_WORDS)
        if len(self.hashes) == 0 or len(hashes) == 0:
            return Counter()
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = self.owners[places[self.hashes[places] == hashes]]
        return Counter(self.report[owner]["name"] for owner in hits.tolist())


def evaluation_files(paths: tuple[Path, ...]) -> tuple[EvaluationFile, ...]:
    """Raises DataUsageError for a file that is missing, named twice or shares its name."""
    names = Counter(path.name for path in paths)
    for path in paths:
        if not path.is_file():
            raise DataUsageError(f"--decontaminate {path}: no such file (looked in {Path.cwd()})")
        if names[path.name] > 1:
            raise DataUsageError(
                f"--decontaminate names {names[path.name]} files {path.name}; overlaps are counted "
                "by name: name each file once, and rename what differs"
            )
    return tuple(
        EvaluationFile(path, xxhash.xxh3_128_hexdigest(path.read_bytes())) for path in paths
    )


@lru_cache(maxsize=1)
def load_evaluation(files: tuple[EvaluationFile, ...]) -> Evaluation:
    """Read all files. Raises DataUsageError for one that cannot be read or holds no 13-gram,
    DataError for one that is no longer what it was named for.
    """
    hashes, owners, report = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint16)], []
    for number, file in enumerate(files):
        texts = [ngram_hashes(word_hashes(words_of(t)), NGRAM_WORDS) for t in _texts(file)]
        found = np.unique(np.concatenate([np.zeros(0, np.uint64), *texts]))
        if len(found) == 0:
            raise DataUsageError(
                f"--decontaminate {file.path}: none of its {len(texts)} texts has {NGRAM_WORDS} "
                "words in a row, so no overlap can be found; leave it out"
            )
        hashes.append(found)
        owners.append(np.full(len(found), number, np.uint16))
        short = sum(len(text) == 0 for text in texts)
        counts = {"texts": len(texts), "too_short": short, "ngrams": len(found)}
        report.append({"name": file.path.name, **counts})
    # The first of equal hashes stays: np.unique gives its place, and files come in order.
    kept, first = np.unique(np.concatenate(hashes), return_index=True)
    return Evaluation(kept, np.concatenate(owners)[first], tuple(report))


def _content(file: EvaluationFile) -> bytes:
    """Processes read at other moments, so each makes sure that it sees the same."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise DataError(
            f"--decontaminate {file.path} cannot be read any more: {error.strerror}; put it back "
            "and run the same command again"
        ) from None
    if xxhash.xxh3_128_hexdigest(content) != file.xxh3:
        raise DataError(
            f"--decontaminate {file.path} changed while documents were held against it; put it "
            "back and run the same command again, or name another output"
        )
    return content


def _texts(file: EvaluationFile) -> Iterator[str]:
    path, content = file.path, _content(file)
    line = 0
    try:
        with io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() in (".jsonl", ".ndjson"):
                for line, row in enumerate(stream, 1):  # noqa: B007 (named in the error)
                    if row.strip():
                        yield from _strings(json.loads(row))
            elif path.suffix.lower() == ".csv":
                for cells in table_rows(stream, strict=False):
                    line += 1
                    yield from cells
            else:
                yield stream.read()
    except (ValueError, RecursionError, TableError) as error:
        where = f"{path}:{line}" if line else str(path)
        raise DataUsageError(
            f"--decontaminate {where} cannot be read: {error}; give UTF-8 text, .jsonl or .csv"
        ) from None


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
