"""Inputs that go wrong in ways of their own: each is named, kept or counted as people expect."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.config import BadText, DataError, DataUsageError, PrepareConfig
from data.prepare import prepare
from data.readers import Document, Dropped, Reading, cut_parts, find_files, read_extent
from tests.data.files import PACK, tar
from tests.data.texts import prose
from tests.ranks import _context as processes

POLICIES: tuple[BadText, ...] = ("strict", "replace", "skip")


def read(path: Path, policy: BadText = "strict") -> list[Document | Dropped]:
    parts = cut_parts(find_files([str(path)]), 2**20)
    reading = Reading(on_bad_text=policy)
    return [item for part in parts for extent in part for item in read_extent(extent, reading)]


def seen(items: list[Document | Dropped]) -> list[str]:
    """Texts, and reasons in brackets."""
    return [i.text.decode() if isinstance(i, Document) else f"[{i.reason}]" for i in items]


def parquet(values: list[bytes]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values)}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


REFUSED: list[tuple[str, bytes, str]] = [
    ("a.txt.bz2", b"", "is empty: 0 bytes are no bzip2 file"),
    ("a.txt.xz", b"", "is empty: 0 bytes are no xz file"),
    ("a.txt.gz", gzip.compress(b"x") + PACK[".zst"](b"y"), "damaged gzip data"),
    ("a.txt.gz.gz", gzip.compress(gzip.compress(b"x")), r"unpacks to gzip, not to text; unpack it"),
    ("a.txt.gz", gzip.compress(PACK[".zst"](b"x")), r"a\.txt\.gz unpacks to zstd, not to text"),
    ("a.jsonl.xz", lzma.compress(bz2.compress(b"x")), "unpacks to bzip2, not to text"),
    ("a.txt.gz", gzip.compress(tar([("a.txt", b"x")])), "unpacks to tar, not to text"),
    ("a.gz", gzip.compress(b"%PDF-1.7"), "unpacks to pdf, not to text"),
    ("a.jsonl", '{"text": "abcdefgh"}\n'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 .*-f UTF-16 -t"),
    ("a.txt", "plain words".encode("utf-32"), r"not UTF-8 .*iconv -f UTF-32 -t"),
    ("a.txt", "plain words".encode("utf-32-le"), r"bytes are NUL.*iconv -f UTF-32LE -t"),
    ("a.txt", "plain words".encode("utf-32-be"), r"bytes are NUL.*iconv -f UTF-32BE -t"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_a_file_is_refused_by_name_and_cause(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    policy: BadText = "replace" if "utf-32" in message.lower() else "strict"
    with pytest.raises(DataError, match=message) as refused:
        read(tmp_path / name, policy)
    assert str(tmp_path / name) in str(refused.value)


GIVES: list[tuple[str, bytes, list[str]]] = [
    # Two files with marks, put together with cat.
    ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', ["a", "[broken JSON]"]),
    ("a.jsonl", b'{"text": "a"}\n \t \n', ["a", "[blank line]"]),
    ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', ["[broken JSON]"]),
    (
        "a.jsonl",
        b'{"text": NaN}\n{"text": ["a"]}\ntrue',
        ["[field is not text]"] * 2 + ["[not a JSON object]"],
    ),
    ("a.jsonl", '{"text": "a\u2028b\x85c"}'.encode(), ["a\u2028b\x85c"]),
    ("a.txt", b"one\rtwo", ["one\rtwo"]),
    ("a.json", b"", ["[empty file]"]),
    ("a.json", b"[]", ["[file without records]"]),
    ("a.json", b" \n", ["[file without records]"]),
    ("a.csv", b"", ["[empty file]"]),
    ("a.csv", b"text\n", ["[file without records]"]),
    ("a.tar", tar([]), ["[file without records]"]),
    ("a.jsonl.gz", gzip.compress(b""), ["[file without records]"]),
    ("a.txt.gz", gzip.compress(b""), ["[empty document]"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), GIVES)
def test_a_file_gives_what_it_holds(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert seen(read(tmp_path / name)) == expected


def test_parquet_without_rows_is_counted(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert seen(read(tmp_path / "a.parquet")) == ["[file without records]"]


BAD_TEXT: dict[str, Callable[[], bytes]] = {
    "a.tar": lambda: tar([("a.txt", b"ok"), ("b.txt", b"\xe9"), ("c.txt", b"n\0")]),
    "a.csv": lambda: b"id,text\n1,ok\n2,\xe9\n3,n\0\n",
    "a.tsv": lambda: b"id\ttext\n1\tok\n2\t\xe9\n3\tn\0\n",
    "a.parquet": lambda: parquet([b"ok", b"\xe9", b"n\0"]),
    "a.jsonl": lambda: b'{"text": "ok"}\n{"text": "\xe9"}\n{"text": "n\\u0000"}\n',
    "a.json": lambda: b'[{"text": "ok"}, {"text": "\xe9"}, {"text": "n\\u0000"}]',
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_every_format_follows_the_policy_for_bad_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD_TEXT[name]())
    with pytest.raises(DataError, match=r"(:|row|record|sample) ?'?(2|3|b)'?: not UTF-8 at byte"):
        read(tmp_path / name)
    assert seen(read(tmp_path / name, "replace")) == ["ok", "\ufffd", "n\ufffd"]
    assert seen(read(tmp_path / name, "skip")) == ["ok", "[not UTF-8]", "[NUL bytes]"]


@pytest.mark.parametrize("policy", POLICIES)
def test_halves_of_pairs_written_as_bytes_are_no_utf8(tmp_path: Path, policy: BadText) -> None:
    """CESU-8, as some databases write it; and an overlong slash."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}\n{"text": "\xc0\xaf"}\n')
    if policy == "strict":
        with pytest.raises(DataError, match=r"a\.jsonl:1: not UTF-8 at byte offset 10 \(byte 0xed"):
            read(path)
        return
    expected = {"replace": ["\ufffd" * 6, "\ufffd" * 2], "skip": ["[not UTF-8]"] * 2}[policy]
    assert seen(read(path, policy)) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("nothing"), r"x\.txt is a link to nothing; mend or remove"),
        (lambda path: path.symlink_to("x.txt"), r"x\.txt is a link to nothing; mend or remove"),
        (os.mkfifo, r"x\.txt is not a regular file; write its text to a file first"),
    ],
    ids=["dangling", "loop", "pipe"],
)
def test_what_a_folder_holds_is_never_left_out_in_silence(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    make(tmp_path / "x.txt")
    with pytest.raises(DataUsageError, match=message):
        find_files([str(tmp_path)])


def test_a_link_to_a_file_that_is_named_too_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.txt")
    with pytest.raises(DataUsageError, match=r"b\.txt, which is the same file as .*a\.txt"):
        find_files([str(tmp_path)])


def find_as_nobody(pipe: Connection, folder: str) -> None:
    """What is refused to a user without rights; root would read everything."""
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        find_files([folder])
        pipe.send("not refused")
    except DataUsageError as error:
        pipe.send(str(error))


def test_a_file_that_may_not_be_read_is_refused() -> None:
    # Not below pytest's own folder, which belongs to its user alone.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "a.txt").write_text("text")
        Path(folder, "a.txt").chmod(0)
        here, there = processes.Pipe()
        reader = processes.Process(target=find_as_nobody, args=(there, folder))
        reader.start()
        assert here.poll(60), "no answer"
        assert re.search(r"a\.txt cannot be read: permission denied", here.recv())
        reader.join()


@pytest.mark.parametrize(
    "name", [b"caf\xe9.txt", b"two\nlines.txt", b" .txt", "\u6587.txt".encode()]
)
def test_a_file_of_any_name_is_prepared(tmp_path: Path, name: bytes) -> None:
    """On Linux a name is bytes; input that may only be read is read."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / os.fsdecode(name)
    path.write_text(prose(3000))
    path.chmod(0o444)
    folder.chmod(0o555)
    config = PrepareConfig(vocab_size=320, id_field="id")
    prepare([str(folder)], tmp_path / "out", config, workers=1)
    assert prepare([str(folder)], tmp_path / "out", config, workers=1).was_complete
    folder.chmod(0o755)


def test_input_without_any_record_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.csv").write_text("text\n")
    inputs = [str(tmp_path / name) for name in ("a.json", "b.csv")]
    with pytest.raises(DataUsageError, match=r"holds no text \(2 file without records\)"):
        prepare(inputs, tmp_path / "out", PrepareConfig(), workers=1)
