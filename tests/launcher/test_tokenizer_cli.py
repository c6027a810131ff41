"""The comparison of tokenizers as a person reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.tokenizer_eval import Score
from launcher.tokenizer_cli import show_scores


def test_rows_can_be_told_apart_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = Path("/srv/somewhere/far/away/on/a/file/system/with/long/names/of/folders")
    scores = [
        Score(str(long / name), str(long / "text.jsonl"), 8192, 12345, 1, 1, 3.21, 12, 0.001, 4.5)
        for name in ("first.model", "second.model")
    ]
    show_scores(scores)
    shown = capsys.readouterr().out
    assert str(long / "text.jsonl") in shown
    folded = "".join(line[:30].strip() for line in shown.splitlines()[2:])
    for score in scores:
        assert score.tokenizer in "".join(folded.split())
    assert "8,192        3.210  12 of 12345   0.100%       4.5" in shown
