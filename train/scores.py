"""Accuracy, precision, recall and F1 from a confusion matrix; the only module with scikit-learn.

Macro averages run over the labels that occur, as truth or as prediction: a label that does neither
has no precision and no recall to average. A ratio without cases counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_fscore_support


def classification_scores(confusion_LL: NDArray[np.int64], labels: Sequence[str]) -> dict[str, Any]:
    """Scores of a [true, predicted] count matrix over `labels`; JSON-able.

    Keys: accuracy, precision_macro, recall_macro, f1_macro, per_class ({label: precision, recall,
    f1, support}) and confusion_matrix (rows are true labels, in the order of per_class).
    """
    true, predicted = np.nonzero(confusion_LL)
    counts = confusion_LL[true, predicted]
    assert counts.sum() > 0, "there is at least one case"
    options: dict[str, Any] = {"sample_weight": counts, "zero_division": 0.0}
    macro = precision_recall_fscore_support(true, predicted, average="macro", **options)
    each = precision_recall_fscore_support(
        true, predicted, labels=np.arange(len(labels)), average=None, **options
    )
    return {
        "accuracy": float(np.trace(confusion_LL) / counts.sum()),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "f1_macro": float(macro[2]),
        "per_class": {
            label: {
                "precision": float(precision),
                "recall": float(recall),
                "f1": float(f1),
                "support": int(support),
            }
            for label, precision, recall, f1, support in zip(labels, *each, strict=True)
        },
        "confusion_matrix": confusion_LL.tolist(),
    }


def majority_baseline(confusion_LL: Sequence[Sequence[int]]) -> dict[str, float]:
    """Accuracy and macro F1 of always answering the most frequent true label of the matrix."""
    matrix = np.asarray(confusion_LL)
    support = matrix.sum(axis=1)
    constant = np.zeros_like(matrix)
    constant[:, support.argmax()] = support
    scores = classification_scores(constant, [str(index) for index in range(len(matrix))])
    return {"accuracy": scores["accuracy"], "f1_macro": scores["f1_macro"]}
