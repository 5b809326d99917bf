"""The registered tasks: functions that make them from their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stages.errors import StageError
from stages.tasks import whole
from stages.tasks.targets import ClassTargets, NumberTargets
from stages.tasks.task import Metric, Task, WholeMetric

_CLASS_METRICS = (
    WholeMetric("f1", whole.macro_f1, share=True),
    WholeMetric("auc", whole.class_auc, share=True),
    WholeMetric("recall_by_class", whole.recall_by_class, None),
    WholeMetric("confusion", whole.confusion, None),
)
_LABEL_METRICS = (
    WholeMetric("f1", whole.label_f1, share=True),
    WholeMetric("auc", whole.label_auc, share=True),
    WholeMetric("average_precision", whole.average_precision, share=True),
    WholeMetric("confusion", whole.label_confusion, None),
)


def classification(
    label_smoothing: float = 0.0, class_weights: Sequence[float] = (), top_k: int = 0
) -> Task:
    """One class of several: softmax cross entropy.

    Outputs are logits [samples, …, classes], targets class numbers [samples, …]; with positions,
    a sample's loss is their mean.

    Args:
      label_smoothing: Share of the probability that is spread over all classes.
      class_weights: For each class the factor of its samples' losses. The mean is over samples and
        not over weights, so that it does not depend on the mini-batch.
      top_k: Also report how often the label is among the k largest outputs, as ``topK``.
    """
    smoothing = _number("classification", "label_smoothing", label_smoothing, 0.0, 1.0)
    if not isinstance(class_weights, Sequence) or isinstance(class_weights, str):
        raise StageError(
            f"task 'classification': class_weights must be a list such as [1,2.5], got "
            f"{class_weights!r}"
        )
    weights = tuple(
        _number("classification", "class_weights", weight, 0.0, 1e9) for weight in class_weights
    )
    if type(top_k) is not int or not 0 <= top_k <= 10_000 or top_k == 1:
        raise StageError(
            f"task 'classification': top_k={top_k!r} is not valid: use a whole number from 2 on, "
            "or 0 for none"
        )

    def loss(outputs: Any, targets: Any) -> Any:
        from stages.tasks import losses

        if weights and len(weights) != outputs.shape[-1]:
            raise StageError(
                f"task 'classification': class_weights has {len(weights)} factors for "
                f"{outputs.shape[-1]} classes: give one for each class"
            )
        return losses.cross_entropy(outputs, targets, smoothing, weights)

    metrics = [Metric("accuracy", _of_losses("hits"), share=True)]
    if top_k:
        metrics.append(Metric(f"top{top_k}", _of_losses("top_hits", top_k), share=True))
    return Task("classification", loss, tuple(metrics), _CLASS_METRICS, ClassTargets(), _largest)


def binary(positive_weight: float = 1.0) -> Task:
    """Yes or no: sigmoid cross entropy of one output.

    Outputs are logits [samples, 1], targets 0 or 1 (or between).

    Args:
      positive_weight: Factor of the losses of positive samples.
    """
    return _of_labels("binary", positive_weight, several=False)


def multilabel(positive_weight: float = 1.0) -> Task:
    """Any of several labels: sigmoid cross entropy, a sample's loss is the mean over its labels.

    Outputs are logits [samples, labels], targets 0 or 1 in the same shape.

    Args:
      positive_weight: Factor of the losses of positive labels.
    """
    return _of_labels("multilabel", positive_weight, several=True)


def regression(loss: str = "squared", delta: float = 1.0) -> Task:
    """Numbers: a sample's loss is the mean over its outputs.

    Outputs and targets are [samples, values], targets of one value also [samples].

    Args:
      loss: ``squared``, ``absolute`` or ``huber``.
      delta: huber: the error from which the loss is linear.
    """
    kinds = {"squared": "squared_error", "absolute": "absolute_error", "huber": "huber"}
    if loss not in kinds:
        raise StageError(f"task 'regression': loss={loss!r} is not valid: use {', '.join(kinds)}")
    delta = _number("regression", "delta", delta, 1e-9, 1e9)
    return Task(
        "regression",
        _of_losses(kinds[loss], *([delta] if loss == "huber" else [])),
        (
            Metric("rmse", _of_losses("squared_error"), False, finish=math.sqrt),
            Metric("mae", _of_losses("absolute_error"), False),
        ),
        (WholeMetric("r2", whole.r_squared),),
        NumberTargets(),
    )


def language(weighting: str = "sequence", positions: int = 0) -> Task:
    """Language modelling: cross entropy of the token at each position that counts.

    Outputs are logits [samples, positions, vocabulary], targets the tokens [samples, positions]
    that they are to predict (the next ones: the data shift them), -1 where none counts.

    Args:
      weighting: ``sequence``: a sample's loss is the mean over its positions that count, so that
        sequences count alike; ``token``: their sum over the padded length, so that tokens do.
      positions: token: what the sum is divided by instead, where padded lengths vary.
    """
    if weighting not in ("sequence", "token"):
        raise StageError(
            f"task 'language': weighting={weighting!r} is not valid: use sequence or token"
        )
    if type(positions) is not int or positions < 0 or (positions and weighting != "token"):
        raise StageError(
            f"task 'language': positions={positions!r} is not valid: use a whole number, and "
            "weighting=token"
        )
    return Task(
        "language",
        _of_losses("token_loss", weighting == "token", positions),
        (
            Metric("perplexity", _of_losses("token_sums"), False, finish=math.exp),
            Metric("accuracy", _of_losses("token_hits"), share=True),
        ),
        (),
        ClassTargets(masked=True),
        _largest,
    )


#: The registered tasks by name, those of ``stages.names.TASKS``.
FACTORIES: dict[str, Callable[..., Task]] = {
    "classification": classification,
    "binary": binary,
    "multilabel": multilabel,
    "regression": regression,
    "language": language,
}


def _of_labels(name: str, positive_weight: float, *, several: bool) -> Task:
    weight = _number(name, "positive_weight", positive_weight, 0.0, 1e9)
    metrics = [Metric("accuracy", _of_losses("agreement"), share=True)]
    if several:
        metrics.append(Metric("exact", _of_losses("all_agree"), share=True))
    metrics += [
        Metric("precision", _of_losses("positives", False), share=True),
        Metric("recall", _of_losses("positives", True), share=True),
    ]
    return Task(
        name,
        _of_losses("sigmoid_loss", weight),
        tuple(metrics),
        _LABEL_METRICS,
        NumberTargets(binary=True, single=not several),
        lambda outputs: (outputs > 0).astype(np.int32),
    )


def _of_losses(function: str, *arguments: Any) -> Callable[[Any, Any], Any]:
    """Returns a function of ``stages.tasks.losses``, which is loaded when it is called."""

    def call(outputs: Any, targets: Any) -> Any:
        from stages.tasks import losses

        return getattr(losses, function)(outputs, targets, *arguments)

    return call


def _largest(outputs: Any) -> Any:
    """Returns the class with the largest output, [samples, …]."""
    return np.argmax(outputs, axis=-1)


def _number(task: str, name: str, value: object, least: float, most: float) -> float:
    """Returns a number in a range.

    Raises:
      StageError: It is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise StageError(
            f"task {task!r}: {name}={value!r} is not valid: use a number from {least:g} to {most:g}"
        )
    return float(value)
