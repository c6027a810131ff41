"""Files of every format and packing for tests, and what the readers make of them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from data.readers import Document, Dropped, Reading, cut_parts, find_files, read_extent

TEXTS = ["one", 'two "quoted", with comma', "three\nlines\r\n\there", "\u4e2d\u6587 \U0001f600"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def read(path: Path, reading: Reading | str = "text") -> list[Document | Dropped]:
    parts = cut_parts(find_files([str(path)]), 2**20)
    return [item for part in parts for extent in part for item in read_extent(extent, reading)]


def texts(items: list[Document | Dropped]) -> list[str]:
    return [item.text.decode() for item in items if isinstance(item, Document)]


def bad(items: list[Document | Dropped]) -> list[Dropped]:
    return [item for item in items if isinstance(item, Dropped)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS))])
    return out.getvalue().encode()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def records(**more: object) -> list[dict[str, object]]:
    return [{"text": text, **more} for text in TEXTS]


def parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


FORMATS: dict[str, bytes] = {
    "a.jsonl": "".join(json.dumps(x) + "\n" for x in records()).encode(),
    "a.ndjson": b"\xef\xbb\xbf" + "\r\n".join(json.dumps(x) for x in records()).encode(),
    "a.json": json.dumps(records(meta={"tags": ["]", "}", "\\"]}), indent=2).encode(),
    "lines.json": "".join(json.dumps(x) + "\n" for x in records()).encode(),
    "objects.json": "\n".join(json.dumps(x, indent=1) for x in records()).encode(),
    "a.csv": b"\xef\xbb\xbf" + table(","),
    "a.tsv": table("\t"),
    "a.tar": tar([(f"train/{i}.txt", text.encode()) for i, text in enumerate(TEXTS)]),
    "b.tar": tar([(f"{i}.json", json.dumps(x).encode()) for i, x in enumerate(records())]),
}
