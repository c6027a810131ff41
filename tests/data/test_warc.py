"""Pages of a crawl become documents, by their records; damage is named by file and record."""

from __future__ import annotations

import gzip
import random
import re
import sys
from base64 import b32encode
from collections import Counter
from hashlib import sha1, sha256
from itertools import pairwise
from pathlib import Path

import pytest

from data.config import DataError, DataUsageError
from data.documents import Document, Dropped, Extent, Reading
from data.ranges import find_ranges
from data.readers import find_files, read_extent
from data.warc import MAX_TAGS, PAGE_BYTES
from tests.data.warcs import MAIN, PAGE, Warc, chunks, crawl, html, members


def read(
    path: Path, reading: Reading | str = "text", first: int = 0, last: int | None = None
) -> list[Document | Dropped]:
    [file] = find_files([str(path)])
    return list(read_extent(Extent(file, 0, file.num_bytes, first, last), reading))


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "folder/b.warc.gz"])
def test_pages_are_documents_and_the_rest_is_counted(tmp_path: Path, name: str) -> None:
    warc = crawl(packed=name.endswith("gz"))
    warc.page("http://a.org/logo", b"\x89PNG", "image/png")
    warc.page("http://a.org/gone", html().encode(), status="404 Not Found")
    warc.page("http://a.org/empty", b"<html><body></body></html>")
    warc.page("http://a.org/notes.txt", b"plain notes", "text/plain")
    warc.add("conversion", "http://a.org/wet", "\u4e2d\u6587".encode(), "text/plain")
    warc.add("metadata", "http://a.org/0", b"a: b\r\n", "application/warc-fields")
    warc.add("sonnet", "http://a.org/0", b"a: b\r\n", "text/plain")
    (tmp_path / "folder").mkdir()
    items = read(warc.write(tmp_path / name))
    documents = [item for item in items if isinstance(item, Document)]
    assert [item.id for item in documents[:4]] == [f"http://a.org/{i}" for i in range(4)]
    assert [item.text.startswith(b"Page %d. " % i) for i, item in enumerate(documents[:4])]
    assert b"Home" not in documents[0].text, "navigation is no text of a page"
    assert [(d.id, d.text.decode()) for d in documents[4:]] == [
        ("http://a.org/notes.txt", "plain notes"),
        ("http://a.org/wet", "\u4e2d\u6587"),
    ]
    assert Counter(item.reason for item in items if isinstance(item, Dropped)) == {
        "warcinfo record": 1,
        "request record": 4,
        "metadata record": 1,
        "record of unknown type": 1,
        "not HTML or text": 1,
        "HTTP status other than 2xx": 1,
        "no main text": 1,
    }
    assert not any(item.is_bad for item in items if isinstance(item, Dropped))
    assert [item.offset for item in items] == list(range(16)), "its record is its place"


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (html().encode(), {}),
        (b"\xef\xbb\xbf" + html().encode(), {}),
        (html().encode("latin-1"), {"type": "text/html; charset=ISO-8859-1"}),
        (html(head='<meta charset="latin1">').encode("latin-1"), {}),
        (html().encode("utf-16"), {"type": "text/html; charset=utf-16"}),
        (html().encode(), {"type": "text/html; charset=no-such"}),
        (gzip.compress(html().encode()), {"Content_Encoding": "gzip"}),
        (members(html().encode()), {"Content_Encoding": "gzip"}),
        (html().encode(), {"Content_Encoding": "gzip"}),
        (chunks(html().encode()), {"Transfer_Encoding": "chunked"}),
        (html().encode(), {"Transfer_Encoding": "chunked"}),
        (
            chunks(gzip.compress(html().encode())),
            {"Transfer_Encoding": "chunked", "Content_Encoding": "gzip"},
        ),
        (html().encode(), {"type": ""}),
        (html().encode(), {"type": "application/xhtml+xml"}),
    ],
    ids=range(14),
)
def test_a_page_is_the_same_however_it_was_sent(
    tmp_path: Path, body: bytes, more: dict[str, str]
) -> None:
    warc = Warc()
    warc.page("http://a.org", body, **{"type": "text/html", **more})
    [item] = read(warc.write(tmp_path / "a.warc"))
    assert isinstance(item, Document), item
    assert item.text.decode().splitlines() == [line.strip() for line in MAIN]


@pytest.mark.parametrize(
    ("body", "more", "reason"),
    [
        (gzip.compress(html().encode())[:-20], {"Content_Encoding": "gzip"}, "content encoding"),
        (members(html().encode())[:-20], {"Content_Encoding": "gzip"}, "content encoding"),
        (b"\x1b\x03", {"Content_Encoding": "br"}, "content encoding"),
        (b"\x1f\x8b\xff\xff", {"Content_Encoding": "gzip"}, "content encoding"),
        (b"<html>\xff\xfe</html>", {"type": "text/html; charset=utf-7"}, "not UTF-8"),
        (b"<html>\xff\\ud800</html>", {"type": "text/html; charset=unicode_escape"}, "not UTF-8"),
        (b"", {}, "no main text"),
    ],
)
def test_a_page_whose_text_cannot_be_had_is_counted(
    tmp_path: Path, body: bytes, more: dict[str, str], reason: str
) -> None:
    warc = Warc()
    warc.page("http://a.org", body, **{"type": "text/html", **more})
    path = warc.write(tmp_path / "a.warc")
    [item] = read(path)
    assert isinstance(item, Dropped) and item.reason.startswith(reason)
    assert item.is_bad == (reason == "not UTF-8"), "strict text counts against the budget"
    assert item.place == f"{path}, record 1"
    [item] = read(path, Reading(on_bad_text="skip"))
    assert isinstance(item, Dropped) and not item.is_bad


@pytest.mark.parametrize(
    ("body", "reason", "detail"),
    [
        (b"<html>" + b"<br>" * (MAX_TAGS + 1), "page over 65,536 tags", "it has 65,538"),
        (b"<html>" + b"x" * PAGE_BYTES, "page over 16 MiB", f"it has {PAGE_BYTES + 50} bytes"),
    ],
    ids=["tags", "bytes"],
)
def test_a_page_that_would_take_too_long_is_counted(
    tmp_path: Path, body: bytes, reason: str, detail: str
) -> None:
    warc = Warc()
    warc.page("http://a.org", body)
    warc.page("http://a.org/next", html().encode())
    items = read(warc.write(tmp_path / "a.warc"))
    assert isinstance(items[0], Dropped) and isinstance(items[1], Document)
    assert (items[0].reason, items[0].detail, items[0].is_bad) == (reason, detail, False)


def test_bad_text_is_replaced_under_that_policy(tmp_path: Path) -> None:
    warc = Warc()
    warc.page("http://a.org", html().encode().replace("\u00e9".encode(), b"\xff"))
    [item] = read(warc.write(tmp_path / "a.warc"), Reading(on_bad_text="replace"))
    assert isinstance(item, Document) and item.text.decode().startswith("The mill at caf\ufffd")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_cut_file_is_never_silently_short(tmp_path: Path, packed: bool) -> None:
    warc = crawl(packed=packed, pages=2)
    whole = warc.out.getvalue()
    rng = random.Random(0)
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    near = [start + i for start in [*warc.starts[1:], len(whole)] for i in (-5, -4, -2, -1, 1, 3)]
    cuts = {cut for cut in near + rng.sample(range(1, len(whole)), 100) if 0 < cut < len(whole)}
    for cut in cuts - set(warc.starts):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut off|damaged|begins with") as refused:
            read(path)
        assert str(path) in str(refused.value)
        if not packed:
            number = sum(start < cut for start in warc.starts)
            assert f", record {number}" in str(refused.value)


@pytest.mark.parametrize(
    ("digest", "is_right"),
    [
        (f"sha1:{b32encode(sha1(PAGE).digest()).decode()}", True),
        (f"sha1:{sha1(PAGE).hexdigest()}", True),
        (f"SHA-256:{sha256(PAGE).hexdigest().upper()}", True),
        (f"sha256:{b32encode(sha256(PAGE).digest()).decode()}", True),
        ("murmur:7", True),
        ("shake_128:7", True),
        ("none", True),
        (f"sha1:{sha1(PAGE[1:]).hexdigest()}", False),
        ("sha1:\u00e9", False),
        ("sha1:", False),
    ],
    ids=range(10),
)
def test_a_digest_is_read_as_crawlers_write_it(tmp_path: Path, digest: str, is_right: bool) -> None:
    """One of an unknown kind cannot be checked; one that is not a digest is damage."""
    head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Block-Digest: {digest}\r\n".encode()
    head += b"Content-Type: text/plain\r\nWARC-Target-URI: http://a.org\r\n"
    path = tmp_path / "a.wet"
    path.write_bytes(head + b"Content-Length: %d\r\n\r\n%b\r\n\r\n" % (len(PAGE), PAGE))
    if is_right:
        assert [item.text for item in read(path) if isinstance(item, Document)] == [PAGE]
    else:
        with pytest.raises(DataError, match=r"a\.wet, record 1: .*not what its WARC-Block-Digest"):
            read(path)


def test_damage_in_a_page_is_named(tmp_path: Path) -> None:
    warc = crawl(pages=3)
    whole = warc.out.getvalue()
    path = tmp_path / "a.warc"
    body = whole.index(b"<html>", warc.starts[4])
    rng = random.Random(0)
    for at in rng.sample(range(body, whole.index(b"</html>", body)), 50):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.warc, record 5: .*not what its WARC-Block-Digest"):
            read(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (rb"Content-Length: (\d+)", b"Content-Length: 7", r"its 7 bytes are not what its WARC-B"),
        (rb"(?s)Block(-.*?Content-Length: )\d+", rb"Blick\g<1>7", r"b'.*' follows its 7 bytes"),
        (rb"Content-Length: (\d+)", b"Content-Length: x", r"has 0 Content-Length and 1 WARC-Type"),
        (rb"WARC-Type: \w+\r\n", b"", r"has 1 Content-Length and 0 WARC-Type"),
        (rb"WARC/1\.\d", b"WARK/1.0", r"begins with b'WARK/1\.0\\r\\n', not with a WARC version"),
        (rb"Content-Length: (\d+)", b"Content-Length: 99999999", r"record 3: \d+ of its 99999999"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    warc = crawl()
    whole, start = warc.out.getvalue(), warc.starts[2]
    path = tmp_path / "a.warc"
    path.write_bytes(whole[:start] + re.sub(old, new, whole[start:], count=1))
    with pytest.raises(DataError, match=message) as refused:
        read(path)
    assert f"{path}, record 3" in str(refused.value)


def test_a_header_of_noise_is_read_or_named(tmp_path: Path) -> None:
    """Never another error, whatever the record says of itself: no digest gives it away here."""
    warc = crawl(pages=1)
    warc.page("http://a.org/z", chunks(gzip.compress(b"<html>x")), Content_Encoding="gzip")
    whole = re.sub(rb"WARC-Block-Digest: .*\r\n", b"", warc.out.getvalue())
    headers = [m.span() for m in re.finditer(rb"(?s)WARC/1.*?\r\n\r\n(HTTP.*?\r\n\r\n)?", whole)]
    places = [at for start, stop in headers for at in range(start, stop)]
    rng = random.Random(0)
    path = tmp_path / "a.warc"
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        damaged, at = bytearray(whole), rng.choice(places)
        noise = bytes(rng.choices(b"\r\n\0 :az0WARC/1.0<>\xff", k=rng.randrange(6)))
        damaged[at : at + rng.randrange(1, 40)] = noise
        path.write_bytes(damaged)
        try:
            read(path)
            outcomes["read"] += 1
        except DataError as error:
            assert str(path) in str(error)
            outcomes["named"] += 1
    assert min(outcomes.values()) > 50 and len(outcomes) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"<html>no", "it is no WARC"), (b"\r\n\r\n", "holds no record")],
)
def test_what_is_no_warc_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_ranges_of_a_long_file_hold_each_page_once(tmp_path: Path) -> None:
    path = crawl(packed=True, pages=9).write(tmp_path / "a.warc.gz")
    [file] = find_files([str(path)])
    starts = find_ranges(file, reading=Reading(), range_bytes=200)
    assert len(starts) >= 2
    edges = [0, *starts, None]
    parts = [read(path, first=a or 0, last=b) for a, b in pairwise(edges)]
    assert [item for part in parts for item in part] == read(path)


def test_a_page_does_not_depend_on_those_before(tmp_path: Path) -> None:
    warc = Warc()
    for i in range(6):
        warc.page(f"http://a.org/{i}", html().encode())
    items = read(warc.write(tmp_path / "a.warc"))
    assert len({item.text for item in items if isinstance(item, Document)}) == 1
    assert all(isinstance(item, Document) for item in items)


@pytest.mark.parametrize("missing", ["warcio.recordloader", "trafilatura"])
def test_without_the_extra_the_refusal_says_what_to_install(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = crawl().write(tmp_path / "a.warc")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        DataUsageError, match=r"WARC files needs .* install 'headrace\[datatrove\]'"
    ):
        read(path)
