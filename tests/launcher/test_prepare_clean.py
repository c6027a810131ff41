"""`headrace prepare` says what each stage of cleaning did, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli import run_command
from tests.data.texts import prose, write_lines


def test_every_stage_is_reported_with_its_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [prose(600, seed=seed) for seed in range(12)]
    evaluation = write_lines(tmp_path / "test.jsonl", texts[:1])
    path = write_lines(tmp_path / "a.jsonl", [*texts, texts[5], "\0" + prose(700, seed=99)])
    argv = ["prepare", f"--input={path}", f"--output={tmp_path / 'out'}", "--vocab-size=330"]
    argv += ["--normalize", "--mask-pii", "--dedup=exact", f"--decontaminate={evaluation}"]
    argv += ["--workers=1", "--val-fraction=0.2"]
    run_command(argv, standalone=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("normalize: 14 of 14 documents and ")
    assert lines[1] == "  1 NUL"
    assert lines[2].startswith("decontaminate: 13 of 14 documents and ")
    assert lines[3] == "  dropped 1: overlaps test.jsonl"
    assert lines[4].endswith(" 13-grams of test.jsonl")
    assert lines[5].startswith("mask pii: 13 of 13 documents and ")
    assert lines[6].startswith("dedup: 12 of 13 documents and ")
    assert lines[7] == "  dropped 1: exact duplicate"
    run_command([*argv, "--json"], standalone=False)
    told = json.loads(capsys.readouterr().out)
    assert told["was_complete"]
    stages = told["clean"]["stages"]
    names = ["normalize", "decontaminate", "mask_pii", "dedup"]
    assert [count["stage"] for count in stages] == names
    assert stages[-1]["dropped"] == {"exact duplicate": 1}
    assert all(
        count["documents_in"] - count["documents_out"] == sum(count["dropped"].values())
        for count in stages
    )
    assert told["clean"]["evaluation"][0]["name"] == "test.jsonl"
