"""Parquet files as documents: one text column, row by row. The only module that imports pyarrow.

Memory: the pages of a row group's text column. A file that is cut or damaged is a DataError; pages
that carry a checksum are held against it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data.config import DataError, DataUsageError
from data.documents import Document, Dropped, InputFile, Reading, as_id

_ROWS = 256


def read_parquet(file: InputFile, reading: Reading) -> Iterator[Document | Dropped]:
    """Every row's text in order; its offset is the number of the row."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataUsageError(
            "reading .parquet files needs the package pyarrow; install it with "
            f"{sys.executable} -m pip install pyarrow"
        ) from None
    if file.compression is not None:
        raise DataUsageError(f"{file.path}: parquet is packed inside already; unpack the file")
    index = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as table:
            _check_column(table.schema_arrow, file, reading)
            column, id_column = reading.text_field, _id_column(table.schema_arrow, reading)
            columns = [column, id_column] if id_column else [column]
            for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
                ids = _values(pa, batch, id_column) if id_column else None
                for at, value in enumerate(_values(pa, batch, column).cast(pa.large_binary())):
                    item = _row(value.as_py(), file, reading, index)
                    if ids is not None and isinstance(item, Document):
                        item = replace(item, id=_id(ids[at], file, reading, index))
                    yield item
                    index += 1
            expected = table.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path}: damaged or cut off after row {index} ({str(error).splitlines()[0]}); "
            "fetch or write the file again"
        ) from None
    if index != expected:
        raise DataError(f"{file.path}: {index} rows of {expected}; the file is damaged")


def _check_column(schema: Any, file: InputFile, reading: Reading) -> None:
    import pyarrow as pa

    at: Any = schema
    walked: list[str] = []
    keys = [reading.text_field] if reading.text_field in schema.names else None
    for key in keys or reading.text_field.split("."):
        names = [at.field(i).name for i in range(_num_fields(pa, at))]
        if names.count(key) != 1:
            inside = f"in {'.'.join(walked)!r} " if walked else ""
            raise DataUsageError(
                f"{file.path}: no column {reading.text_field!r}; {inside}its columns are "
                f"{', '.join(map(repr, names[:20])) or 'none'}: name the one that holds the text "
                "with --text-field"
            )
        at = at.field(names.index(key)).type
        walked.append(key)
    if pa.types.is_dictionary(at):
        at = at.value_type
    if not any(
        test(at)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_string_view,
            pa.types.is_binary_view,
        )
    ):
        raise DataUsageError(f"{file.path}: column {reading.text_field!r} holds {at}, not text")


def _num_fields(pa: Any, at: Any) -> int:
    if isinstance(at, pa.Schema):
        return len(at.names)
    return at.num_fields if pa.types.is_struct(at) else 0


def _id_column(schema: Any, reading: Reading) -> str:
    """The column of ids, where the file has it; else its rows are named by their place."""
    import pyarrow as pa

    at: Any = schema
    keys = [reading.id_field] if reading.id_field in schema.names else reading.id_field.split(".")
    for key in keys:
        names = [at.field(i).name for i in range(_num_fields(pa, at))]
        if names.count(key) != 1:
            return ""
        at = at.field(names.index(key)).type
    return reading.id_field


def _id(value: Any, file: InputFile, reading: Reading, index: int) -> str:
    try:
        return as_id(value.as_py())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path}, row {index + 1}: its id, in column {reading.id_field!r}, is not UTF-8 "
            f"({error.reason} at byte {error.start}); mend the column, or leave out --id-field"
        ) from None


def _values(pa: Any, batch: Any, column: str) -> Any:
    """The values of a column. Text is cast from them: it may be no UTF-8, which is our policy's."""
    import pyarrow.compute as pc

    if column in batch.schema.names:
        values = batch.column(column)
    else:
        first, *inner = column.split(".")
        values = pc.struct_field(batch.column(first), inner)
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _row(value: bytes | None, file: InputFile, reading: Reading, index: int) -> Document | Dropped:
    where = f"{file.path}, row {index + 1}"
    if value is None:
        return Dropped(file, index, "field is not text", "got null", where=where)
    return reading.document(value, file, index, where)
