"""Files of many documents that cannot be cut by their bytes: packed JSON lines, lists of JSON
objects, tables, WebDataset tars.

Each is one extent, read as a stream; a document's offset is its number (in tables its line). A file
that ends too early, or goes on after its end, is a DataError: never silently short. Memory: one
record, which may have 1 GiB at most.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import IO, Any, BinaryIO, cast

from data.config import DataError, DataUsageError
from data.documents import MAX_RECORD_BYTES, Document, Dropped, InputFile, Reading
from data.tables import TableError, table_rows

_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**20
_STRUCTURE = re.compile(rb'["{}\[\],]')
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_TEXT_MEMBERS = ("txt", "text", "md")

Reader = Callable[[BinaryIO, InputFile, Reading], Iterator[Document | Dropped]]


def read_json_lines(
    stream: BinaryIO, file: InputFile, reading: Reading
) -> Iterator[Document | Dropped]:
    """One document per line."""
    for index, line in enumerate(_lines(stream, file)):
        yield reading.record(line, file, index, f"{file.path}:{index + 1}")


def read_json(stream: BinaryIO, file: InputFile, reading: Reading) -> Iterator[Document | Dropped]:
    """A list of objects, or objects one after the other, with or without commas or lines."""
    for index, raw in enumerate(_values(stream, file)):
        yield reading.record(raw, file, index, f"{file.path}, record {index + 1}")


def read_table(stream: BinaryIO, file: InputFile, reading: Reading) -> Iterator[Document | Dropped]:
    """A document per row below the header, from the column named like the text field."""
    raw = _lines(stream, file)
    top = next(raw, b"")
    # A header is never replaced or skipped: what is no UTF-8 is another encoding, all the way.
    Reading(on_bad_text="strict").clean(top, file, 0, f"{file.path}:1")
    lines = (line.decode(errors="surrogateescape") for line in chain([top], raw) if line)
    dialect = "excel-tab" if file.format == "tsv" else "excel"
    rows = table_rows(lines, dialect)
    at = 0
    try:
        header = next(rows, [])
        column = _column(header, file, reading)
        id_column = header.index(reading.id_field) if header.count(reading.id_field) == 1 else None
        at = rows.line_num
        for row in rows:
            item = _row(row, header, column, file, reading, at)
            if isinstance(item, Document) and id_column is not None:
                item = replace(item, id=row[id_column])
            yield item
            at = rows.line_num
    except TableError as error:
        raise DataError(
            f"{file.path}:{at + 1}: the row that begins here is broken ({error}); a quote in a "
            "quoted field is written twice, and one that opens a field must close it"
        ) from None


def read_tar(stream: BinaryIO, file: InputFile, reading: Reading) -> Iterator[Document | Dropped]:
    """A WebDataset tar: the text of each sample, from KEY.txt, .text or .md, else KEY.json."""
    watched = _Watched(stream)
    num_samples = 0
    try:
        with tarfile.open(fileobj=cast(IO[bytes], watched), mode="r|") as tar:
            for key, members in _samples(tar, file):
                yield _sample(members, file, reading, num_samples, key)
                num_samples += 1
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{file.path}: the archive is damaged or cut off after {num_samples} samples "
            f"({error}); fetch or pack the file again"
        ) from None
    while watched.read(_BLOCK):
        pass
    if watched.size < end + tarfile.BLOCKSIZE:
        raise DataError(
            f"{file.path}: the archive ends after {num_samples} samples without its end mark, so "
            "it is cut off; fetch or pack the file again"
        )
    if watched.last_content >= end:
        raise DataError(
            f"{file.path}: after {num_samples} samples, at byte {end} of the archive, its header "
            "is damaged or another archive begins; fetch it again, or pack its members into one"
        )


def _lines(stream: BinaryIO, file: InputFile) -> Iterator[bytes]:
    """Lines with their ends, without a mark at the front."""
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            raise DataError(
                f"{file.path}:{number}: a line of more than {MAX_RECORD_BYTES >> 30} GiB; cut its "
                "text into several records"
            )
        yield line.removeprefix(_BOM) if number == 1 else line


def _values(stream: BinaryIO, file: InputFile) -> Iterator[bytes]:
    """The bytes of each value of a list, or of each object that stands by itself."""
    buffer = stream.read(_BLOCK).removeprefix(_BOM).lstrip()
    is_list = buffer.startswith(b"[")
    if is_list:
        buffer = buffer[1:]
    start = at = depth = count = 0
    in_string = False
    while True:
        if in_string:
            at = _STRING_REST.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer[at : at + 1] == b'"':
                in_string, at = False, at + 1
                continue
            found = None
        else:
            found = _STRUCTURE.search(buffer, at)
        if found is None:
            # No more structure in what is here: forget what was handed on, and read more.
            at = at - start if in_string else len(buffer) - start
            # As much as is there again: a record of many blocks is not copied once per block.
            block = stream.read(max(_BLOCK, len(buffer) - start))
            buffer, start = buffer[start:] + block, 0
            if len(buffer) > MAX_RECORD_BYTES:
                raise DataError(
                    f"{file.path}: record {count + 1} has more than {MAX_RECORD_BYTES >> 30} GiB "
                    "or a quote that nothing closes; mend it, or cut its text into several records"
                )
            if block:
                continue
            break
        at = found.end()
        mark = found.group()
        if mark == b'"':
            in_string = True
        elif mark in b"{[":
            depth += 1
        elif depth == 0 and mark == b"]" and is_list:
            last = buffer[start : at - 1].strip()
            if last or count:
                yield last
            _refuse_more(buffer[at:], stream, file, count + 1)
            return
        elif mark in b"}]":
            depth -= 1
            if depth == 0 and not is_list:
                yield buffer[start:at].lstrip(b", \t\r\n")
                start, count = at, count + 1
        elif depth == 0 and is_list:
            yield buffer[start : at - 1].strip()
            start, count = at, count + 1
    if is_list or depth or in_string:
        raise DataError(
            f"{file.path} is cut off in record {count + 1}, or a bracket or quote before is never "
            "closed; fetch or write the file again"
        )
    if rest := buffer.strip():
        yield rest


def _refuse_more(rest: bytes, stream: BinaryIO, file: InputFile, count: int) -> None:
    while not (rest := rest.strip()):
        rest = stream.read(_BLOCK)
        if not rest:
            return
    raise DataError(
        f"{file.path}: more follows the list of {count} records ({rest[:20]!r}); a file holds one "
        "list, or objects one after the other: name it .jsonl if it holds one per line"
    )


def _column(header: list[str], file: InputFile, reading: Reading) -> int:
    field, count = reading.text_field, header.count(reading.text_field)
    if count == 1:
        return header.index(field)
    if not header:
        raise DataUsageError(f"{file.path}:1: no header; its first line must name the columns")
    names = ", ".join(map(ascii, header[:20]))
    if count:
        raise DataUsageError(f"{file.path}:1: {count} columns are called {field!r} ({names})")
    raise DataUsageError(
        f"{file.path}:1: no column {field!r}; its columns are {names}: name the one that holds the "
        "text with --text-field"
    )


def _row(
    row: list[str], header: list[str], column: int, file: InputFile, reading: Reading, at: int
) -> Document | Dropped:
    where = f"{file.path}:{at + 1}"
    if not row:
        return Dropped(file, at, "blank line", is_bad=False, where=where)
    if len(row) != len(header):
        detail = f"{len(row)} fields under {len(header)} columns"
        return Dropped(file, at, "wrong number of fields", detail, where=where)
    return reading.document(row[column].encode(errors="surrogateescape"), file, at, where)


def _samples(
    tar: tarfile.TarFile, file: InputFile
) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, members) of neighbours with one key; members that cannot hold the text are None."""
    current: str | None = None
    members: dict[str, bytes | None] = {}
    for member in tar:
        if member.isdir():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if current is not None and key != current:
            yield current, members
            members = {}
        current = key
        if ending in members:
            raise DataError(
                f"{file.path}: sample {key!r} has two members .{ending}; pack them under two keys"
            )
        members[ending] = None
        if ending in (*_TEXT_MEMBERS, "json"):
            if not member.isreg():
                raise DataUsageError(
                    f"{file.path}: member {member.name!r} is a link or device, no file, so its "
                    "text would be lost; pack the tar again with the files themselves (tar "
                    "--dereference --hard-dereference)"
                )
            if member.size > MAX_RECORD_BYTES:
                raise DataError(f"{file.path}: member {member.name!r} has {member.size} bytes")
            content = tar.extractfile(member)
            assert content is not None
            members[ending] = content.read()
    if current is not None:
        yield current, members


def _sample(
    members: dict[str, bytes | None], file: InputFile, reading: Reading, index: int, key: str
) -> Document | Dropped:
    item = _text_of(members, file, reading, index, f"{file.path}, sample {key!r}")
    if isinstance(item, Document) and not item.id:
        return replace(item, id=f"{file.name}:{key}")
    return item


def _text_of(
    members: dict[str, bytes | None], file: InputFile, reading: Reading, index: int, where: str
) -> Document | Dropped:
    for ending in _TEXT_MEMBERS:
        if (text := members.get(ending)) is not None:
            return reading.document(text.removeprefix(_BOM), file, index, where)
    if (text := members.get("json")) is not None:
        return reading.record(text.removeprefix(_BOM), file, index, where)
    found = ", ".join(f".{ending}" for ending in members)
    return Dropped(file, index, "no text member", f"it has {found}", where=where)


class _Watched:
    """A stream for the tar reader that remembers how long it was and where its content ended."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = 0
        self.last_content = -1

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        content = len(block.rstrip(b"\0"))
        if content:
            self.last_content = self.size + content - 1
        self.size += len(block)
        return block


def is_json_lines(head: bytes) -> bool:
    """Whether the first line of a .json file is an object of its own, and more lines follow."""
    first, newline, rest = head.removeprefix(_BOM).partition(b"\n")
    if not newline or not rest.strip() or not first.startswith(b"{"):
        return False
    try:
        value: Any = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)


READERS: dict[str, Reader] = {
    "lines": read_json_lines,
    "json": read_json,
    "csv": read_table,
    "tsv": read_table,
    "tar": read_tar,
}
"""Format -> its reader, for a stream that is unpacked already."""
