"""A web server on loopback that gives the files of a folder, whole or by ranges, and fails on
purpose.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Fault = Callable[["FolderAnswer", bytes], None]
"""Answers a request for a file with this content in its own way."""


class FolderServer(ThreadingHTTPServer):
    """Faults are used up one by one by requests whose path ends so; others are answered well."""

    daemon_threads = True

    def __init__(self, folder: Path, *, password: str = "") -> None:
        super().__init__(("127.0.0.1", 0), FolderAnswer)
        self.folder = folder
        self.password = password
        self.faults: list[tuple[str, Fault]] = []
        self.asked: list[tuple[str, str]] = []
        """Path and range of every GET."""
        self.sent = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, ending: str, *faults: Fault) -> None:
        """The next requests for files that end so are answered by these faults, in turn."""
        self.faults += [(ending, fault) for fault in faults]

    def take(self, path: str) -> Fault | None:
        with self._lock:
            for number, (ending, fault) in enumerate(self.faults):
                if path.endswith(ending):
                    del self.faults[number]
                    return fault
        return None


class FolderAnswer(BaseHTTPRequestHandler):
    """One request."""

    server: FolderServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        if self.command == "GET":
            self.server.asked.append((path, self.headers.get("Range", "")))
        if self.server.password and not self._may_read():
            return self.answer(401, b"")
        file = self.server.folder / path
        if not file.is_file():
            return self.answer(404, b"")
        fault = self.server.take(path)
        if fault is not None:
            return fault(self, file.read_bytes())
        self.well(file.read_bytes())

    def well(self, content: bytes) -> None:
        """As a good server answers."""
        first, last = self.range(len(content))
        if "Range" not in self.headers:
            return self.answer(200, content)
        if first >= len(content):
            return self.answer(416, b"")
        self.answer(206, content[first : last + 1])

    def range(self, size: int) -> tuple[int, int]:
        """First and last byte that are asked for."""
        wanted = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=")
        first, _, last = wanted.partition("-")
        return int(first), min(int(last), size - 1)

    def answer(self, status: int, body: bytes, *, missing: int = 0, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            self.server.sent += len(body)
            self.wfile.write(body[: len(body) - missing])

    def _may_read(self) -> bool:
        expected = base64.b64encode(f"user:{self.server.password}".encode()).decode()
        return bool(self.headers.get("Authorization") == f"Basic {expected}")

    def log_message(self, format: str, *args: object) -> None:
        """Tests read what was asked from `asked`."""


def status(code: int) -> Fault:
    """An error."""
    return lambda answer, content: answer.answer(code, b"no")


def short_body(answer: FolderAnswer, content: bytes) -> None:
    """Fewer bytes than announced, then the connection closes."""
    first, last = answer.range(len(content))
    answer.answer(206, content[first : last + 1], missing=7)


def short_range(answer: FolderAnswer, content: bytes) -> None:
    """A shorter range than was asked for, called right."""
    first, last = answer.range(len(content))
    answer.answer(206, content[first:last])


def whole_file(answer: FolderAnswer, content: bytes) -> None:
    """200 instead of 206: the server does not know ranges."""
    answer.answer(200, content)


def other_content(answer: FolderAnswer, content: bytes) -> None:
    """The right number of bytes of another version of the file."""
    answer.well(bytes(byte ^ 1 for byte in content))


def stall(answer: FolderAnswer, content: bytes) -> None:
    """Begins to answer and says nothing more."""
    first, last = answer.range(len(content))
    answer.answer(206, content[first : last + 1], missing=last + 1 - first)
    answer.wfile.flush()
    time.sleep(3)


def redirect(answer: FolderAnswer, content: bytes) -> None:
    """To the same file by another address."""
    answer.answer(302, b"", Location=f"{answer.server.url}{answer.path}?again=1")


@contextmanager
def serving(folder: Path, *, password: str = "") -> Iterator[FolderServer]:
    """A server for as long as the block runs."""
    with FolderServer(folder, password=password) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
