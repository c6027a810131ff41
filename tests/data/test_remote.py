"""URLs are fetched once and whole from a real server that fails on purpose; lists and pipes too."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import retries
from data.config import DataError, DataUsageError, PrepareConfig
from data.inputs import find_files
from data.prepare import prepare
from data.readers import Document, cut_parts, read_extent
from data.selection import Selection
from tests.data.texts import prose, write_lines


def texts(inputs: list[str], keep: Path | None = None) -> list[str]:
    parts = cut_parts(find_files(inputs, keep), 2**20)
    items = [item for part in parts for extent in part for item in read_extent(extent)]
    return [item.text.decode() for item in items if isinstance(item, Document)]


class Server(ThreadingHTTPServer):
    """A server on loopback whose answers to a path are listed; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.answers: dict[str, list[tuple[int, bytes, int]]] = {}
        self.asked: list[str] = []
        self.headers: dict[str, dict[str, str | None]] = {}
        """More headers of the answer to a path; None leaves one out."""
        self.heads: dict[str, str | None] = {}
        """Length of a path as HEAD says it."""

    def url(self, path: str, *answers: tuple[int, bytes, int]) -> str:
        """Answer `path` with (status, body, bytes of the body that are missing) in turn."""
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        answers = self.server.answers.get(path, [(404, b"", 0)])
        status, body, missing = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | self.server.headers.get(path, {})
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) - missing])
        self.close_connection = True

    def do_HEAD(self) -> None:
        length = self.server.heads.get(self.path)
        self.send_response(200 if length else 405)
        self.send_header("Content-Length", length or "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read what was asked from `asked`."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_url_is_fetched_once_and_read_by_its_suffix(server: Server, tmp_path: Path) -> None:
    body = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    url = server.url("/data/a.jsonl.gz", (200, body, 0)) + "?token=secret"
    for _ in range(2):
        assert texts([url], tmp_path / "keep") == ["one", "two"]
    assert server.asked == ["/data/a.jsonl.gz"]
    (note,) = tmp_path.rglob("*.fetched.json")
    assert "secret" not in note.read_text() and str(len(body)) in note.read_text()
    # What was damaged since is noticed, and fetched again.
    (kept,) = tmp_path.rglob("*.gz")
    kept.write_bytes(body[:-1] + b"\xff")
    assert texts([url], tmp_path / "keep") == ["one", "two"]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "failure", [(503, b"busy", 0), (429, b"", 0), (200, b"short body", 4)], ids=lambda x: str(x[:2])
)
def test_what_may_pass_is_tried_again(
    server: Server, tmp_path: Path, failure: tuple[int, bytes, int]
) -> None:
    url = server.url("/a.txt", failure, failure, (200, b"here it is", 0))
    assert texts([url], tmp_path) == ["here it is"]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "body", "headers", "why"),
    [
        (206, b"the first par", {"Content-Range": "bytes 0-12/99"}, "HTTP 206 to a request for"),
        (200, gzip.compress(b"cut" * 999)[:30], {"Content-Encoding": "gzip"}, "'gzip', which was"),
    ],
)
def test_an_answer_that_may_be_a_part_is_not_taken_for_the_file(
    server: Server, tmp_path: Path, status: int, body: bytes, headers: dict[str, str], why: str
) -> None:
    url = server.url("/a.txt", (status, body, 0))
    server.headers["/a.txt"] = headers
    message = rf"a\.txt: the server's answer cannot be taken for the whole file \(.*{why}"
    with pytest.raises(DataUsageError, match=message):
        find_files([url + "?token=secret"], tmp_path)
    assert server.asked == ["/a.txt"]


def test_a_body_without_a_length_is_held_against_what_head_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.001)
    for path, head in (("/whole.txt", "13"), ("/cut.txt", "99"), ("/unknown.txt", None)):
        url = server.url(path, (200, b"here is a bod", 0))
        server.headers[path] = {"Content-Length": None}
        server.heads[path] = head
        if path != "/cut.txt":
            assert texts([url], tmp_path) == ["here is a bod"]
            continue
        with pytest.raises(DataError, match=r"in 8 attempts \(OSError: got 13 bytes of 99\)"):
            find_files([url], tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404, 416])
def test_what_will_not_pass_stops_at_once(server: Server, tmp_path: Path, status: int) -> None:
    url = server.url("/a.txt", (status, b"", 0))
    with pytest.raises(DataUsageError, match=rf"a\.txt cannot be fetched \(HTTP {status}, "):
        find_files([url + "?token=secret"], tmp_path)
    assert server.asked == ["/a.txt"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_budget_of_attempts_ends(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.retries._FIRST_PAUSE", 0.01)
    url = server.url("/a.txt", (200, b"always short", 1))
    with pytest.raises(DataError, match=r"could not be fetched in 8 attempts.*run the same"):
        find_files([url], tmp_path)
    assert len(server.asked) == 8
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/a.txt", "s3fs"), ("http://localhost:1/a.txt", "aiohttp")]
)
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, url: str, package: str
) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\nfrom pathlib import Path\n"
        f"from data.inputs import find_files; find_files([{url!r}], Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"needs the package {package}; install it with {sys.executable} -m pip" in done.stderr


def test_an_unknown_scheme_is_refused_and_no_command_is_run(tmp_path: Path) -> None:
    with pytest.raises(DataUsageError, match=r"ftp:// is not supported; s3://, gs://, http://"):
        find_files(["ftp://host/a.txt"], tmp_path)
    with pytest.raises(DataUsageError, match="does not say what the command writes"):
        find_files(["pipe:echo hello"], tmp_path)


def test_a_list_names_paths_patterns_and_urls(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / "data" / name).write_text(name)
    url = server.url("/far.txt", (200, b"far", 0))
    listing = tmp_path / "list.txt"
    listing.write_text(f"# the corpus\r\ndata/c.md\n\ndata/*.txt\n{url}\n")
    assert texts([f"@{listing}"], tmp_path / "keep") == ["c.md", "a.txt", "b.txt", "far"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n# nothing\n", r"the list names no file"),
        ("a.txt\nmissing.txt\n", r"list\.txt:2: --input .*missing\.txt: no such file"),
        ("-\n", r"list\.txt:1: - is not a path, pattern or URL"),
        ("@other.txt\n", r"list\.txt:1: @other\.txt is not a path"),
        ("a.txt\na.txt\n", "would count twice"),
        (None, r"--input @.*list\.txt: the list cannot be read: No such file"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(DataUsageError, match=message):
        find_files([f"@{tmp_path / 'list.txt'}"])


def piped(content: bytes, named: str, keep: Path) -> subprocess.CompletedProcess[bytes]:
    program = (
        "import sys\nfrom pathlib import Path\nfrom data.inputs import find_files\n"
        "from data.readers import cut_parts, read_extent\n"
        "for f in find_files([sys.argv[1]], Path(sys.argv[2])):\n"
        "    for item in read_extent(cut_parts([f], 9**9)[0][0]): print(item.text.decode())\n"
    )
    command = [sys.executable, "-c", program, named, str(keep)]
    return subprocess.run(command, input=content, capture_output=True)


def test_standard_input_is_kept_as_a_file_of_the_format_that_is_named(tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    assert piped(b"some text", "-", tmp_path).stdout == b"some text\n"
    assert piped(b"[" * 50_000, "-", tmp_path).stdout == b"[" * 50_000 + b"\n"
    assert piped(lines, "-.jsonl", tmp_path).stdout == b"one\ntwo\n"
    assert piped(gzip.compress(lines), "-.jsonl.gz", tmp_path).stdout == b"one\ntwo\n"
    assert piped(lines, "-.txt", tmp_path).stdout == lines + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", b"standard input is empty; did the command fail?"),
        (b'{"text": "one"}\n', b"looks like JSON lines; write --input -.jsonl"),
        (gzip.compress(b"x"), b"standard input is gzip, not text; say what it is by a suffix"),
    ],
)
def test_a_bare_dash_is_text_and_nothing_else(
    tmp_path: Path, content: bytes, message: bytes
) -> None:
    assert message in piped(content, "-", tmp_path).stderr


def test_a_dataset_does_not_depend_on_how_its_text_came(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain, packed, as a list or table, by URL, from a pipe: the same documents, to the byte."""
    documents = [prose(400, seed=seed) for seed in range(60)]
    plain = write_lines(tmp_path / "a.jsonl", documents)
    raw = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in documents]))
    url = server.url("/d.jsonl", (200, raw, 0))
    reader, writer = os.pipe()
    os.write(writer, raw)
    os.close(writer)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(os.fdopen(reader, "rb")))
    config = PrepareConfig(vocab_size=400, val_fraction=0.2)
    fingerprints = {}
    with sys.stdin:
        for named in (plain, tmp_path / "b.jsonl.gz", tmp_path / "c.json", url, "-.jsonl"):
            output = tmp_path / f"dataset-{len(fingerprints)}"
            summary = prepare([str(named)], output, config, workers=1)
            fingerprints[str(named)] = summary.manifest.fingerprint
    assert len(fingerprints) == 5
    assert len(set(fingerprints.values())) == 1, fingerprints


def test_the_one_document_that_changes_sides_is_told_from_its_neighbours(tmp_path: Path) -> None:
    """Numbers of documents are no bytes: 0 + a piece at 1 is not 1 + a piece at 0."""
    documents = [prose(300, seed=seed) for seed in range(30)]
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents))
    )
    config = PrepareConfig(vocab_size=400, val_fraction=1e-9)
    summary = prepare([str(tmp_path / "a.jsonl.gz")], tmp_path / "dataset", config, workers=1)
    assert summary.manifest.counts["documents_val"] == 1


def test_what_is_excluded_is_not_fetched(server: Server, tmp_path: Path) -> None:
    urls = [server.url(f"/in/{name}", (200, b"text", 0)) + "?k=v" for name in ("a.txt", "b.md")]
    (file,) = find_files(urls, tmp_path, selection=Selection(["*.md", "in", "127*"]))
    assert (file.path.name, server.asked) == ("a.txt", ["/in/a.txt"])
