"""Tasks of the user's own: what they may return, and what is said of what they may not."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import stages
from stages.tasks.per_sample import total_loss
from stages.tasks.registry import choosing
from stages.tasks.task import LOSS, MOST_METRICS
from tests.stages.tasks.test_registered import network


def squares(outputs, targets):
    """A loss of samples."""
    return jnp.mean((outputs - targets[:, None]) ** 2, axis=-1)


def model(loss=squares, **fields):
    """A model for a task with targets like those of classification."""
    targets = stages.make_task("classification").targets
    return network("classification").for_task(stages.Task("mine", loss, targets=targets, **fields))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda o, t: jnp.mean(o), r"the loss is a scalar, expected \[samples\]"),
        (lambda o, t: o, r"the loss is shape \(\d+, 4\), expected \[samples\]"),
        (lambda o, t: o[0], r"the loss is shape \(4,\), expected"),
        (lambda o, t: jnp.argmax(o, -1), r"the loss is int\d\d, expected floating numbers"),
        (lambda o, t: None, r"the loss is NoneType, expected an array"),
        (lambda o, t: o - t["y"], r"the loss failed for outputs .* and targets int32\[\d+\]: "),
        (lambda o, t: 1 / 0, r"the loss failed .*ZeroDivisionError.*test_own.py"),
    ],
    ids=["scalar", "not reduced", "of classes", "whole numbers", "nothing", "other targets", "bug"],
)
def test_a_loss_that_is_none_of_samples_is_refused_in_one_line(loss, reason):
    with pytest.raises(stages.StageError, match=reason) as error:
        model(loss)
    assert "\n" not in str(error.value) and "task 'mine'" in str(error.value)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda o, t: jnp.mean((o[:, 0] - t[:, None]) ** 2, axis=-1), "the loss"),
        (lambda o, t: squares(o - o.mean(axis=0), t), "the loss"),
        (lambda o, t: squares(o, t) / len(o), "the loss"),
    ],
    ids=["broadcast", "centred", "a mean"],
)
def test_a_loss_that_looks_at_other_samples_is_refused(loss, what):
    """Their shapes are right, so that only numbers show it."""
    made = model(loss)
    with pytest.raises(stages.StageError, match=f"{what} of a sample depends on"):
        made.check_alone(jnp.asarray([1, 2]))
    model().check_alone(jnp.asarray([1, 2]))
    metric = stages.Metric("odd", loss)
    with pytest.raises(stages.StageError, match=r"the metric 'odd' of a sample depends"):
        model(metrics=(metric,)).check_alone(jnp.asarray([1, 2]))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (lambda o, t: jnp.mean(o), r"the metric 'odd' is a scalar"),
        (lambda o, t: (o[:, 0], o), r"the metric 'odd', its weights is shape"),
        (lambda o, t: (o[:, 0], o[:, 0], o[:, 0]), r"the metric 'odd' is tuple"),
    ],
    ids=["scalar", "weights", "three"],
)
def test_a_metric_that_is_none_of_samples_is_refused_in_one_line(values, reason):
    with pytest.raises(stages.StageError, match=reason):
        model(metrics=(stages.Metric("odd", values),))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("loss",), r"'loss' is not a valid name"),
        (("a b",), r"'a b' is not a valid name"),
        (("",), r"'' is not a valid name"),
        (("same", "same"), r"two metrics named 'same'"),
        ([f"m{i}" for i in range(MOST_METRICS + 1)], r"at most 64 are allowed"),
    ],
)
def test_names_of_metrics_are_checked(names, reason):
    metrics = tuple(stages.Metric(name, squares) for name in names)
    with pytest.raises(stages.StageError, match=reason):
        stages.Task("mine", squares, metrics)


def test_targets_that_do_not_fit_the_outputs_are_refused():
    """The targets of a registered task follow from the outputs; others are asked for."""
    own = stages.Task("mine", squares)
    with pytest.raises(stages.StageError, match="targets of task 'mine' are not known"):
        network("classification").for_task(own).target_shapes(3)


def test_scores_have_a_direction_and_the_first_is_the_main_one():
    error = stages.Metric("error", squares, higher_is_better=False)
    table = stages.WholeMetric("table", lambda o, t: o, None)
    gain = stages.WholeMetric("gain", lambda o, t: 1.0)
    task = stages.Task("mine", squares, (error,), (table, gain))
    assert task.scores == {"error": False, "gain": True, LOSS: False}
    assert task.main == "error" and stages.Task("mine", squares).main == LOSS
    assert choosing(task, ["gain"]).scores == {"error": False, "gain": True, LOSS: False}
    assert choosing(task, []).whole == () and choosing(task, ["all"]) == task
    with pytest.raises(stages.StageError, match=r"no metric 'f1' of all outputs \(known: table"):
        choosing(task, ["f1"])


def test_what_diverges_is_infinite_and_what_does_not_count_is_no_number():
    task = stages.make_task("language")
    found = task.finish({"perplexity": (1e6, 10.0), "accuracy": (0.0, 0.0)})
    assert found["perplexity"] == float("inf") and np.isnan(found["accuracy"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"metrics": squares}, "metrics is a function, expected a tuple of stages.Metric"),
        ({"metrics": (squares,)}, "metrics is a tuple of function, expected a tuple of"),
        ({"metrics": stages.Metric("mine", squares)}, "metrics is a Metric, expected a tuple"),
        ({"metrics": (stages.WholeMetric("mine", squares),)}, "metrics is a tuple of WholeMetric"),
        ({"whole": (stages.Metric("mine", squares),)}, "whole is a tuple of Metric, expected"),
        ({"whole": "f1"}, "whole is a str, expected a tuple of stages.WholeMetric"),
        ({"targets": "classification"}, "targets is a str, expected a rule"),
        ({"targets": stages.Task}, "targets is a type, expected a rule"),
    ],
)
def test_metrics_and_targets_of_another_type_are_refused(fields, reason):
    with pytest.raises(stages.StageError, match=reason):
        stages.Task("mine", squares, **fields)


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        (lambda mean: 1 / 0, r"failed for the mean 0\.5: ZeroDivisionError.*test_own\.py"),
        (lambda mean: None, r"returned a NoneType, expected a number"),
        (lambda mean: "high", r"returned a str, expected a number"),
        (lambda mean, more: mean, r"failed for the mean 0\.5: TypeError"),
    ],
    ids=["bug", "nothing", "a text", "two arguments"],
)
def test_a_finish_that_fails_is_told_in_one_line(finish, reason):
    task = stages.Task("mine", squares, (stages.Metric("odd", squares, finish=finish),))
    with pytest.raises(stages.StageError, match=f"finish of the metric 'odd' {reason}"):
        task.finish({"odd": (1.0, 2.0)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_have_the_range_and_the_digits_of_32_bits(dtype):
    """256 samples: a sum in bfloat16 stops growing there, one in float16 overflows at 65,504."""
    count = 300

    def large(outputs, targets):
        return jnp.full(len(outputs), 300, outputs.dtype)

    task = stages.Task(
        "mine", large, targets=stages.make_task("classification").targets,
        metrics=(stages.Metric("one", lambda o, t: jnp.ones(len(o), o.dtype)),
                 stages.Metric("two", lambda o, t: (o[:, 0] * 0 + 1, jnp.ones(len(o), o.dtype)))),
    )  # fmt: skip
    outputs, targets = jnp.zeros((count, 4), dtype), jnp.zeros(count, jnp.int32)
    total, sums = total_loss(task, outputs, targets)
    assert total.dtype == jnp.float32 and float(total) == 300 * count
    assert sums["one"].tolist() == sums["two"].tolist() == [count, count]
