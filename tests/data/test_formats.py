"""Every format gives its documents from any packing; damage and bad records are named exactly."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataError
from data.formats import _values
from data.readers import InputFile, find_files
from tests.data.files import FORMATS, PACK, TEXTS, bad, read, tar, texts, write
from tests.data.texts import prose


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_every_packing(tmp_path: Path, name: str, suffix: str) -> None:
    items = read(write(tmp_path / (name + suffix), PACK[suffix](FORMATS[name])))
    assert texts(items) == TEXTS
    assert bad(items) == []
    offsets = [item.offset for item in items]
    assert offsets == sorted(set(offsets)), "a document is known by its offset"


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_a_packed_text_is_one_document_over_all_members(tmp_path: Path, suffix: str) -> None:
    text = prose(300_000)
    half = len(text) // 2
    members = [PACK[suffix](part.encode()) for part in (text[:half], "", text[half:])]
    for name in ("a.txt", "notes"):
        path = write(tmp_path / (name + suffix), b"".join(members))
        assert texts(read(path)) == [text]


def test_a_skippable_zstd_frame_and_zeros_after_gzip_are_no_text(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    frame = PACK[".zst"](b"text")
    path = write(tmp_path / "a.txt.zst", skippable + frame + skippable + frame)
    assert texts(read(path)) == ["texttext"]
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"one") + bytes(1000) + gzip.compress(b"two"))
    assert texts(read(path)) == ["onetwo"]


@pytest.mark.parametrize("suffix", list(PACK)[1:])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tar"])
def test_a_cut_packed_file_is_never_silently_short(tmp_path: Path, name: str, suffix: str) -> None:
    whole = PACK[suffix](FORMATS.get(name, b"some text of its own, and then some more"))
    rng = random.Random(0)
    for cut in [1, 5, len(whole) - 1, *rng.sample(range(2, len(whole) - 1), 12)]:
        path = write(tmp_path / (name + suffix), whole[:cut])
        with pytest.raises(DataError, match=r"is cut off|begins with|damaged") as refused:
            read(path)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_a_damaged_packed_file_is_named_or_reads_the_same(tmp_path: Path, suffix: str) -> None:
    text = prose(3000)
    whole = PACK[suffix](text.encode())
    rng = random.Random(1)
    refusals = 0
    for _ in range(40):
        at = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path = write(tmp_path / ("a.txt" + suffix), bytes(damaged))
        try:
            # A gzip header holds a time and a name, which nobody misses.
            assert texts(read(path)) == [text]
        except DataError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals >= 30


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(values=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 1]), ascii_=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_list_is_cut_where_the_json_parser_cuts_it(
    values: list[object], indent: int | None, ascii_: bool
) -> None:
    raw = json.dumps(values, indent=indent, ensure_ascii=ascii_).encode(errors="replace")
    file = InputFile(Path("a.json"), "a.json", len(raw))

    class Dripping(io.BytesIO):
        """A stream that gives a few bytes at a time, as a slow pipe does."""

        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(3)

    for stream in (io.BytesIO(raw), Dripping(raw)):
        assert [json.loads(value) for value in _values(stream, file)] == json.loads(raw)


BAD_RECORDS = [
    ("a.json", '[{"text": "a"}, {"text": 1}, 7]', ", record 2", "field is not text", "got int"),
    ("a.json", '[{"text": "a"}, {oops}]', ", record 2", "broken JSON", "property name"),
    ("a.json", '[{"text": "a"}, "b"]', ", record 2", "not a JSON object", "got str"),
    ("a.jsonl.gz", '{"text": "a"}\n{oops\n', ":2", "broken JSON", "property name"),
    ("a.csv", "id,text\n1,a\n\n2,b,c\n", ":4", "wrong number of fields", "3 fields under 2"),
    ("a.csv", 'id,text\n1,"a\nb"\n2\n', ":4", "wrong number of fields", "1 fields under 2"),
]


@pytest.mark.parametrize(("name", "content", "place", "reason", "detail"), BAD_RECORDS)
def test_a_bad_record_is_placed(
    tmp_path: Path, name: str, content: str, place: str, reason: str, detail: str
) -> None:
    raw = content.encode()
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
    items = read(path)
    first = next(item for item in bad(items) if item.is_bad)
    assert (first.place, first.reason) == (f"{path}{place}", reason)
    assert detail in first.detail
    assert len(texts(items)) == 1


REFUSED_FILES = [
    ("a.json", b'[{"text": "a"}, {"text": "b', "is cut off in record 2"),
    ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', "more follows the list of 1 records"),
    ("a.csv", b"body,title\na,b\n", "a.csv:1: no column 'text'; its columns are 'body', 'title'"),
    ("a.csv", b"text,text\na,b\n", "2 columns are called 'text'"),
    ("a.csv", b'text\na\n"open\nb\nc\n', r"a\.csv:3: the row that begins here is broken"),
    ("a.tsv", b'text\n"a"b\n', r"a\.tsv:2: the row that begins here is broken"),
    ("a.csv", b"text\ngood\ncaf\xe9\n", r"a\.csv:3: not UTF-8 at byte offset 3 \(byte 0xe9"),
    ("a.csv", "text\nx\n".encode("utf-16"), r"a\.csv:1: not UTF-8 .*iconv -f UTF-16 -t"),
    ("a.json", '[{"text": "x"}]'.encode("utf-16"), r"not UTF-8 .*iconv -f UTF-16 -t"),
    ("a.csv.gz", gzip.compress(b""), "no header; its first line must name the columns"),
    ("a.csv", b"\n", "no header; its first line must name the columns"),
    ("a.tar", b"no archive" * 200, "the archive is damaged or cut off after 0 samples"),
    ("a.tar", FORMATS["a.tar"][:2048], "after 2 samples without its end mark"),
    ("a.tar", FORMATS["a.tar"][:1300], "after 1 samples without its end mark"),
    ("a.tar", FORMATS["a.tar"][:700], "the archive is damaged or cut off after 0 samples"),
    ("a.tar", FORMATS["a.tar"] * 2, "after 4 samples, .* another archive begins"),
    ("a.tar", FORMATS["a.tar"].replace(b"train/2", b"train/X"), "its header is damaged"),
    ("a.tar", tar([("a.txt", b"x"), ("a.txt", b"y")]), "two members .txt"),
    ("a.jsonl.gz", b"", "is empty: 0 bytes are no gzip file"),
    ("a.jsonl.zst", b"", "is empty: 0 bytes are no zstd file"),
    ("a.jsonl.gz", b'{"text": "a"}\n', "named like gzip but begins with 7b 22 74 65"),
    ("a.jsonl.gz", PACK[".zst"](b"x"), "named like gzip but .* which is zstd; rename it"),
    ("a.txt.bz2", bz2.compress(b"x") + b"junk", "damaged bzip2 data"),
    ("a.txt.xz", lzma.compress(b"x") + b"some junk" * 9, "damaged xz data"),
    ("a.txt.xz", lzma.compress(b"x") + bytes(3), "3 bytes of padding follow a stream of xz"),
    ("a.txt.xz", (lzma.compress(b"x") + bytes(5)) * 2, "5 bytes of padding follow a stream of xz"),
    ("a.txt.gz", gzip.compress(b"x") + b"junk", "damaged gzip data"),
    ("a.txt.zst", PACK[".zst"](b"x") + b"junk", "damaged zstd data"),
    ("a.txt.gz", gzip.compress(b"caf\xe9"), r"\(unpacked\): not UTF-8 at byte offset 3"),
    ("a.parquet", b"", "damaged or cut off"),
    ("a.parquet", b"PAR1 cut", "damaged or cut off after row 0"),
    ("a.txt", gzip.compress(b"x"), "is gzip by its first bytes, although its name"),
    ("a.csv", b"PK\x03\x04rest", "is zip by its first bytes"),
    ("a.txt", FORMATS["a.tar"], "is tar by its first bytes"),
    ("a.zip.gz", gzip.compress(b"x"), r"files ending in \.zip cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED_FILES)
def test_a_file_that_is_not_what_it_says_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt.gz", "a.tar"])
def test_a_record_beyond_the_limit_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is 1 GiB; a small one is set here so that the test needs no such file."""
    for module in ("formats", "readers", "tables"):
        monkeypatch.setattr(f"data.{module}.MAX_RECORD_BYTES", 90)
    monkeypatch.setattr("data.formats._BLOCK", 16)
    long = "x" * 100
    raw = FORMATS[name.removesuffix(".gz")] if name == "a.csv" else b'{"text": "ok"}\n'
    raw += {"a.json": '{"text": "', "a.txt.gz": ""}.get(name, "").encode() + long.encode()
    raw = tar([("a.txt", long.encode())]) if name == "a.tar" else raw
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(DataError, match=r"more than 0 GiB|has 100 bytes"):
        read(path)


def test_json_nested_too_deeply_is_a_bad_record(tmp_path: Path) -> None:
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    items = read(write(tmp_path / "a.json", deep + b'{"text": "b"}\n'))
    assert texts(items) == ["b"]
    assert [item.reason for item in bad(items)] == ["broken JSON"]


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")]
)
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, name: str, package: str
) -> None:
    path = write(tmp_path / name, PACK[".zst"](b"x") if name.endswith(".zst") else b"PAR1")
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from data.readers import cut_parts, find_files, read_extent\n"
        f"list(read_extent(cut_parts(find_files([{str(path)!r}]), 9)[0][0]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"needs the package {package}; install it with {sys.executable} -m pip" in done.stderr


@pytest.mark.parametrize("name", ["package.json", "numbers.csv", "names.tsv"])
def test_below_a_folder_data_files_are_text_as_in_a_code_tree(tmp_path: Path, name: str) -> None:
    content = '[{"name": "x"}]\n'
    path = write(tmp_path / name, content)
    assert texts(read(tmp_path)) == [content]
    (file,) = find_files([str(tmp_path / f"*{path.suffix}")])
    assert file.format != "text", "a suffix that a person wrote is meant"
    assert find_files([str(tmp_path / "*")])[0].format == "text"


def test_a_nested_field_is_found_and_its_absence_explained(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        '{"a": {"b": {"text": "deep"}}}\n{"a.b.text": "flat"}\n{"a": {"c": 1}}\n{"a": 5}\n{}\n',
    )
    items = read(path, "a.b.text")
    assert texts(items) == ["deep", "flat"]
    assert [item.detail for item in bad(items)] == [
        "in 'a' the keys are 'c'",
        "'a' holds int, not an object",
        "its keys are none",
    ]
