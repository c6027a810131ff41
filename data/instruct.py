"""Fine-tuning examples from files: one per line of a .jsonl, or per row of a .csv with a header.

Nothing is dropped silently: a line that is broken, lacks a column or has an empty one stops the
reading and is named as FILE:LINE. What is held out depends on the text alone, so equal texts stay
on one side and the same file always gives the same split. All examples are kept in memory.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataError, DataUsageError
from data.order import key, permute
from data.readers import LINE_SUFFIXES
from data.split import HASH_RANGE, piece_hash
from data.tables import TableError, table_rows

HELD_OUT = 0.1
"""Share of the examples that is held out when no validation file is named."""


@dataclass(frozen=True)
class Example:
    """One example: what the model reads, and what it should say about it."""

    text: str
    """The text to classify, or the prompt."""
    target: str = ""
    """The label, or the response."""


def read_examples(path: str | Path, columns: Mapping[str, str]) -> list[Example]:
    """Every example of a file. `columns` maps the option that names a column to the column.

    The first column is the text, the second (where there is one) the target:
    {"data.text_column": "text", "data.label_column": "label"}. Texts are strings; a target may
    also be a whole number or a truth value, and becomes its JSON text. Raises DataUsageError for
    a file that cannot hold examples, DataError naming the line for one that is not an example.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise DataUsageError(f"{path} {what}; name a .jsonl or .csv file with examples")
    if path.suffix.lower() in LINE_SUFFIXES:
        rows = _json_rows(path)
    elif path.suffix.lower() == ".csv":
        rows = _csv_rows(path, columns)
    else:
        raise DataUsageError(
            f"{path}: examples are read from .jsonl and .csv files, not from {path.suffix!r}; "
            "write one JSON object per line, or a .csv with a header"
        )
    examples = [_example(f"{path}:{line}", row, columns) for line, row in rows]
    if not examples:
        raise DataError(f"{path} holds no examples; write at least two")
    return examples


def hold_out(examples: Sequence[Example], path: str | Path) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of a file, each in its order; neither is empty.

    A text is held out when its hash falls in the lowest 10 %. A side that would stay empty gets
    the text with the smallest (held out) or largest (training) hash.
    """
    hashes = {example.text: piece_hash(example.text.encode(), 0) for example in examples}
    if len(hashes) < 2:
        raise DataError(
            f"{path} holds a single text, so none can be held out for validation; "
            "add examples, or name a validation file with data.val=FILE"
        )
    held = {text for text, value in hashes.items() if value < HELD_OUT * HASH_RANGE}
    held = held or {min(hashes, key=hashes.__getitem__)}
    if len(held) == len(hashes):
        held.remove(max(hashes, key=hashes.__getitem__))
    train = [example for example in examples if example.text not in held]
    return train, [example for example in examples if example.text in held]


def sorted_labels(*parts: Sequence[Example]) -> list[str]:
    """The different targets, sorted; by value when all are whole numbers, so that 10 follows 9."""
    labels = {example.target for part in parts for example in part}
    numbers = all(re.fullmatch(r"-?(0|[1-9]\d*)", label) for label in labels)
    return sorted(labels, key=int if numbers else None)


def order(samples: range, *, num_examples: int, seed: int, purpose: str = "train") -> list[int]:
    """Which examples are the samples of a run: sample i is a permuted place of epoch i // n."""
    epochs, places = np.divmod(np.arange(samples.start, samples.stop), num_examples)
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        epoch_key = key(seed, purpose, "examples", epoch)
        chosen[inside] = permute(places[inside], num_examples, epoch_key)
    found: list[int] = chosen.tolist()
    return found


def _example(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    values: list[str] = []
    for option, column in columns.items():
        if column not in row:
            raise DataError(_missing(where, column, list(row), option))
        value = row[column]
        if isinstance(value, int) and values:
            value = json.dumps(value)
        if not isinstance(value, str):
            kind = "nothing" if value is None else type(value).__name__
            raise DataError(f"{where}: column {column!r} holds {kind}, not text; write a string")
        if not value.strip():
            raise DataError(f"{where}: column {column!r} is empty; fill it in or remove the line")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: column {column!r} holds {ascii(value[error.start])[1:-1]}, half of a "
                "surrogate pair, which is no character; remove it"
            ) from None
        values.append(value)
    return Example(*values)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: U+2028 and friends may stand inside a JSON string.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: broken JSON: {error}; fix or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number}: a {type(row).__name__}, not a JSON object; "
                'write one {"column": value, ...} per line'
            )
        yield number, row


def _csv_rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = table_rows(io.StringIO(_read(path), newline=""))
    first, line = True, 0
    header: list[str] = []
    try:
        for row in reader:
            start, line = line + 1, reader.line_num
            if not row:
                continue
            if first:
                header, first = row, False
                _check_header(f"{path}:{start}", header, columns)
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(row)} fields, but the header has {len(header)}; "
                    'put a field that holds commas or newlines into "quotes"'
                )
            yield start, dict(zip(header, row, strict=True))
    except TableError as error:
        raise DataError(
            f"{path}:{line + 1}: broken CSV in the record that starts here: {error}; "
            'a quote inside a "quoted" field is written twice'
        ) from None


def _check_header(where: str, header: list[str], columns: Mapping[str, str]) -> None:
    for option, column in columns.items():
        if column not in header:
            raise DataError(_missing(where, column, header, option))
        if header.count(column) > 1:
            raise DataError(f"{where}: column {column!r} occurs more than once; rename one")


def _missing(where: str, column: str, found: list[str], option: str) -> str:
    seen = ", ".join(repr(name) for name in found[:20]) or "none"
    return f"{where}: no column {column!r}; the columns are {seen}; choose one with {option}=NAME"


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark.
        at = error.start + (len(raw) - len(error.object))
        line = raw.count(b"\n", 0, at) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 at byte offset {at} "
            f"(byte 0x{raw[at]:02x}); convert the file first, for example: "
            f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from None
