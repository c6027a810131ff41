"""What readers hand on: documents as valid UTF-8, what yields none, and the policy for bad text.

Bad text is bytes that are no UTF-8, halves of a surrogate pair, and, unless the policy is strict,
NUL. "strict" stops at the first byte that is no UTF-8 (halves are bad lines, NUL is kept),
"replace" puts U+FFFD in its place and counts the document, "skip" drops the document or line and
counts it. UTF-16 and UTF-32 are no text with a few bad bytes: they are never replaced. Cost: one
decoding.
"""

from __future__ import annotations

import glob
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.config import BadText, DataError
from data.stamps import Kept, Stamp

LINE_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = {
    ".gz": "gzip",
    ".bgz": "gzip",
    ".tgz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
"""Last suffix -> how the file is packed."""
FORMATS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tgz": "tar",
    ".warc": "warc",
    ".wet": "warc",
}
RECORD_FORMATS = {".json": "json", ".csv": "csv", ".tsv": "tsv"}
"""Read as records where somebody wrote the suffix, or packed; below a folder they are text, as the
files of a code tree are."""
MAX_RECORD_BYTES = 2**30
"""A line, a record or a packed text over 1 GiB is refused, so memory stays bounded."""
BINARY_BYTES = 8000
"""A NUL among the first of these makes a file binary, for git and for us."""
BINARY = "binary file"
MISSING_FIELD = "missing field"
NOT_UTF8 = "not UTF-8"
NUL = "NUL bytes"
HALF_PAIR = "lone surrogate"
BAD_TEXT = (NOT_UTF8, NUL, HALF_PAIR)
"""Reasons for which the policy "skip" drops."""
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF32_MARKS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class InputFile:
    """One file to read; `name` is how the person who named it knows it."""

    path: Path
    name: str
    num_bytes: int
    is_named: bool = False
    """The suffix was written by a person, not met below a folder."""
    stamp: Stamp | Kept | None = field(default=None, compare=False, repr=False)
    """What it has to be whenever it is read; None is not held against anything."""

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(self.path.suffix.lower())

    @property
    def format(self) -> str:
        """text, lines, json, csv, tsv, parquet, tar or warc."""
        suffix = self.path.suffix.lower()
        if self.compression and suffix not in FORMATS:
            suffix = self.path.with_suffix("").suffix.lower()
        if suffix in RECORD_FORMATS and (self.is_named or self.compression):
            return RECORD_FORMATS[suffix]
        return FORMATS.get(suffix, "text")

    @property
    def is_lines(self) -> bool:
        """Plain JSON lines: they can be cut at any byte."""
        return self.format == "lines" and self.compression is None

    @property
    def has_byte_places(self) -> bool:
        """Whether documents lie in the file as they are stored, so that bytes are their place."""
        return self.format == "text" and self.compression is None


@dataclass(frozen=True)
class Extent:
    """The documents of `file` that start in the bytes [start, stop).

    A file that cannot be cut by its bytes gives the documents numbered [first, last) instead.
    """

    file: InputFile
    start: int
    stop: int
    first: int = 0
    last: int | None = None


Part = tuple[Extent, ...]


@dataclass(frozen=True)
class Document:
    """One text as valid UTF-8."""

    offset: int
    """Where it starts: a byte of a plain file, else its number in the file."""
    text: bytes
    replaced: int = 0
    """Characters that the policy for bad text has put in."""
    id: str = ""
    """What its input calls it, such as the address of a page; empty where nothing does."""


@dataclass(frozen=True)
class Dropped:
    """A line or document that yields no text, and why; `is_bad` counts against the budget."""

    file: InputFile
    offset: int
    reason: str
    detail: str = ""
    is_bad: bool = True
    where: str | None = None
    """The place in words, for files whose offsets are no bytes."""

    @property
    def place(self) -> str:
        """As people look it up: path:line, or the path and which record."""
        return self.where or f"{self.file.path}:{line_number(self.file, self.offset)}"


@dataclass(frozen=True)
class Reading:
    """What a person chose about text."""

    text_field: str = "text"
    on_bad_text: BadText = "strict"
    id_field: str = ""
    """Key of a record that holds its id; empty keeps no ids."""

    def id_of(self, record: Any) -> str:
        """What a record calls itself; empty where it does not, or nobody asks."""
        return as_id(_nested(record, self.id_field)[0]) if self.id_field else ""

    def lacks_id(self, file: InputFile, document: Document) -> bool:
        """Whether a record has not the id that was asked for; a text file is called by its name."""
        return bool(self.id_field) and file.format != "text" and not document.id

    def document(
        self, raw: bytes, file: InputFile, offset: int, where: str | None = None
    ) -> Document | Dropped:
        """Bytes as a document. Raises DataError where the policy stops; `raw` begins at `offset`
        if the file has byte places."""
        text = self.clean(raw, file, offset, where)
        if isinstance(text, Dropped):
            return text
        cleaned, replaced = text
        if not cleaned:
            return Dropped(file, offset, "empty document", is_bad=False, where=where)
        return Document(offset, cleaned, replaced)

    def clean(
        self, raw: bytes, file: InputFile, offset: int, where: str | None = None
    ) -> tuple[bytes, int] | Dropped:
        """(valid UTF-8, characters replaced), or why there is none."""
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            if self.on_bad_text == "skip":
                return Dropped(file, offset, NOT_UTF8, is_bad=False, where=where)
            if self.on_bad_text == "strict" or _utf16(raw):
                raise _not_utf8(error, raw, file, offset, where) from None
            text = raw.decode(errors="replace")
            replaced = text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())
        else:
            if b"\0" not in raw:
                return raw, 0
            if self.on_bad_text != "skip" and (guess := _utf16(raw)):
                raise _not_utf8(None, raw, file, offset, where, guess)
            if self.on_bad_text == "strict":
                return raw, 0
            replaced = 0
        if "\0" in text and self.on_bad_text == "skip":
            return Dropped(file, offset, NUL, is_bad=False, where=where)
        return text.replace("\0", _REPLACEMENT).encode(), replaced + text.count("\0")

    def record(
        self, raw: bytes, file: InputFile, offset: int, where: str | None = None
    ) -> Document | Dropped:
        """The text field of one JSON object."""
        is_clean = raw.isascii() and b"\0" not in raw
        found = (raw, 0) if is_clean else self.clean(raw, file, offset, where)
        if isinstance(found, Dropped):
            return found
        line, replaced = found
        if not line.strip():
            return Dropped(file, offset, "blank line", is_bad=False, where=where)
        try:
            value = json.loads(line.decode().rstrip("\r\n"))
        except json.JSONDecodeError as error:
            detail = f"{error.msg} (column {error.colno})"
            return Dropped(file, offset, "broken JSON", detail, where=where)
        except (ValueError, RecursionError) as error:
            return Dropped(file, offset, "broken JSON", str(error), where=where)
        return self.field(value, file, offset, where, replaced)

    def field(
        self, value: Any, file: InputFile, offset: int, where: str | None, replaced: int = 0
    ) -> Document | Dropped:
        """The text field of a value that was parsed."""
        if not isinstance(value, dict):
            detail = f"got {type(value).__name__}"
            return Dropped(file, offset, "not a JSON object", detail, where=where)
        text, missing = _nested(value, self.text_field)
        if missing is not None:
            return Dropped(file, offset, MISSING_FIELD, missing, where=where)
        if not isinstance(text, str):
            detail = f"got {type(text).__name__}"
            return Dropped(file, offset, "field is not text", detail, where=where)
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])[1:-1]
            detail = f"{half} is half of a pair, no character"
            if self.on_bad_text != "replace":
                is_bad = self.on_bad_text == "strict"
                return Dropped(file, offset, HALF_PAIR, detail, is_bad, where)
            text, halves = _SURROGATE.subn(_REPLACEMENT, text)
            encoded, replaced = text.encode(), replaced + halves
        if b"\0" in encoded and self.on_bad_text != "strict":
            if self.on_bad_text == "skip":
                return Dropped(file, offset, NUL, is_bad=False, where=where)
            replaced += encoded.count(0)
            encoded = encoded.replace(b"\0", _REPLACEMENT.encode())
        if not encoded:
            return Dropped(file, offset, "empty document", is_bad=False, where=where)
        return Document(offset, encoded, replaced, self.id_of(value))


def is_binary(file: InputFile, head: bytes) -> bool:
    """Whether what a text file that nobody named begins with is no text. UTF-16 is text, if not
    such as can be read.
    """
    is_marked = head.startswith((*_UTF16_MARKS, *_UTF32_MARKS))
    return file.format == "text" and b"\0" in head[:BINARY_BYTES] and not is_marked


def as_id(value: Any) -> str:
    """A string or whole number as an id; anything else is none."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def place_name(file: InputFile, document: Document) -> str:
    """An id for a document that has none: its file, and where in it if the file holds several."""
    return file.name if file.format == "text" else f"{file.name}:{document.offset}"


def line_number(file: InputFile, offset: int) -> int:
    """The line (from 1) that starts at or covers byte `offset`. Reads the file up to there."""
    lines = 1
    with open(file.path, "rb") as stream:
        while offset > 0 and (block := stream.read(min(offset, 2**20))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def _nested(value: dict[str, Any], field: str) -> tuple[Any, str | None]:
    """The value of `field`, or what is there instead. A key that holds dots itself comes first."""
    if field in value:
        return value[field], None
    at: Any = value
    walked = ""
    for key in field.split("."):
        if not isinstance(at, dict):
            return None, f"{walked!r} holds {type(at).__name__}, not an object"
        if key not in at:
            keys = ", ".join(map(repr, list(at)[:20])) or "none"
            return None, f"in {walked!r} the keys are {keys}" if walked else f"its keys are {keys}"
        at = at[key]
        walked = f"{walked}.{key}" if walked else key
    return at, None


def _utf16(raw: bytes) -> str | None:
    """The encoding of text that looks like UTF-16 or UTF-32: by its mark, or ASCII among NULs."""
    head = raw[:1024]
    if raw[:4] in _UTF32_MARKS:
        return "UTF-32"
    if raw[:2] in _UTF16_MARKS:
        return "UTF-16"
    zeros = [head[i::4].count(0) > 0.24 * len(head) for i in range(4)]
    if len(head) >= 8 and sum(zeros) == 3 and zeros[1] and zeros[2]:
        return "UTF-32LE" if zeros[3] else "UTF-32BE"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(head) >= 8 and max(even, odd) > 0.4 * len(head) and min(even, odd) < 0.1 * len(head):
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return None


def _not_utf8(
    error: UnicodeDecodeError | None,
    raw: bytes,
    file: InputFile,
    offset: int,
    where: str | None,
    guess: str | None = None,
) -> DataError:
    guess = guess or _utf16(raw) or "LATIN1"
    start = error.start if error else raw.index(0)
    reason = error.reason if error else "half or more of its bytes are NUL"
    at = start if where else offset + start
    if where is None:
        where = f"{file.path}:{line_number(file, at)}" if file.is_lines else f"{file.path}"
    name = file.path.name
    leave = shlex.quote(glob.escape(name if file.is_named else str(file.path)))
    return DataError(
        f"{where}: not UTF-8 at byte offset {at} (byte 0x{raw[start]:02x}, {reason}); convert the "
        f"file first, for example: iconv -f {guess} -t UTF-8 {name} > utf8-{name}, leave it out "
        f"with --exclude {leave}, or accept it with --on-bad-text replace or skip"
    )
