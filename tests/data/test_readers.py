"""Files, folders and patterns become documents; what cannot be read is named exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataError, DataUsageError
from data.readers import (
    Document,
    Dropped,
    Extent,
    InputFile,
    cut_parts,
    find_files,
    line_number,
    read_extent,
)


def read(path: Path, *, field: str = "text", part_bytes: int = 2**20) -> list[Document | Dropped]:
    files = find_files([str(path)])
    parts = cut_parts(files, part_bytes)
    return [item for part in parts for extent in part for item in read_extent(extent, field)]


def texts(items: list[Document | Dropped]) -> list[str]:
    return [item.text.decode() for item in items if isinstance(item, Document)]


def reasons(items: list[Document | Dropped]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Dropped)]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_folder_is_read_recursively_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.md", "c.jsonl", ".hidden.txt", ".git/x.txt", "a.txt"):
        write(tmp_path / "corpus" / name, "x")
    names = [file.name for file in find_files([str(tmp_path / "corpus")])]
    expected = ["a.txt", "a/y.md", "a/z.txt", "b.txt", "c.jsonl"]
    assert names == [f"corpus/{name}" for name in expected]


def test_inputs_keep_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    second, first = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    assert [file.name for file in find_files([str(first), str(second)])] == ["b.txt", "a.txt"]


def test_a_pattern_matches_sorted_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        write(tmp_path / name, "x")
    assert [f.name for f in find_files([str(tmp_path / "*.txt")])] == ["a.txt", "b.txt"]
    found = find_files([str(tmp_path / "**" / "*.txt")])
    assert [f.name for f in found] == ["a.txt", "b.txt", "c.txt"]


def test_a_pattern_matches_folders_beside_files_as_the_shell_would(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/more/c.txt", "z.txt", "deep.md"):
        write(tmp_path / name, "x")
    (tmp_path / "empty").mkdir()
    found = [file.name for file in find_files([str(tmp_path / "*")])]
    assert found == ["a.txt", "deep/more/c.txt", "deep.md", "z.txt"]
    assert sorted(f.name for f in find_files([str(tmp_path / "**")])) == sorted(
        ["a.txt", "c.txt", "deep.md", "z.txt"]
    )


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "notes[1].txt", "x")
    assert [file.path for file in find_files([str(path)])] == [path]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "a.txt", "x")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    write(tmp_path / "other" / "b.txt", "y")
    (tmp_path / "corpus" / "other").symlink_to(tmp_path / "other")
    names = [file.name for file in find_files([str(tmp_path / "corpus")])]
    assert names == ["corpus/a.txt", "corpus/other/b.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", r"--input .*none\.txt: no such file or folder \(looked in "),
        ("*.csv", r"--input .*\*\.csv: no file matches this pattern"),
        ("empty", r"--input .*empty: the folder holds no files"),
        ("a.txt.lz4", r"a\.txt\.lz4: files ending in \.lz4 cannot be read; unpack or convert it"),
    ],
)
def test_an_input_that_cannot_be_read_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "a.txt.lz4", b"\x04\x22")
    with pytest.raises(DataUsageError, match=message):
        find_files([str(tmp_path / name)])


def test_no_input_is_refused() -> None:
    with pytest.raises(DataUsageError, match="no input given"):
        find_files([])


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(DataUsageError, match=r"same file as .* would count twice: name it once"):
        find_files([str(tmp_path), str(path)])


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    content = "first\r\n\n  tab\tand nul \0 and \u4e2d\u6587\n"
    assert texts(read(write(tmp_path / "a.txt", content))) == [content]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))) == ["hello"]
    assert texts(read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hi"}'))) == ["hi"]


def test_json_lines_give_the_chosen_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.JSONL", '{"body": "one", "text": "no"}\n\n{"body": "two\\n"}')
    items = read(path, field="body")
    assert texts(items) == ["one", "two\n"]
    assert reasons(items) == ["blank line"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"text": "a', "broken JSON", "Unterminated string starting at (column 10)"),
        ("[" * 100_000, "broken JSON", "recursion"),
        ('["text"]', "not a JSON object", "got list"),
        ('{"body": "x", "title": "y"}', "missing field", "its keys are 'body', 'title'"),
        ("{}", "missing field", "its keys are none"),
        ('{"text": null}', "field is not text", "got NoneType"),
        ('{"text": "a\\ud800b"}', "lone surrogate", r"\ud800 is half of a pair"),
    ],
)
def test_a_bad_line_says_what_is_wrong(tmp_path: Path, line: str, reason: str, detail: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n{{"text": "too"}}\n')
    items = read(path)
    assert texts(items) == ["good", "too"]
    (dropped,) = (item for item in items if isinstance(item, Dropped))
    assert (dropped.reason, dropped.is_bad) == (reason, True)
    assert detail in dropped.detail
    assert line_number(dropped.file, dropped.offset) == 2


def test_a_pair_of_surrogate_escapes_is_one_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}')
    assert texts(read(path)) == ["\U0001f600"]


def test_nothing_empty_is_a_document(tmp_path: Path) -> None:
    assert reasons(read(write(tmp_path / "a.txt", ""))) == ["empty file"]
    assert reasons(read(write(tmp_path / "a.jsonl", ""))) == ["empty file"]
    assert reasons(read(write(tmp_path / "b.txt", b"\xef\xbb\xbf"))) == ["empty document"]
    assert reasons(read(write(tmp_path / "b.jsonl", '{"text": ""}'))) == ["empty document"]


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"good \xff")
    message = rf"{re.escape(str(path))}: not UTF-8 at byte offset 5 \(byte 0xff, .*iconv -f LATIN1"
    with pytest.raises(DataError, match=message):
        read(path)
    path = write(tmp_path / "b.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: not UTF-8 at byte offset 27 \(byte 0xe9"):
        read(path)
    with pytest.raises(DataError, match="iconv -f UTF-16 -t UTF-8"):
        read(write(tmp_path / "c.txt", "text".encode("utf-16")))


@given(
    lines=st.lists(st.text(max_size=30), max_size=12),
    part_bytes=st.integers(1, 60),
    ends=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_of_any_size_give_every_line_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], part_bytes: int, ends: bool
) -> None:
    lines = [line.encode(errors="replace").decode() + "." for line in lines]
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    write(path, content + ("\n" if ends and lines else ""))
    items = read(path, part_bytes=part_bytes)
    assert texts(items) == lines
    offsets = [item.offset for item in items if isinstance(item, Document)]
    assert [line_number(find_files([str(path)])[0], at) for at in offsets] == list(
        range(1, len(lines) + 1)
    )


def test_parts_follow_the_bytes_and_keep_texts_whole() -> None:
    files = [
        InputFile(Path("a.txt"), "a.txt", 30),
        InputFile(Path("b.txt"), "b.txt", 250),
        InputFile(Path("c.jsonl"), "c.jsonl", 230),
        InputFile(Path("d.txt"), "d.txt", 0),
    ]
    a, b, c, d = files
    assert cut_parts(files, 100) == [
        (Extent(a, 0, 30),),
        (Extent(b, 0, 250),),
        (Extent(c, 0, 100),),
        (Extent(c, 100, 200),),
        (Extent(c, 200, 230), Extent(d, 0, 0)),
    ]
