"""WARC files as documents: the pages and texts of a crawl. The only module that imports warcio.

warcio reads what a record holds; where records begin and end is read here, because its own reader
(and datatrove's, built on it) takes a file that is cut or damaged for one that ends. A file that
ends inside a record, a record that is not where the one before ends, and a block that is not what
its WARC-Block-Digest says are a DataError naming file and record. (A plain file cut exactly between
two records cannot be seen by anyone.) Text comes from responses, resources and conversions (.wet)
of HTML or plain text; everything else is counted by reason. A document's offset is the number of
its record. Cost: about 1 s per 75 pages of 20 KB (1.5 MB of text), in each pass over the input, of
which a preparation makes 2 to 5. Memory: a page of 16 MiB at most, and about 25 times its HTML.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, BinaryIO

from data.compressed import open_input
from data.config import DataError, missing_extra
from data.documents import NOT_UTF8, Document, Dropped, Extent, InputFile, Reading
from data.trove import text_of

PAGE_BYTES = 2**24
"""A longer response is no page: it is passed over and counted."""
MAX_TAGS = 2**16
"""Of a page whose text is extracted: 20,000 lists in 700 KB take over 30 s. A limit of time, as
datatrove has, would make the text depend on the machine."""
_MAX_MEMBERS = 100
"""Of a gzip body; each costs a copy of those that follow it."""
_TEXT_RECORDS = ("response", "resource", "conversion")
_OTHER_RECORDS = ("warcinfo", "request", "metadata", "revisit", "continuation")
_HTML = ("text/html", "application/xhtml+xml")
_LINE_BYTES = 2**16
_HEADER_BYTES = 2**20
_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"^Content-Length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r?$", re.I | re.M)
_TYPE = re.compile(rb"^WARC-Type[ \t]*:[ \t]*([\w-]+)[ \t]*\r?$", re.I | re.M)
_NO_CHARSETS = ("unicode_escape", "raw_unicode_escape", "utf-7", "idna", "punycode", "undefined")
"""Python's codecs that pages do not use, and that give what is no text."""
_META_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.I)


@dataclass(frozen=True)
class _Record:
    """A record in its file: the lines of its header, and how long the block after them is."""

    number: int
    where: str
    header: bytes
    length: int
    type: str


def read_warc(extent: Extent, reading: Reading) -> Iterator[Document | Dropped]:
    """What the records numbered [first, last) of a file give; all before are walked over."""
    with open_input(extent.file) as stream:
        for record in _records(stream, extent.file):
            if extent.last is not None and record.number >= extent.last:
                return
            if record.number < extent.first:
                _pass_over(stream, record)
            else:
                yield _item(stream, record, extent.file, reading)
            _end(stream, record)


def page_sizes(file: InputFile) -> Iterator[tuple[int, int]]:
    """Number of every record that can hold text, and about how many bytes of text: making text of
    any would cost more than all else. Of HTML it is a fourth at most, but for pages of plain prose.
    """
    with open_input(file) as stream:
        for record in _records(stream, file):
            if record.type in _TEXT_RECORDS:
                yield record.number, record.length // (1 if record.type == "conversion" else 4)
            _pass_over(stream, record)
            _end(stream, record)


def _records(stream: BinaryIO, file: InputFile) -> Iterator[_Record]:
    """Each record with the stream at its block, of which the caller leaves nothing."""
    number = 0
    while line := stream.readline(_LINE_BYTES):
        if not line.strip():
            continue
        where = f"{file.path}, record {number + 1}"
        if not line.startswith((b"WARC/1.", b"WARC/0.")):
            after = "it is no WARC" if number == 0 else "the record before is damaged"
            raise DataError(
                f"{where} begins with {line[:20]!r}, not with a WARC version: {after}, or of "
                "another length than it says; fetch or write the file again"
            )
        header = line
        while line.strip():
            line = stream.readline(_LINE_BYTES)
            header += line
            if not line.endswith(b"\n") or len(header) > _HEADER_BYTES:
                raise _cut(where, "its header has no end")
        yield _record(header, number, where)
        number += 1
    if number == 0:
        raise DataError(f"{file.path} holds no record; fetch or write it again")


def _record(header: bytes, number: int, where: str) -> _Record:
    lengths, types = _LENGTH.findall(header), _TYPE.findall(header)
    if len(lengths) != 1 or len(types) != 1:
        raise DataError(
            f"{where}: its header has {len(lengths)} Content-Length and {len(types)} WARC-Type, "
            "where each stands once; fetch or write the file again"
        )
    return _Record(number, where, header, int(lengths[0]), types[0].decode().lower())


def _cut(where: str, what: str) -> DataError:
    return DataError(f"{where}: {what}, the file is cut off or damaged; fetch or write it again")


def _pass_over(stream: BinaryIO, record: _Record) -> None:
    left = record.length
    while left:
        block = stream.read(min(left, 2**20))
        if not block:
            raise _cut(record.where, f"{left} of its {record.length} bytes are missing")
        left -= len(block)


def _end(stream: BinaryIO, record: _Record) -> None:
    found = stream.read(len(_END))
    if found != _END:
        raise _cut(record.where, f"{found!r} follows its {record.length} bytes, not a blank line")


def _item(
    stream: BinaryIO, record: _Record, file: InputFile, reading: Reading
) -> Document | Dropped:
    def dropped(reason: str, detail: str = "", *, is_bad: bool = False) -> Dropped:
        return Dropped(file, record.number, reason, detail, is_bad, record.where)

    if record.type not in _TEXT_RECORDS or record.length > PAGE_BYTES:
        _pass_over(stream, record)
        if record.type in _TEXT_RECORDS:
            return dropped(f"page over {PAGE_BYTES >> 20} MiB", f"it has {record.length} bytes")
        known = record.type in _OTHER_RECORDS
        return dropped(f"{record.type} record" if known else "record of unknown type", record.type)
    block = stream.read(record.length)
    if len(block) < record.length:
        missing = record.length - len(block)
        raise _cut(record.where, f"{missing} of its {record.length} bytes are missing")
    page = _page(record, block)
    if page.refused:
        return dropped(page.refused, page.detail)
    text = _decoded(page)
    if text is None and reading.on_bad_text == "replace":
        text = page.body.decode(errors="replace")
    elif text is None:
        detail = f"nor what its page calls {page.charset}" if page.charset else ""
        return dropped(NOT_UTF8, detail, is_bad=reading.on_bad_text == "strict")
    if page.type in _HTML:
        if text.count("<") > MAX_TAGS:
            return dropped(f"page over {MAX_TAGS:,} tags", f"it has {text.count('<'):,}")
        try:
            text = text_of(text)
        except DataError:
            raise
        except Exception as error:
            # One page of a crawl that breaks the parser is a page without text, and is counted.
            return dropped("HTML that cannot be parsed", f"{type(error).__name__}: {error}")
        if not text:
            return dropped("no main text")
    item = reading.document(text.encode(), file, record.number, record.where)
    return replace(item, id=page.address) if isinstance(item, Document) else item


@dataclass(frozen=True)
class _Page:
    body: bytes
    type: str
    charset: str
    address: str
    refused: str = ""
    """Why it gives no text."""
    detail: str = ""


def _page(record: _Record, block: bytes) -> _Page:
    """What a record of text holds. DataError where the block is not what its digest says."""
    found = _parsed(record, block)
    headers, http = found.rec_headers, found.http_headers
    address = headers.get_header("WARC-Target-URI") or headers.get_header("WARC-Record-ID") or ""
    body = found.raw_stream.read() if http is None else _transferred(found)
    if not _is_intact(block, headers.get_header("WARC-Block-Digest")):
        raise DataError(
            f"{record.where}: its {record.length} bytes are not what its WARC-Block-Digest says, "
            "it is damaged; fetch the file again"
        )
    declared = (http.get_header("Content-Type") if http else found.content_type) or ""
    kind = headers.get_header("WARC-Identified-Payload-Type") or declared.partition(";")[0]
    kind = kind.strip().lower() or ("text/html" if b"<html" in body[:1024].lower() else "")
    named = _CHARSET.search(declared)
    refused = detail = ""
    if http and not (http.get_statuscode() or "").startswith("2"):
        refused, detail = "HTTP status other than 2xx", http.get_statuscode() or "none"
    elif kind not in (*_HTML, "text/plain"):
        refused, detail = "not HTML or text", kind or "no type"
    elif (plain := _unpacked(body, http)) is None:
        refused, detail = "content encoding not readable", http.get_header("Content-Encoding")
    else:
        body = plain
    charset = named[1] if named else ""
    if not charset and kind in _HTML and (meta := _META_CHARSET.search(body[:4096])):
        charset = meta[1].decode()
    return _Page(body, kind, charset, address, refused, detail)


def _parsed(record: _Record, block: bytes) -> Any:
    try:
        from warcio.exceptions import ArchiveLoadFailed
        from warcio.recordloader import ArcWarcRecordLoader
    except ImportError as error:
        raise missing_extra("reading WARC files", "datatrove", error) from None
    # It reports addresses that it mends.
    logging.getLogger("warcio").setLevel(logging.CRITICAL)
    loader = ArcWarcRecordLoader(verify_http=False, arc2warc=False)
    try:
        return loader.parse_record_stream(BytesIO(record.header + block), known_format="warc")
    except (ArchiveLoadFailed, EOFError, ValueError, AttributeError) as error:
        raise _cut(record.where, f"its header cannot be read ({error})") from None


def _is_intact(block: bytes, declared: str | None) -> bool:
    """Whether a block is what its digest says, in base 32 as the standard shows it, or in hex.

    Digests of payloads are not asked: crawlers do not agree on what they are of.
    """
    name, _, value = (declared or "").partition(":")
    try:
        digest = hashlib.new(name.strip().lower().replace("-", ""), block).digest()
    except (ValueError, TypeError):
        # TypeError: one without a length of its own.
        return True
    written = value.strip().rstrip("=").upper()
    return written in (base64.b32encode(digest).decode().rstrip("="), digest.hex().upper())


def _transferred(found: Any) -> bytes:
    """The body of a response without the marks of chunks, which many crawlers leave in."""
    from warcio.bufferedreaders import ChunkedDataReader

    raw: bytes = found.raw_stream.read()
    if "chunked" not in (found.http_headers.get_header("Transfer-Encoding") or "").lower():
        return raw
    body: bytes = ChunkedDataReader(BytesIO(raw)).read()
    return body


def _unpacked(body: bytes, http: Any) -> bytes | None:
    """The body without its content encoding, PAGE_BYTES at most; None where it cannot be had."""
    encoding = ((http and http.get_header("Content-Encoding")) or "identity").strip().lower()
    if encoding == "identity" or not body:
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return None
    if encoding != "deflate" and not body.startswith(b"\x1f\x8b"):
        # Many crawlers store what they have unpacked, under the header that they were given.
        return body
    plain = b""
    for _ in range(_MAX_MEMBERS):
        unpacker = zlib.decompressobj(wbits=47)
        try:
            plain += unpacker.decompress(body, PAGE_BYTES - len(plain))
        except zlib.error:
            return None
        if not unpacker.eof:
            return None
        body = unpacker.unused_data
        if not body.startswith(b"\x1f\x8b"):
            return plain
        if len(plain) == PAGE_BYTES:
            return None
    return None


def _decoded(page: _Page) -> str | None:
    """The text of a body: UTF-8 if it is, else what page or server call it; None for neither."""
    body = page.body.removeprefix(b"\xef\xbb\xbf")
    try:
        named = codecs.lookup(page.charset).name
    except (LookupError, ValueError):
        named = "utf-8"
    # Browsers read what is called Latin-1 or ASCII as its superset.
    wider = "cp1252" if named in ("iso8859-1", "ascii") else named
    for charset in ("utf-8", wider, named):
        if charset in _NO_CHARSETS:
            continue
        try:
            text = body.decode(charset)
            text.encode()
            return text
        except (ValueError, LookupError):
            continue
    return None
