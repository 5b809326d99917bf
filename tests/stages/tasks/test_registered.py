"""The registered tasks: exact under micro-batching, metrics as scikit-learn has them, checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn import metrics as reference

import stages
from stages.names import TASKS
from stages.tasks.registered import FACTORIES
from stages.tasks.task import LOSS
from tests.patience import PROCESS_S
from tests.stages import support

SAMPLES, FEATURES, WIDTH, POSITIONS = 11, 5, 4, 3
#: Tasks with arguments, beside each registered one without any.
ARGUMENTS = [
    ("classification", {"label_smoothing": 0.1, "class_weights": [1, 2.5, 0.5, 1], "top_k": 2}),
    ("binary", {"positive_weight": 3.0}),
    ("regression", {"loss": "huber", "delta": 0.5}),
    ("regression", {"loss": "absolute"}),
    ("language", {"weighting": "token"}),
]
CASES = [*((name, {}) for name in TASKS), *ARGUMENTS]


@pytest.fixture
def x64() -> Iterator[None]:
    """Numbers of 64 bits, in which equal means equal."""
    with jax.enable_x64(True):
        yield


def network(name: str) -> stages.Model:
    """Three units that map features, or positions of features, to outputs."""
    width, kind = {"binary": 1}.get(name, WIDTH), jnp.result_type(float)
    shape = (POSITIONS, FEATURES) if name == "language" else (FEATURES,)
    units = [
        ("first", lambda rngs: nnx.Linear(FEATURES, 6, param_dtype=kind, rngs=rngs)),
        ("second", lambda rngs: nnx.Linear(6, 6, param_dtype=kind, rngs=rngs)),
        ("third", lambda rngs: nnx.Linear(6, width, param_dtype=kind, rngs=rngs)),
    ]
    return stages.Model.from_units("small", units, shape, width, input_dtype=kind)


def targets(name: str, samples: int = SAMPLES) -> np.ndarray:
    """Targets that fit the network of a task."""
    rng = np.random.default_rng(5)
    if name == "classification":
        return rng.integers(0, WIDTH, samples).astype(np.int32)
    if name == "language":
        return rng.integers(-1, WIDTH, (samples, POSITIONS)).astype(np.int32)
    width = 1 if name == "binary" else WIDTH
    if name == "regression":
        return rng.normal(size=(samples, width)).astype(np.float32)
    return rng.integers(0, 2, (samples, width)).astype(np.float32)


def trained(name: str, arguments: dict) -> tuple:
    model = network(name).for_task(stages.make_task(name, **arguments))
    params, state = model.init(1)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(SAMPLES, *model.input_shape)))
    return model, params, state, x, jnp.asarray(targets(name))


def test_every_registered_task_is_made_by_its_name() -> None:
    assert tuple(FACTORIES) == TASKS


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_cuts_and_micro_batches_change_neither_gradients_nor_metrics(
    x64: None, name: str, arguments: dict
) -> None:
    model, params, state, x, y = trained(name, arguments)

    def mean_loss(params):
        return jnp.mean(model.task.loss(stages.predict(model, params, state, x), y))

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    whole, _, _ = support.step(model, (), params, state, x, y)
    assert whole.keys() == {LOSS, *model.task.streamed}
    sums, found, _ = support.step(model, (1, 2), params, state, x, y, micro_batches=3)
    assert float(sums[LOSS]) / SAMPLES == pytest.approx(float(loss), rel=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), found, gradient
    )
    for metric in model.task.streamed:
        np.testing.assert_allclose(sums[metric], whole[metric], rtol=1e-12)


def _finished(name: str, arguments: dict) -> tuple[dict, np.ndarray, np.ndarray]:
    """Returns metrics, outputs and targets of one batch."""
    model, params, state, x, y = trained(name, arguments)
    sums, _, _ = support.step(model, (), params, state, x, y)
    pairs = {metric: tuple(np.asarray(sums[metric]).tolist()) for metric in model.task.streamed}
    outputs = np.asarray(stages.predict(model, params, state, x))
    found = model.task.finish(pairs)
    found |= {one.name: one.compute(outputs, np.asarray(y)) for one in model.task.whole}
    return found, outputs, np.asarray(y)


def test_metrics_of_classes_are_those_of_scikit_learn(x64: None) -> None:
    found, outputs, labels = _finished("classification", {"top_k": 2})
    said = outputs.argmax(-1)
    known = np.arange(WIDTH)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, said))
    assert found["top2"] == pytest.approx(
        reference.top_k_accuracy_score(labels, outputs, k=2, labels=known)
    )
    assert found["f1"] == pytest.approx(reference.f1_score(labels, said, average="macro"))
    np.testing.assert_array_equal(found["confusion"], reference.confusion_matrix(labels, said))
    np.testing.assert_allclose(
        found["recall_by_class"], reference.recall_score(labels, said, average=None)
    )
    shares = np.asarray(jax.nn.softmax(outputs))
    assert found["auc"] == pytest.approx(
        reference.roc_auc_score(labels, shares, multi_class="ovr", labels=known)
    )


@pytest.mark.parametrize("name", ["binary", "multilabel"])
def test_metrics_of_yes_and_no_are_those_of_scikit_learn(x64: None, name: str) -> None:
    found, outputs, truth = _finished(name, {})
    said, truth = (outputs > 0).astype(int), truth.astype(int)
    assert found["accuracy"] == pytest.approx(np.mean(said == truth))
    for metric, score in (("precision", reference.precision_score),
                          ("recall", reference.recall_score)):  # fmt: skip
        assert found[metric] == pytest.approx(score(truth.ravel(), said.ravel()))
    if name == "multilabel":
        assert found["exact"] == pytest.approx(reference.accuracy_score(truth, said))
        tables = reference.multilabel_confusion_matrix(truth, said)
    else:
        tables = [reference.confusion_matrix(truth, said)]
    np.testing.assert_array_equal(found["confusion"], tables)
    columns = list(zip(truth.T, outputs.T, said.T, strict=True))
    assert found["auc"] == pytest.approx(
        np.mean([reference.roc_auc_score(true, score) for true, score, _ in columns])
    )
    assert found["f1"] == pytest.approx(
        np.mean([reference.f1_score(true, yes) for true, _, yes in columns])
    )
    assert found["average_precision"] == pytest.approx(
        np.mean([reference.average_precision_score(true, score) for true, score, _ in columns])
    )


def test_metrics_of_numbers_are_those_of_scikit_learn(x64: None) -> None:
    found, outputs, truth = _finished("regression", {})
    assert found["rmse"] == pytest.approx(np.sqrt(reference.mean_squared_error(truth, outputs)))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(truth, outputs))
    assert found["r2"] == pytest.approx(reference.r2_score(truth, outputs))


def test_perplexity_is_of_the_tokens_that_count(x64: None) -> None:
    found, outputs, tokens = _finished("language", {})
    logs = np.asarray(jax.nn.log_softmax(outputs))
    counts = tokens >= 0
    own = np.take_along_axis(logs, np.maximum(tokens, 0)[..., None], -1)[..., 0][counts]
    assert 0 < counts.sum() < counts.size
    assert found["perplexity"] == pytest.approx(np.exp(-own.mean()))
    assert found["accuracy"] == pytest.approx(np.mean(outputs.argmax(-1)[counts] == tokens[counts]))


@pytest.mark.parametrize("weighting", ["sequence", "token"])
def test_a_sequence_without_a_token_that_counts_costs_nothing(weighting: str) -> None:
    task = stages.make_task("language", weighting=weighting)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    tokens = jnp.asarray([[1, -1, 2], [-1, -1, -1]])
    losses = task.loss(logits, tokens)
    logs = -np.asarray(jax.nn.log_softmax(logits))
    total = logs[0, 0, 1] + logs[0, 2, 2]
    np.testing.assert_allclose(losses, [total / (2 if weighting == "sequence" else 3), 0.0], 1e-6)
    gradient = jax.grad(lambda logits: jnp.sum(task.loss(logits, tokens)))(logits)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[1].any()


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("clasification", {}, r"unknown task 'clasification': did you mean 'classification'"),
        ("binary", {"smoothing": 1}, r"has no argument 'smoothing' \(known: positive_weight\)"),
        ("classification", {"label_smoothing": 2}, r"label_smoothing=2 is not valid: use a number"),
        ("classification", {"label_smoothing": "a"}, r"label_smoothing='a' is not valid"),
        ("classification", {"class_weights": 3}, r"class_weights must be a list"),
        ("classification", {"class_weights": [-1]}, r"class_weights=-1 is not valid"),
        ("classification", {"top_k": 1}, r"top_k=1 is not valid"),
        ("regression", {"loss": "mse"}, r"loss='mse' is not valid: use squared"),
        ("regression", {"delta": float("nan")}, r"delta=nan is not valid"),
        ("language", {"weighting": "word"}, r"weighting='word' is not valid"),
        ("multilabel", {"positive_weight": True}, r"positive_weight=True is not valid"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(name: str, arguments: dict, reason: str) -> None:
    with pytest.raises(stages.StageError, match=reason) as error:
        stages.make_task(name, **arguments)
    assert "\n" not in str(error.value)


def test_class_weights_that_do_not_fit_are_refused_with_the_model() -> None:
    task = stages.make_task("classification", class_weights=[1, 2])
    with pytest.raises(stages.StageError, match="2 factors for 4 classes"):
        network("classification").for_task(task)


def test_tasks_are_made_without_jax() -> None:
    """A launcher checks a configuration before it sets jax's environment."""
    code = (
        "import sys, stages.tasks.registry as r\n"
        "[r.make_task(name).facts() for name in r.TASKS]\n"
        "assert not {'jax', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PROCESS_S)
