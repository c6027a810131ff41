"""What `headrace prepare` and its relatives tell whoever uses them for the first time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.config import DataError, DataUsageError
from data.manifest import read_manifest
from data.tokenizer import load_tokenizer
from launcher.cli import run_command
from tests.data.prepared import stored
from tests.data.texts import prose, write_lines


def prepare(corpus: Path | str, output: Path, *options: str) -> None:
    argv = ["prepare", "--input", str(corpus), "--output", str(output), "--val-fraction", "0.1"]
    run_command([*argv, *options], standalone=False)


def test_a_warning_is_told_again_by_a_command_that_finds_its_work_done(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--vocab-size", "400", "--tokenizer-type", "unigram", "--workers", "1")
    told = []
    for _ in range(2):
        prepare(corpus, tmp_path / "out", *options)
        told.append(
            [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        )
    assert told[0] == told[1] and "cannot be exported" in "".join(told[0])
    assert "without --tokenizer-type unigram" in "".join(told[0])


def test_a_tokenizer_may_be_the_folder_that_holds_it(
    corpus: Path, dataset: Path, tmp_path: Path
) -> None:
    prepare(corpus, tmp_path / "out", "--tokenizer", str(dataset), "--workers", "1")
    theirs, ours = (read_manifest(place).tokenizer_sha256 for place in (dataset, tmp_path / "out"))
    assert theirs == ours


def test_what_a_shell_would_do_is_not_handed_to_a_program_as_a_word(tmp_path: Path) -> None:
    with pytest.raises(DataUsageError) as refused:
        prepare("pipe:.jsonl:cat a.jsonl | head -5", tmp_path / "out")
    assert "is run without a shell, and | would be a word for cat; write sh -c " in str(
        refused.value
    )


def test_texts_that_protect_nothing_are_counted(
    corpus: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "eval.jsonl"
    long = " ".join(f"word{number}" for number in range(20))
    held_out.write_text('{"q": "too short"}\n' * 3 + f'{{"q": "{long}"}}\n')
    prepare(corpus, tmp_path / "out", "--tokenizer", str(dataset), "--decontaminate", str(held_out))
    assert "3 of 4 texts of eval.jsonl have fewer than 13 words in a row" in capsys.readouterr().out


def test_options_leave_files_of_a_code_tree_out(
    corpus: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.txt").write_bytes(corpus.read_bytes() if corpus.is_file() else b"text " * 999)
    (code / "old.txt").write_bytes(b"caf\xe9")
    (code / "x.pyc").write_bytes(bytes(9))
    options = ("--tokenizer", str(dataset), "--workers", "1")
    with pytest.raises(DataError, match=r"leave it out with --exclude .*old\.txt, or accept it"):
        prepare(code, tmp_path / "out", *options)
    prepare(code, tmp_path / "out", *options, "--exclude", "old*", "--exclude=*.md")
    printed = capsys.readouterr().out
    assert "left out of the input: 1 binary file (1 .pyc), 1 by --exclude 'old*'" in printed
    assert "warning: --exclude '*.md' names no file of the input" in printed


def near_copies(folder: Path) -> Path:
    """Forty stories, each in two versions that differ in their last word."""
    stories = [prose(500, seed=seed) for seed in range(40)]
    versions = [f"{story} {word}" for story in stories for word in ("first", "second")]
    return write_lines(folder / "stories.jsonl", versions)


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ((), True),
        (("--dedup", "exact"), True),
        (("--dedup", "near"), False),
        (("--val-fraction", "0"), False),
    ],
)
def test_a_note_says_that_near_copies_may_lie_on_both_sides(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    is_told: bool,
) -> None:
    corpus, output = near_copies(tmp_path), tmp_path / "out"
    options = ("--vocab-size", "330", "--val-fraction", "0.3", "--workers", "1", *options)
    prepare(corpus, output, *options)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert bool(notes) == is_told
    if is_told:
        assert "near copies were not looked for, so some of the " in notes[0]
        assert notes[0].endswith("--dedup near keeps one of each")
    # And so it is: a story is on both sides exactly where the note says that it may be.
    tokenizer = load_tokenizer(output)
    sides = [
        {tokenizer.decode(ids).rsplit(" ", 1)[0] for ids in stored(output, side)}
        for side in ("train", "val")
        if (output / side).is_dir()
    ]
    assert bool(sides[0].intersection(*sides[1:]) if sides[1:] else ()) == is_told
    prepare(corpus, output, *options, "--json")
    told = json.loads(capsys.readouterr().out)
    assert [f"note: {note}" for note in told["notes"]] == notes
