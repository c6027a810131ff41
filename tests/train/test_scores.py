"""Scores from a confusion matrix are those that scikit-learn gives for the single cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from train.scores import classification_scores, majority_baseline


def confusion_of(true: list[int], predicted: list[int], size: int) -> np.ndarray:
    matrix = np.zeros((size, size), dtype=np.int64)
    np.add.at(matrix, (true, predicted), 1)
    return matrix


def test_scores_equal_those_of_the_single_cases() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    scores = classification_scores(confusion_of(true, predicted, 4), ["a", "b", "c", "d"])
    assert list(scores) == [
        "accuracy",
        "precision_macro",
        "recall_macro",
        "f1_macro",
        "per_class",
        "confusion_matrix",
    ]
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    for key, function in (
        ("precision_macro", metrics.precision_score),
        ("recall_macro", metrics.recall_score),
        ("f1_macro", metrics.f1_score),
    ):
        assert scores[key] == pytest.approx(function(true, predicted, average="macro"))
    assert scores["confusion_matrix"] == metrics.confusion_matrix(true, predicted).tolist()
    each = metrics.f1_score(true, predicted, average=None)
    assert [one["f1"] for one in scores["per_class"].values()] == pytest.approx(each)
    assert sum(one["support"] for one in scores["per_class"].values()) == 200


def test_a_label_that_does_not_occur_is_listed_but_not_averaged() -> None:
    true, predicted = [0, 0, 1], [0, 1, 1]
    scores = classification_scores(confusion_of(true, predicted, 3), ["a", "b", "never"])
    assert scores["f1_macro"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    assert scores["per_class"]["never"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert scores["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_the_majority_baseline_answers_the_most_frequent_label() -> None:
    found = majority_baseline([[1, 2], [0, 5]])
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["f1_macro"] == pytest.approx((2 * 5 / (5 + 8)) / 2)
