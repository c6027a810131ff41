"""Files of crawls, through the library's own writer."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from tests.data.texts import prose

MAIN = [f"The mill at caf\u00e9 Z\u00fcrich. {prose(400, seed=i)}".split("\n")[0] for i in range(5)]
PAGE = b"The text of a page."


def html(main: list[str] = MAIN, head: str = "") -> str:
    paragraphs = "".join(f"<p>{paragraph}</p>" for paragraph in main)
    menu = "<nav><ul><li><a href='/'>Home</a></li></ul></nav>"
    return f"<html><head>{head}</head><body>{menu}<article>{paragraphs}</article></body></html>"


def chunks(body: bytes) -> bytes:
    half = len(body) // 2
    return b"".join(b"%x\r\n%b\r\n" % (len(x), x) for x in (body[:half], body[half:], b""))


def members(body: bytes) -> bytes:
    half = len(body) // 2
    return b"".join(gzip.compress(part) for part in (body[:half], b"", body[half:]))


class Writer(WARCWriter):  # type: ignore[misc]
    """It leaves temporary files to the garbage collector, which is a warning."""

    @staticmethod
    def _create_temp_file() -> io.BytesIO:
        return io.BytesIO()


class Warc:
    """A file in the making, through the library's own writer."""

    def __init__(self, *, packed: bool = False) -> None:
        self.out = io.BytesIO()
        self.writer = Writer(self.out, gzip=packed)
        self.starts: list[int] = []

    def add(self, kind: str, url: str, body: bytes, type: str | None = None, **more: str) -> None:
        status = more.pop("status", "200 OK")
        headers = [("Content-Type", type)] if type else []
        headers += [(key.replace("_", "-"), value) for key, value in more.items()]
        http = StatusAndHeaders(status, headers, protocol="HTTP/1.1")
        self.starts.append(self.out.tell())
        self.writer.write_record(
            self.writer.create_warc_record(
                url,
                kind,
                payload=io.BytesIO(body),
                http_headers=http if kind == "response" else None,
                warc_content_type="" if kind == "response" else type or "",
            )
        )

    def page(self, url: str, body: bytes, type: str = "text/html", **more: str) -> None:
        self.add("response", url, body, type, **more)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.out.getvalue())
        return path


def crawl(*, packed: bool = False, pages: int = 4) -> Warc:
    warc = Warc(packed=packed)
    warc.add("warcinfo", "", b"software: test\r\n", "application/warc-fields")
    for i in range(pages):
        warc.add("request", f"http://a.org/{i}", b"GET / HTTP/1.1\r\n\r\n", "application/http")
        warc.page(f"http://a.org/{i}", html([f"Page {i}.", *MAIN]).encode())
    return warc
