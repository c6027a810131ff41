"""What people read: complete, aligned, and on stdout."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from launcher.show import MAX_MATRIX, show_evaluation, show_verification, stage_progress
from train.scores import classification_scores


def scores(num_labels: int) -> dict[str, object]:
    """Scores of a classifier that is always right."""
    labels = [f"label-{number}" for number in range(num_labels)]
    return classification_scores(np.diag([7] * num_labels), labels)


def test_an_evaluation_is_readable_and_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"loss": 2.0794415416798357, "perplexity": 8.0, "num_tokens": 76216}
    show_evaluation(result, as_json=False)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "loss             2.0794 nats per token",
        "perplexity       8.0000",
        "tokens measured  76,216",
    ]
    show_evaluation(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["loss"] == math.log(8)


def test_a_confusion_matrix_is_shown_while_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    show_evaluation(scores(3), as_json=False)
    out = capsys.readouterr().out
    assert "rows: true class, columns: predicted\n" in out
    assert "label-2        0        0        7" in out
    show_evaluation(scores(MAX_MATRIX + 1), as_json=False)
    out = capsys.readouterr().out
    assert f"the confusion matrix of {MAX_MATRIX + 1} classes is in the output of --json" in out


def test_damage_is_listed_before_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    from data.verify import Problem, Verification

    problem = Problem("train/main/shard-000000.tar", "000000-00001", "a token was changed")
    result = Verification("DATASET", False, 1, 2, 10, 3, "f" * 64, (problem,))
    show_verification(result, as_json=False)
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "damaged: train/main/shard-000000.tar: chunk 000000-00001: a token was changed"
    )
    assert second.startswith("DATASET: 1 problem in 1 shards; restore what is named from a copy")


def test_progress_is_silent_where_stderr_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress() as progress:
        progress("encode", 1, 2)
        progress("encode", 2, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == ""
