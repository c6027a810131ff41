"""Rows of .csv and .tsv files: one reader, so that one limit holds for a field everywhere."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import TYPE_CHECKING

from data.documents import MAX_RECORD_BYTES

if TYPE_CHECKING:
    from _csv import Reader

TableError = csv.Error


def table_rows(lines: Iterable[str], dialect: str = "excel", *, strict: bool = True) -> Reader:
    """The rows of `lines`, a list of fields each; raises TableError where the quotes are broken."""
    # The vendor's limit is 128 KiB and one for the whole process: whoever reads sets it again.
    csv.field_size_limit(MAX_RECORD_BYTES)
    return csv.reader(lines, dialect=dialect, strict=strict)
