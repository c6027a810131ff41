"""Examples from files: nothing is dropped, refusals name their line, the text decides the split."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataError, DataUsageError
from data.instruct import Example, hold_out, order, read_examples, sorted_labels

COLUMNS = {"data.text_column": "text", "data.label_column": "label"}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_and_csv_give_the_same_examples(tmp_path: Path) -> None:
    rows = [("one, two", "a"), ('say "no"', "b"), ("line\nbreak \u2028 kept", "a"), ("\u4e2d", "c")]
    lines = [json.dumps({"label": label, "text": text}) for text, label in rows]
    quoted = ['"' + text.replace('"', '""') + '",' + label for text, label in rows]
    jsonl = write(tmp_path, "a.jsonl", "\ufeff" + "\n".join(lines) + "\n\n")
    table = write(tmp_path, "a.csv", "\ufefftext,label\r\n" + "\r\n".join(quoted) + "\r\n\r\n")
    expected = [Example(text, label) for text, label in rows]
    assert read_examples(jsonl, COLUMNS) == expected
    assert read_examples(table, COLUMNS) == expected


def test_raw_line_separators_inside_json_strings_do_not_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a\u2028b\u0085c", "label": "x"}\n')
    assert read_examples(path, COLUMNS) == [Example("a\u2028b\u0085c", "x")]


def test_labels_may_be_numbers_and_truth_values(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "t", "label": label}) for label in (10, 9, True)]
    examples = read_examples(write(tmp_path, "a.jsonl", "\n".join(lines)), COLUMNS)
    assert [example.target for example in examples] == ["10", "9", "true"]


def test_a_text_longer_than_the_csv_modules_own_limit_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\n" + "x" * 200_000 + ",a\n")
    assert len(read_examples(path, COLUMNS)[0].text) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "t", "label": "a"}\n{"body": "t", "category": "a"}\n',
            r"a\.jsonl:2: no column 'text'; the columns are 'body', 'category'; "
            r"choose one with data\.text_column=NAME",
        ),
        (
            "a.csv",
            "text,category\nt,a\n",
            r"a\.csv:1: no column 'label'; the columns are 'text', 'category'; "
            r"choose one with data\.label_column=NAME",
        ),
        (
            "a.jsonl",
            '{"text": "t", "label": "a"}\n\n{"text": "t", "lab\n',
            r"a\.jsonl:3: broken JSON: .*; fix or remove the line",
        ),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a list, not a JSON object"),
        ("a.jsonl", '{"text": " \\n", "label": "a"}\n', r"a\.jsonl:1: column 'text' is empty"),
        ("a.csv", "text,label\nt,a\n,b\n", r"a\.csv:3: column 'text' is empty"),
        (
            "a.jsonl",
            '{"text": 3, "label": "a"}\n',
            r"a\.jsonl:1: column 'text' holds int, not text",
        ),
        ("a.jsonl", '{"text": "t", "label": null}', r"column 'label' holds nothing, not text"),
        ("a.jsonl", '{"text": "t", "label": 0.5}', r"column 'label' holds float, not text"),
        ("a.jsonl", '{"text": "\\ud800", "label": "a"}', r"a\.jsonl:1: .* half of a surrogate"),
        ("a.csv", 'text,label\n"t\nu",a\nx,y,z\n', r"a\.csv:4: 3 fields, but the header has 2"),
        (
            "a.csv",
            'text,label\nt,a\n"never closed,b\nt,a\n',
            r"a\.csv:3: broken CSV .* starts here",
        ),
        ("a.csv", "text,text,label\nt,u,a\n", r"a\.csv:1: column 'text' occurs more than once"),
        ("a.csv", b"text,label\nt,a\n\xff,b\n", r"a\.csv:3: not UTF-8 at byte offset 15.*iconv"),
        ("a.jsonl", "\n", r"a\.jsonl holds no examples"),
    ],
)
def test_a_bad_file_is_refused_by_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_examples(write(tmp_path, name, content), COLUMNS)
    assert caught.value.exit_code == 1


def test_what_is_no_file_of_examples_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.jsonl", r"none\.jsonl does not exist"),
        (tmp_path, "is a directory"),
        (write(tmp_path, "a.txt", "t"), r"read from \.jsonl and \.csv files, not from '\.txt'"),
    ):
        with pytest.raises(DataUsageError, match=message):
            read_examples(path, COLUMNS)


def test_what_is_held_out_depends_on_the_text_alone() -> None:
    examples = [Example(f"text {i % 900}", str(i)) for i in range(1000)]
    train, val = hold_out(examples, "f")
    assert 60 <= len({example.text for example in val}) <= 120
    assert not {example.text for example in train} & {example.text for example in val}
    assert sorted(train + val, key=lambda e: int(e.target)) == examples
    _, again = hold_out(examples[::-1], "f")
    assert again == val[::-1]
    more = [*examples, *(Example(f"more {i}") for i in range(100))]
    assert [example for example in hold_out(more, "f")[1] if example.target] == val


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True))
@settings(max_examples=50, deadline=None)
def test_neither_side_is_empty(texts: list[str]) -> None:
    texts = [text for text in texts if text.isascii()] + ["a1", "a2"]
    assert all(hold_out([Example(text) for text in texts], "f"))


def test_a_single_text_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"f\.csv holds a single text.*data\.val=FILE"):
        hold_out([Example("same", "a"), Example("same", "b")], "f.csv")


def test_labels_are_sorted_and_numbers_by_value() -> None:
    assert sorted_labels([Example("t", "b"), Example("t", "a")], [Example("t", "b")]) == ["a", "b"]
    assert sorted_labels([Example("t", label) for label in ("10", "9", "-1")]) == ["-1", "9", "10"]
    assert sorted_labels([Example("t", label) for label in ("10", "9", "x")]) == ["10", "9", "x"]


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_every_epoch_is_a_permutation_however_it_is_cut(size: int, seed: int, cut: int) -> None:
    whole = order(range(3 * size), num_examples=size, seed=seed)
    for epoch in range(3):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))
    cut = min(cut, len(whole))
    parts = order(range(cut), num_examples=size, seed=seed)
    parts += order(range(cut, 3 * size), num_examples=size, seed=seed)
    assert parts == whole


def test_the_order_is_fixed_for_ever() -> None:
    golden = [2, 3, 0, 1, 4, 5, 2, 3, 5, 1, 4, 0]
    assert order(range(12), num_examples=6, seed=0) == golden
    assert order(range(12), num_examples=6, seed=1) != golden
    assert order(range(12), num_examples=6, seed=0, purpose="validation") != golden


def test_reading_examples_needs_no_torch() -> None:
    code = "import data.instruct, data.targets, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
