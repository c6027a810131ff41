"""From what a person names to documents: files, folders, patterns; plain text and JSON lines.

A text file is one document, a JSON line is one document. Files are cut into parts of about
`part_bytes` by their bytes alone, so the parts can be read by any number of processes: a part holds
whole documents, and reading all parts in order reads every byte once. UTF-8 is strict. Memory: one
document (a JSON line is parsed whole). Reading and parsing costs about 1 s per 300 MB.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.config import DataError, DataUsageError

LINE_SUFFIXES = (".jsonl", ".ndjson")
UNREADABLE_SUFFIXES = frozenset(
    {".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".parquet", ".arrow"}
    | {".pdf", ".docx", ".npy", ".npz", ".bin", ".safetensors", ".png", ".jpg", ".jpeg"}
)
MISSING_FIELD = "missing field"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """One file to read; `name` is how the person who named it knows it."""

    path: Path
    name: str
    num_bytes: int

    @property
    def is_lines(self) -> bool:
        return self.path.suffix.lower() in LINE_SUFFIXES


@dataclass(frozen=True)
class Extent:
    """The documents of `file` that start in the bytes [start, stop)."""

    file: InputFile
    start: int
    stop: int


Part = tuple[Extent, ...]


@dataclass(frozen=True)
class Document:
    """One text as valid UTF-8. `offset` is the byte of its file where it (or its line) starts."""

    offset: int
    text: bytes


@dataclass(frozen=True)
class Dropped:
    """A line or document that yields no text, and why; `is_bad` counts against the budget."""

    file: InputFile
    offset: int
    reason: str
    detail: str = ""
    is_bad: bool = True


def find_files(inputs: Sequence[str]) -> list[InputFile]:
    """Every file that the inputs name, in a fixed order: inputs as given, folders by sorted path.

    Hidden files and folders inside a folder are left out. Raises DataUsageError for an input that
    is empty or does not exist, a pattern without a match, an empty folder, a file that is named
    twice, and kinds of file that cannot be read as text.
    """
    if not inputs:
        raise DataUsageError("no input given; name files, folders or patterns: --input PATH...")
    files: list[InputFile] = []
    seen: dict[Path, Path] = {}
    for named in inputs:
        if not named.strip():
            raise DataUsageError(
                f"--input {named!r} names nothing, as when a variable is not set; write . for "
                "the current folder"
            )
        for path, name in _expand(named):
            real = path.resolve()
            if real in seen:
                raise DataUsageError(
                    f"--input {named} names {path}, which is the same file as {seen[real]}; "
                    "its text would count twice: name it once"
                )
            seen[real] = path
            _check_kind(path)
            files.append(InputFile(path, name, path.stat().st_size))
    return files


def _expand(named: str) -> list[tuple[Path, str]]:
    """The files of one input, each with its display name."""
    path = Path(named)
    if path.is_dir():
        return _walk(path)
    if path.exists():
        return [(path, path.name)]
    if not glob.has_magic(named):
        raise DataUsageError(f"--input {named}: no such file or folder (looked in {Path.cwd()})")
    matches = [Path(match) for match in sorted(glob.glob(named, recursive=True))]
    found = [(match, match.name) for match in matches if match.is_file()]
    if not found:
        found = [pair for match in matches if match.is_dir() for pair in _walk(match)]
    if not found:
        raise DataUsageError(f"--input {named}: no file matches this pattern")
    return found


def _walk(folder: Path) -> list[tuple[Path, str]]:
    """Regular files below `folder`, sorted by relative path; linked folders are followed once."""
    found: list[tuple[str, Path]] = []
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                found.append((path.relative_to(folder).as_posix(), path))
    if not found:
        raise DataUsageError(f"--input {folder}: the folder holds no files")
    top = folder.resolve().name
    return [(path, f"{top}/{relative}") for relative, path in sorted(found)]


def _refuse_folder(error: OSError) -> None:
    raise DataUsageError(f"{error.filename} cannot be listed: {error.strerror}")


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise DataUsageError(f"{path} is not a regular file; write its text to a file first")
    if path.suffix.lower() in UNREADABLE_SUFFIXES:
        raise DataUsageError(
            f"{path}: files ending in {path.suffix} cannot be read; "
            "unpack or convert it to plain text or .jsonl first"
        )
    if not os.access(path, os.R_OK):
        raise DataUsageError(f"{path} cannot be read: permission denied")


def cut_parts(files: Sequence[InputFile], part_bytes: int) -> list[Part]:
    """Cut the input into parts of about `part_bytes`; JSON lines at any byte, texts only whole."""
    parts: list[Part] = []
    open_part: list[Extent] = []
    open_bytes = 0
    for file in files:
        step = part_bytes if file.is_lines else max(1, file.num_bytes)
        for start in range(0, max(1, file.num_bytes), step):
            extent = Extent(file, start, min(file.num_bytes, start + step))
            if open_part and open_bytes + extent.stop - start > part_bytes:
                parts.append(tuple(open_part))
                open_part, open_bytes = [], 0
            open_part.append(extent)
            open_bytes += extent.stop - start
    if open_part:
        parts.append(tuple(open_part))
    return parts


def read_extent(extent: Extent, text_field: str) -> Iterator[Document | Dropped]:
    """Every document of the extent in order, and what yields none. Raises DataError: not UTF-8."""
    if extent.file.num_bytes == 0:
        return iter([Dropped(extent.file, 0, "empty file", is_bad=False)])
    if extent.file.is_lines:
        return _read_lines(extent, text_field)
    return _read_text(extent)


def _read_text(extent: Extent) -> Iterator[Document | Dropped]:
    with open(extent.file.path, "rb") as stream:
        stream.seek(extent.start)
        text = stream.read(extent.stop - extent.start)
    _decode(text, extent.file, extent.start)
    offset = extent.start
    if offset == 0 and text.startswith(_BOM):
        text, offset = text[len(_BOM) :], len(_BOM)
    if text:
        yield Document(offset, text)
    else:
        yield Dropped(extent.file, offset, "empty document", is_bad=False)


def _read_lines(extent: Extent, text_field: str) -> Iterator[Document | Dropped]:
    with open(extent.file.path, "rb") as stream:
        offset = extent.start
        if offset > 0:
            # The line that covers byte start-1 belongs to the extent before, if it ends there.
            stream.seek(offset - 1)
            skipped = stream.readline(extent.stop - offset + 1)
            if not skipped.endswith(b"\n"):
                return
            offset += len(skipped) - 1
        while offset < extent.stop:
            line = stream.readline()
            if not line:
                return
            yield _parse_line(line, extent.file, offset, text_field)
            offset += len(line)


def _parse_line(line: bytes, file: InputFile, offset: int, field: str) -> Document | Dropped:
    decoded = _decode(line, file, offset)
    if offset == 0:
        decoded = decoded.removeprefix("\ufeff")
    if not decoded.strip():
        return Dropped(file, offset, "blank line", is_bad=False)
    try:
        value = json.loads(decoded.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return Dropped(file, offset, "broken JSON", f"{error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Dropped(file, offset, "broken JSON", str(error))
    if not isinstance(value, dict):
        return Dropped(file, offset, "not a JSON object", f"got {type(value).__name__}")
    if field not in value:
        keys = ", ".join(map(repr, list(value)[:20])) or "none"
        return Dropped(file, offset, MISSING_FIELD, f"its keys are {keys}")
    text = value[field]
    if not isinstance(text, str):
        return Dropped(file, offset, "field is not text", f"got {type(text).__name__}")
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        return Dropped(file, offset, "lone surrogate", f"{half} is half of a pair, no character")
    if not encoded:
        return Dropped(file, offset, "empty document", is_bad=False)
    return Document(offset, encoded)


def line_number(file: InputFile, offset: int) -> int:
    """The line (from 1) that starts at or covers byte `offset`. Reads the file up to there."""
    lines = 1
    with open(file.path, "rb") as stream:
        while offset > 0 and (block := stream.read(min(offset, 2**20))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def _decode(text: bytes, file: InputFile, offset: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        where = f"{file.path}:{line_number(file, at)}" if file.is_lines else f"{file.path}"
        guess = "UTF-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        raise DataError(
            f"{where}: not UTF-8 at byte offset {at} (byte 0x{text[error.start]:02x}, "
            f"{error.reason}); convert the file first, for example: "
            f"iconv -f {guess} -t UTF-8 {file.path.name} > utf8-{file.path.name}"
        ) from None
