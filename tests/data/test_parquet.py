"""Parquet files give rows of any column; what is damaged or no text is named by its row."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.config import DataError, DataUsageError
from data.readers import Reading
from tests.data.files import TEXTS, bad, parquet, read, texts, write


def test_parquet_gives_rows_of_plain_dictionary_and_nested_columns(tmp_path: Path) -> None:
    many = [f"{i} {TEXTS[i % 4]}" for i in range(1000)]
    nested = [{"body": {"text": text}} for text in many]
    columns = {"n": list(range(1000)), "text": many, "doc": nested, "a.b": many}
    columns["category"] = pyarrow.array(many).dictionary_encode()
    path = parquet(tmp_path / "a.parquet", columns, row_group_size=300, compression="zstd")
    for field in ("text", "category", "doc.body.text", "a.b"):
        assert texts(read(path, field)) == many, field
    for field, message in (
        ("body", "no column 'body'; its columns are 'n', 'text', 'doc'"),
        ("doc.title", "no column 'doc.title'; in 'doc' its columns are 'body'"),
        ("n", "column 'n' holds int64, not text"),
    ):
        with pytest.raises(DataUsageError, match=message):
            read(path, field)


def test_a_parquet_file_that_is_cut_or_damaged_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": TEXTS * 50}, write_page_checksum=True)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:30] + b"\0\1" + whole[32:]):
        with pytest.raises(DataError, match=r"a\.parquet: damaged or cut off after row"):
            read(write(path, damaged))


def test_parquet_values_that_are_no_text_are_named(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    path = parquet(tmp_path / "a.parquet", {"text": raw})
    with pytest.raises(DataError, match=r"a\.parquet, row 2: not UTF-8 at byte offset 3"):
        read(path)
    (null, empty) = bad(read(parquet(path, {"text": ["a", None, ""]})))
    assert (null.reason, null.detail, empty.reason) == (
        "field is not text",
        "got null",
        "empty document",
    )


def test_a_parquet_id_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    ids = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"x\xff")]
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "id": ids}), tmp_path / "a.parquet"
    )
    message = r"a\.parquet, row 2: its id, in column 'id', is not UTF-8 \(invalid start byte at byt"
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet", Reading(id_field="id"))
