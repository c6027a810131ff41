"""Text that is no UTF-8: strict names it, replace and skip count it, in every format alike."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data.config import DataError, DataUsageError, PrepareConfig
from data.prepare import prepare
from data.readers import Document, Dropped, Reading, cut_parts, find_files, read_extent
from tests.data.texts import prose

KEPT = [
    ("a.txt", b"\xef\xbb\xbfafter a mark", ["after a mark"]),
    ("a.txt", b"one\r\ntwo\r\n", ["one\r\ntwo\r\n"]),
    ("a.txt", b"no newline at the end", ["no newline at the end"]),
    ("a.txt", b"a \0 in text is kept", ["a \0 in text is kept"]),
    ("a.txt", b"<s> </s> <unk> \xe2\x96\x81 are text", ["<s> </s> <unk> \u2581 are text"]),
    ("a.txt", b" \n\t\n", [" \n\t\n"]),
    ("a.jsonl", b'{"text": "one"}\r\n\r\n{"text": "two"}', ["one", "two"]),
    ("a.jsonl", b'{"text": "a", "n": NaN, "text": "the last wins"}', ["the last wins"]),
    ("a.jsonl", b'{"text": "\\u0000"}', ["\0"]),
    ("a.csv", b"text\r\none\r\ntwo", ["one", "two"]),
    ("d\u00e9j\u00e0 vu.txt", b"a name of any letters", ["a name of any letters"]),
]

# name, content, what strict says, and the texts under replace and under skip
POLICY = [
    ("a.txt", b"caf\xe9!", r"a\.txt: not UTF-8 at byte offset 3 .*iconv -f LATIN1", ["caf\ufffd!"]),
    ("a.txt", b"cut \xe4\xb8", "not UTF-8 at byte offset 4 .*unexpected end", ["cut \ufffd"]),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', r"a\.jsonl:2: not UTF-8", ["x", "\ufffd"]),
    ("a.json", b'[{"text": "x"}, {"text": "\xe9"}]', r"a\.json, record 2: not", ["x", "\ufffd"]),
    ("a.csv", b"text\nx\n\xe9\n", r"a\.csv:3: not UTF-8", ["x", "\ufffd"]),
    ("a.txt.gz", gzip.compress(b"\xe9"), r"a\.txt\.gz \(unpacked\): not UTF-8", ["\ufffd"]),
]


def read(path: Path, policy: str) -> list[Document | Dropped]:
    reading = Reading("text", policy)  # type: ignore[arg-type]
    parts = cut_parts(find_files([str(path)]), 2**20)
    return [item for part in parts for extent in part for item in read_extent(extent, reading)]


def texts(items: list[Document | Dropped]) -> list[str]:
    return [item.text.decode() for item in items if isinstance(item, Document)]


@pytest.mark.parametrize(("name", "content", "expected"), KEPT)
def test_what_is_text_is_kept_as_it_is(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(read(tmp_path / name, "strict")) == expected


@pytest.mark.parametrize(("name", "content", "message", "replaced"), POLICY)
def test_the_policy_for_bytes_that_are_no_utf8(
    tmp_path: Path, name: str, content: bytes, message: str, replaced: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path, "strict")
    items = read(path, "replace")
    assert texts(items) == replaced
    assert [item.replaced for item in items if isinstance(item, Document)][-1] == 1
    items = read(path, "skip")
    assert texts(items) == [text for text in replaced if "\ufffd" not in text]
    (dropped,) = (item for item in items if isinstance(item, Dropped))
    assert (dropped.reason, dropped.is_bad) == ("not UTF-8", False)


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE"])
def test_utf16_is_named_and_never_replaced(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("plain words of text".encode(encoding))
    for policy in ("strict", "replace"):
        with pytest.raises(DataError, match=f"iconv -f {encoding} -t UTF-8 a.txt > utf8-a.txt"):
            read(path, policy)
    assert texts(read(path, "skip")) == []


def test_nul_and_half_pairs_follow_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a\\u0000"}\n{"text": "b\\ud800\\ud800"}\n{"text": "\\ud83d\\ude00"}\n'
    )
    strict = read(path, "strict")
    assert texts(strict) == ["a\0", "\U0001f600"]
    (half,) = (item for item in strict if isinstance(item, Dropped))
    assert (half.reason, half.is_bad) == ("lone surrogate", True)
    replaced = [item for item in read(path, "replace") if isinstance(item, Document)]
    assert texts([*replaced]) == ["a\ufffd", "b\ufffd\ufffd", "\U0001f600"]
    assert [item.replaced for item in replaced] == [1, 2, 0]
    skipped = read(path, "skip")
    assert texts(skipped) == ["\U0001f600"]
    assert [item.reason for item in skipped if isinstance(item, Dropped)] == [
        "NUL bytes",
        "lone surrogate",
    ]
    (tmp_path / "b.txt").write_bytes(b"x\0\xff")
    (only,) = read(tmp_path / "b.txt", "replace")
    assert isinstance(only, Document) and only.replaced == 2
    assert only.text.decode() == "x\ufffd\ufffd"


def test_a_preparation_says_what_the_policy_did(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    # The long text is a part of its own, whose runs must not be read by their bytes in the file.
    (corpus / "a.txt").write_bytes(b"caf\xe9 " + prose(60_000).encode() + b" caf\xe9")
    lines = [json.dumps({"text": prose(300, seed=seed)}).encode() for seed in range(20)]
    (corpus / "b.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "\xff"}']))
    settings = {"vocab_size": 400, "val_fraction": 0.2, "part_bytes": 8000}
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 .*accept it with --on-bad-text"):
        prepare([str(corpus)], tmp_path / "no", PrepareConfig(**settings), workers=1)
    config = PrepareConfig(**settings, on_bad_text="replace")
    summary = prepare([str(corpus)], tmp_path / "replaced", config, workers=1)
    assert "2 of 22 documents hold U+FFFD in place of bytes" in " ".join(summary.warnings)
    stored = sum(summary.manifest.counts[f"text_bytes_{side}"] for side in ("train", "val"))
    expected = [read(corpus / name, "replace") for name in ("a.txt", "b.jsonl")]
    assert stored == sum(len(text.encode()) for items in expected for text in texts(items))
    config = PrepareConfig(**settings, on_bad_text="skip")
    summary = prepare([str(corpus)], tmp_path / "skipped", config, workers=1)
    assert "2 documents or lines were skipped (--on-bad-text skip): 2 not UTF-8" in (
        " ".join(summary.warnings)
    )
    assert summary.manifest.preparation["dropped"] == {"not UTF-8": 2}
    with pytest.raises(DataUsageError, match="--on-bad-text: was skip, is replace"):
        config = PrepareConfig(**settings, on_bad_text="replace")
        prepare([str(corpus)], tmp_path / "skipped", config, workers=1)
