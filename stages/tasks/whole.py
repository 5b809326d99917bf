"""Metrics that need all outputs of an evaluation, by scikit-learn where it has them.

Each takes outputs and targets as numpy arrays and returns a number or a table. Where outputs and
targets have positions, all positions count alike. scikit-learn is loaded when a metric is computed.
"""

from __future__ import annotations

import numpy as np

from stages.arrays import HostArray


def _classes(outputs: HostArray, targets: HostArray) -> tuple[HostArray, HostArray, HostArray]:
    """Returns scores [n, classes], predictions [n] and labels [n], without masked positions."""
    labels = targets.reshape(-1)
    scores = outputs.reshape(-1, outputs.shape[-1])
    counts = labels >= 0
    return scores[counts], np.argmax(scores[counts], axis=-1), labels[counts]


def confusion(outputs: HostArray, targets: HostArray) -> HostArray:
    """Returns the number of samples by label (rows) and prediction (columns)."""
    from sklearn.metrics import confusion_matrix

    _, said, labels = _classes(outputs, targets)
    table: HostArray = confusion_matrix(labels, said, labels=np.arange(outputs.shape[-1]))
    return table


def recall_by_class(outputs: HostArray, targets: HostArray) -> HostArray:
    """Returns for each class the share of its samples that are classified correctly."""
    table = confusion(outputs, targets)
    with np.errstate(invalid="ignore"):
        shares: HostArray = np.diag(table) / table.sum(axis=1)
    return shares


def macro_f1(outputs: HostArray, targets: HostArray) -> float:
    """Returns the mean over the classes of their F1 scores; a class that never occurs has 0."""
    from sklearn.metrics import f1_score

    _, said, labels = _classes(outputs, targets)
    known = np.arange(outputs.shape[-1])
    return float(f1_score(labels, said, labels=known, average="macro", zero_division=0.0))


def class_auc(outputs: HostArray, targets: HostArray) -> float:
    """Returns the mean area under the ROC curve of each class against the rest.

    Classes of which there are no samples, or only samples, are left out; NaN if that is all.
    """
    scores, _, labels = _classes(outputs, targets)
    scores = scores.astype(np.float64)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    return _mean_area(scores, labels[:, None] == np.arange(scores.shape[-1]))


def _mean_area(scores: HostArray, truths: HostArray) -> float:
    """Returns the mean area under the ROC curve over columns, each [n] with both truths in it."""
    from sklearn.metrics import roc_auc_score

    areas = [
        roc_auc_score(truth, score)
        for score, truth in zip(scores.T, truths.T, strict=True)
        if truth.any() and not truth.all()
    ]
    return float(np.mean(areas)) if areas else float("nan")


def _yes_or_no(outputs: HostArray, targets: HostArray) -> tuple[HostArray, HostArray]:
    """Returns scores and truths, [n, outputs]."""
    return (
        outputs.reshape(-1, outputs.shape[-1]).astype(np.float64),
        targets.reshape(-1, targets.shape[-1]) > 0.5,
    )


def label_auc(outputs: HostArray, targets: HostArray) -> float:
    """Returns the mean over the outputs of the area under the ROC curve."""
    return _mean_area(*_yes_or_no(outputs, targets))


def label_f1(outputs: HostArray, targets: HostArray) -> float:
    """Returns the mean over the outputs of their F1 scores at the threshold 0 of the logits."""
    from sklearn.metrics import f1_score

    scores, truths = _yes_or_no(outputs, targets)
    return float(
        np.mean(
            [
                f1_score(truth, score > 0, zero_division=0.0)
                for score, truth in zip(scores.T, truths.T, strict=True)
            ]
        )
    )


def average_precision(outputs: HostArray, targets: HostArray) -> float:
    """Returns the mean over the outputs with a positive target of their average precision."""
    from sklearn.metrics import average_precision_score

    scores, truths = _yes_or_no(outputs, targets)
    precisions = [
        average_precision_score(truth, score)
        for score, truth in zip(scores.T, truths.T, strict=True)
        if truth.any()
    ]
    return float(np.mean(precisions)) if precisions else float("nan")


def label_confusion(outputs: HostArray, targets: HostArray) -> HostArray:
    """Returns for each output the counts [[true no, false yes], [false no, true yes]]."""
    from sklearn.metrics import multilabel_confusion_matrix

    scores, truths = _yes_or_no(outputs, targets)
    if scores.shape[1] == 1:  # scikit-learn takes one column for the numbers of classes
        from sklearn.metrics import confusion_matrix

        return np.asarray([confusion_matrix(truths[:, 0], scores[:, 0] > 0, labels=[False, True])])
    table: HostArray = multilabel_confusion_matrix(truths, scores > 0)
    return table


def r_squared(outputs: HostArray, targets: HostArray) -> float:
    """Returns the coefficient of determination, the mean over the outputs."""
    from sklearn.metrics import r2_score

    width = outputs.shape[-1]
    if outputs.size // width < 2:
        return float("nan")
    return float(r2_score(targets.reshape(-1, width), outputs.reshape(-1, width)))
