"""Files become documents, read in parts by any number of processes.

A text file is one document, a JSON line is one document, other formats give one per record. Plain
text and JSON lines are cut into parts of about `part_bytes` by their bytes alone; everything else
is read from its start by one process. A part holds whole documents, and reading all parts in order
reads every byte once. Memory: one document. Reading and parsing costs about 1 s per 300 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

from data.compressed import kind_by_content, open_input
from data.config import DataError, PrepareConfig
from data.documents import (
    BAD_TEXT,
    BINARY,
    LINE_SUFFIXES,
    MAX_RECORD_BYTES,
    MISSING_FIELD,
    Document,
    Dropped,
    Extent,
    InputFile,
    Part,
    Reading,
    is_binary,
    line_number,
)
from data.formats import READERS, is_json_lines
from data.inputs import find_files
from data.parquet import read_parquet
from data.warc import read_warc

__all__ = [
    "BAD_TEXT",
    "LINE_SUFFIXES",
    "MISSING_FIELD",
    "Document",
    "Dropped",
    "Extent",
    "InputFile",
    "Part",
    "Reading",
    "cut_parts",
    "find_files",
    "line_number",
    "read_extent",
    "reading_of",
]

_BOM = b"\xef\xbb\xbf"


def reading_of(config: PrepareConfig) -> Reading:
    """How a preparation reads."""
    return Reading(config.text_field, config.on_bad_text, config.id_field)


def cut_parts(files: Sequence[InputFile], part_bytes: int) -> list[Part]:
    """Cut the input into parts of about `part_bytes`; JSON lines at any byte, others only whole."""
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


def read_extent(extent: Extent, reading: Reading | str = "text") -> Iterator[Document | Dropped]:
    """Every document of the extent in order, and what yields none.

    `reading` is the text field, or that with the policy for bad text. Raises DataError for text
    that is not UTF-8 under the strict policy, and for files that are damaged or cut off.
    """
    if isinstance(reading, str):
        reading = Reading(reading)
    file = extent.file
    if file.format == "parquet":
        return _within(extent, read_parquet(file, reading))
    if file.format == "warc":
        return read_warc(extent, reading)
    if file.compression is None:
        if file.num_bytes == 0:
            return iter([Dropped(file, 0, "empty file", is_bad=False)])
        if file.is_lines:
            return _read_lines(extent, reading)
        if file.has_byte_places:
            return _read_text(extent, reading)
    return _within(extent, _read_stream(file, reading))


def _within(extent: Extent, items: Iterator[Document | Dropped]) -> Iterator[Document | Dropped]:
    """The items numbered [first, last); what follows is not read."""
    item = None
    for item in items:
        if extent.last is not None and item.offset >= extent.last:
            return
        if item.offset >= extent.first:
            yield item
    if item is None:
        yield Dropped(extent.file, 0, "file without records", is_bad=False)


def _read_text(extent: Extent, reading: Reading) -> Iterator[Document | Dropped]:
    with open(extent.file.path, "rb") as stream:
        stream.seek(extent.start)
        text = stream.read(extent.stop - extent.start)
    offset = extent.start
    if offset == 0 and text.startswith(_BOM):
        text, offset = text[len(_BOM) :], len(_BOM)
    yield reading.document(text, extent.file, offset)


def _read_lines(extent: Extent, reading: Reading) -> Iterator[Document | Dropped]:
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
            line = stream.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_RECORD_BYTES:
                raise DataError(
                    f"{extent.file.path}:{line_number(extent.file, offset)}: a line of more than "
                    f"{MAX_RECORD_BYTES >> 30} GiB; cut its text into several lines"
                )
            text = line.removeprefix(_BOM) if offset == 0 else line
            yield reading.record(text, extent.file, offset)
            offset += len(line)


def _read_stream(file: InputFile, reading: Reading) -> Iterator[Document | Dropped]:
    with open_input(file) as stream:
        # Nobody sees inside a packed file by its name: what is in it may be packed again.
        kind = kind_by_content(stream.peek()[:512])  # type: ignore[attr-defined]
        if kind is not None and file.compression is not None and file.format != "tar":
            raise DataError(
                f"{file.path} unpacks to {kind}, not to text; unpack it once, and name what is "
                "inside by its own suffix"
            )
        if file.format == "text":
            yield _packed_text(stream, file, reading)
            return
        kind = file.format
        if kind == "json" and is_json_lines(stream.peek()):  # type: ignore[attr-defined]
            kind = "lines"
        yield from READERS[kind](stream, file, reading)


def _packed_text(stream: BinaryIO, file: InputFile, reading: Reading) -> Document | Dropped:
    text = stream.read(MAX_RECORD_BYTES + 1)
    if not file.is_named and is_binary(file, text):
        return Dropped(file, 0, BINARY, is_bad=False, where=f"{file.path} (unpacked)")
    if len(text) > MAX_RECORD_BYTES:
        raise DataError(
            f"{file.path} unpacks to one text of more than {MAX_RECORD_BYTES >> 30} GiB; cut it "
            "into several files, or into the lines of a .jsonl file"
        )
    return reading.document(text.removeprefix(_BOM), file, 0, f"{file.path} (unpacked)")
