"""Thirteen words in a row of an evaluation file are found, twelve are not."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from data.config import DataError, DataUsageError, PrepareConfig
from data.decontaminate import evaluation_files, load_evaluation
from data.prepare import prepare
from tests.data.texts import prose

QUESTION = (
    "If a train leaves the station at noon and travels for three hours, how far does it go today?"
)
WORDS = QUESTION.split()


def overlaps(text: str, *paths: Path) -> dict[str, int]:
    return dict(load_evaluation(evaluation_files(paths)).overlaps(text))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    rows = [{"question": QUESTION, "choices": ["yes", "no"], "gold": 1}, {"question": "Short?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def test_thirteen_words_in_a_row_are_found_whatever_their_case(evaluation: Path) -> None:
    found = " ".join(WORDS[2:15]).upper().replace(" ", " -- ")
    assert overlaps(f"{prose(500)} {found} {prose(500)}", evaluation) == {"test.jsonl": 1}
    assert overlaps(QUESTION, evaluation) == {"test.jsonl": len(WORDS) - 12}
    assert overlaps(" ".join(WORDS[2:14]) + " then", evaluation) == {}
    assert overlaps(" ".join([*WORDS[:7], "x", *WORDS[7:]]), evaluation) == {}
    assert overlaps("", evaluation) == {}


def test_files_of_every_kind_are_reported_with_what_they_hold(
    evaluation: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f'id,text\n1,"{prose(200, seed=5)}"\n2,short\n')
    plain = tmp_path / "plain.txt"
    plain.write_text(f"{QUESTION}\n{QUESTION} again")
    files = (evaluation, table, plain)
    report = load_evaluation(evaluation_files(files)).report
    assert [(row["name"], row["texts"], row["too_short"]) for row in report] == [
        ("test.jsonl", 4, 3),
        ("table.csv", 6, 5),
        ("plain.txt", 1, 0),
    ]
    assert report[0]["ngrams"] == len(WORDS) - 12
    assert overlaps(prose(200, seed=5), *files).keys() == {"table.csv"}
    assert overlaps(QUESTION, *files).keys() == {"test.jsonl"}, "the first file that holds it"


def test_a_long_field_of_a_table_is_read_whatever_was_read_before(tmp_path: Path) -> None:
    """The vendor keeps one limit for the process: 128 KiB, or what another reader left."""
    (tmp_path / "long.csv").write_text(f'id,text\n1,"{prose(200_000)} {QUESTION}"\n')
    csv.field_size_limit(90)
    assert overlaps(QUESTION, tmp_path / "long.csv") == {"long.csv": len(WORDS) - 12}


def test_files_that_cannot_be_used_are_refused_with_the_reason(
    evaluation: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataUsageError, match=r"--decontaminate .*none\.txt: no such file"):
        evaluation_files((tmp_path / "none.txt",))
    with pytest.raises(DataUsageError, match=r"names 2 files test\.jsonl"):
        evaluation_files((evaluation, evaluation))
    for name, content, message in [
        ("short.txt", b"too few words", "none of its 1 texts has 13 words in a row"),
        ("bad.jsonl", b'{"a": 1}\n{oops\n', r"bad\.jsonl:2 cannot be read: Expecting property"),
        ("latin.txt", b"caf\xe9 " * 20, r"cannot be read: 'utf-8' codec.*give UTF-8 text"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataUsageError, match=message):
            overlaps("text", tmp_path / name)


def test_a_file_that_changes_before_a_worker_reads_it_is_named(
    evaluation: Path, tmp_path: Path
) -> None:
    path, output = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(prose(20_000))
    config = PrepareConfig(vocab_size=400, val_fraction=0)

    def swap(stage: str, done: int, total: int) -> None:
        if stage == "clean":
            # The next process, or the next call, would hold documents against this one.
            evaluation.write_text(json.dumps({"question": prose(300)}))
            load_evaluation.cache_clear()

    with pytest.raises(DataError, match=r"test\.jsonl changed while documents were held against"):
        prepare([str(path)], output, config, workers=1, decontaminate=[evaluation], progress=swap)
    files = evaluation_files((evaluation,))
    evaluation.unlink()
    with pytest.raises(DataError, match=r"test\.jsonl cannot be read any more: No such file"):
        load_evaluation(files)
