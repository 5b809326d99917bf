"""Every registered task by every method: equal to centralised training, with metrics by name."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stages
from pipar_jax import data as datasets
from pipar_jax.data.loader import Loader
from pipar_jax.errors import ConfigError, DataError, PiparError, RunError
from pipar_jax.launch.api import train
from pipar_jax.methods.registry import METHODS
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.event_lines import LINES
from stages.names import TASKS
from stages.signature import unwrapped
from stages.tasks.targets import MASKED
from tests.pipar_jax.runtime import support
from tests.sources import ROOT

RTOL = 1e-9
#: Samples of the devices: mini-batches of 5, which 3 micro-batches do not divide, and ragged ones.
SAMPLES = (7, 12)
BATCH, FEATURES, WIDTH, POSITIONS = 5, 6, 4, 3


@pytest.fixture(scope="module")
def double_numbers():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def network(name: str) -> stages.Model:
    """Three units that map features, or positions of features, to outputs."""
    width = {"binary": 1}.get(name, WIDTH)
    shape = (POSITIONS, FEATURES) if name == "language" else (FEATURES,)
    units = [
        ("first", lambda rngs: support.Dense(FEATURES, 7, rngs)),
        ("second", lambda rngs: support.Dense(7, 7, rngs)),
        ("third", lambda rngs: support.Dense(7, width, rngs)),
    ]
    return stages.Model.from_units("small", units, shape, width, input_dtype=np.float64)


def examples(name: str, samples: int, seed: int):
    """Inputs and targets that fit the network of a task."""
    rng = np.random.default_rng(seed)
    shape = (POSITIONS, FEATURES) if name == "language" else (FEATURES,)
    x = rng.normal(size=(samples, *shape)).astype(np.float32)
    if name == "classification":
        return x, rng.integers(0, WIDTH, samples)
    if name == "language":
        return x, rng.integers(MASKED, WIDTH, (samples, POSITIONS))
    if name == "binary":
        return x, rng.integers(0, 2, samples).astype(bool)
    if name == "multilabel":
        return x, rng.integers(0, 2, (samples, WIDTH))
    return x, rng.normal(size=(samples, WIDTH))


def setting(tmp_path, name: str, method: str, samples=SAMPLES):
    made = support.config(tmp_path, samples, method=method, batch=BATCH)
    made.task.name, made.model.name = name, "mlp"  # the network is handed over
    made.pipeline.cut, made.pipeline.micro_batches = 1, 3
    if METHODS[method].uses_nodes:
        made.nodes.count, made.pipeline.cuts = 1, "1,2" if METHODS[method].labels_home else "1"
    return made


def centralised(made, model, data):
    """Plain training on the union of the devices' mini-batches, or on them in turn."""
    loaders = [
        Loader(one.train, None, BATCH, seed=made.seed, device=index)
        for index, one in enumerate(data)
    ]
    steps = [loader.steps_per_epoch for loader in loaders]
    if made.method == "sl":
        groups = [[loader.batch(i)] for loader, n in zip(loaders, steps, strict=True)
                  for i in range(n)]  # fmt: skip
    else:
        groups = [[loader.batch(i) for loader in loaders] for i in range(max(steps))]
    params, state = model.init(made.seed)

    @jax.jit
    def step(params, x, targets):
        def loss(params):
            return jnp.mean(model.task.loss(stages.predict(model, params, state, x), targets))

        gradient = jax.grad(loss)(params)
        scaled = jax.tree.map(lambda g: -made.optimizer.learning_rate * g, gradient)
        return optax.apply_updates(params, scaled)

    for group in groups:
        x = np.concatenate([batch.x for batch in group]).astype(np.float64)
        y = np.concatenate([unwrapped(batch.targets) for batch in group])
        params = step(params, jnp.asarray(x), jnp.asarray(y))
    return params


#: Every task by the pipelined method, and every method by one task; the others in `make soak`.
PAIRS = [
    pytest.param(
        name, method,
        marks=[pytest.mark.soak] * (method != "pipar" and (name != "regression" or method == "fl")),
    )
    for name in TASKS
    for method in METHODS
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_task_trained_in_any_way_equals_centralised_training(
    double_numbers, name, method, tmp_path
):
    samples = SAMPLES[1:] if METHODS[method].one_device else SAMPLES
    made = setting(tmp_path, name, method, samples)
    made.task.metrics = "all"
    data = [examples(name, n, seed) for seed, n in enumerate((*samples, 9))]
    model = network(name).for_task(stages.make_task(name))
    events = []
    run = train(made, model, data, on_event=events.append)
    admitted = [support.admitted(pair, model) for pair in data]
    expected = centralised(made, model, admitted[:-1])
    assert support.largest_difference(run.params, expected) < RTOL
    _check_scores(run, model.task, admitted[-1], events)


def _check_scores(run, task, test, events):
    """Checks the last evaluation against outputs and targets of the test set."""
    y = unwrapped(test.test.targets)
    outputs = run.outputs(test.test.x)
    losses = np.asarray(task.loss(jnp.asarray(outputs), jnp.asarray(y)))
    assert run.score("loss") == pytest.approx(losses.mean(), rel=1e-6)
    (started,) = [one for one in events if one["event"] == "run_started"]
    assert started["task"] == task.facts() and task.main != "loss"
    (last,) = [one for one in events if one["event"] == "evaluated"]
    assert last["metrics"].keys() == task.scores.keys() - {"loss"}
    for whole in task.whole:
        found = (last["tables"] if whole.higher_is_better is None else last["metrics"])[whole.name]
        np.testing.assert_allclose(found, whole.compute(outputs, y), rtol=1e-6)
    assert run.score() == last["metrics"][task.main]
    done = [one for one in events if one["event"] == "round_finished"]
    assert all(one["metrics"].keys() == set(task.streamed) for one in done)
    with pytest.raises(RunError, match="has no score 'nothing'"):
        run.score("nothing")
    assert len(run.predict(test.test.x)) == len(y)


def test_a_metric_that_never_has_a_value_is_told_once(double_numbers, tmp_path):
    made = setting(tmp_path, "binary", "fl", (12,))
    made.epochs, made.run.evaluate_every, made.task.metrics = 2, 1, "auc"
    data = [examples("binary", n, seed) for seed, n in enumerate((12, 9))]
    data[-1] = data[-1][0], np.zeros(9, bool)  # no positive sample in the test set
    events = []
    train(made, network("binary"), data, on_event=events.append)
    (told,) = [one for one in events if one["event"] == "metrics_undefined"]
    assert told["names"] == ["auc", "recall"] and "auc and recall had no" in LINES[
        "metrics_undefined"
    ](told)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("regression", lambda x, y: (x, y[:, :2]), r"targets are float64\[2, 2\], expected float"),
        ("binary", lambda x, y: (x, y[:, None].repeat(2, 1)), r"with several labels"),
        ("binary", lambda x, y: (x, y + 1), r"target 2, expected 0 or 1"),
        ("multilabel", lambda x, y: (x, y * np.nan), r"not finite"),
        ("classification", lambda x, y: (x, y * 1.5), r"labels must be .* whole numbers"),
        ("classification", lambda x, y: (x, y - 1), r"label -1 is negative"),
        ("language", lambda x, y: (x, y - 1), r"label -2 is negative.*-1 stands for positions"),
        ("language", lambda x, y: (x, y[:, 0]), r"targets are int32\[2\], expected whole numbers"),
        ("regression", lambda x, y: (x, {"a": y, "b": y}), r"takes a single array"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_refused_in_one_line(
    double_numbers, name, change, reason, tmp_path
):
    made = setting(tmp_path, name, "fl", (12,))
    data = [change(*examples(name, n, seed)) for seed, n in enumerate((12, 9))]
    with pytest.raises((DataError, stages.StageError), match=reason) as error:
        train(made, network(name), data)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()) or "expected" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"task__name": "regresion"}, r"task.name='regresion' is not a task: did you mean"),
        ({"task__name": "module:mine"}, r"task.name='module:mine' is not a task"),
        ({"task__args": "smoothing=1"}, r"task.args=.* does not fit: .* no argument 'smoothing'"),
        ({"task__args": "nonsense"}, r"'nonsense' is not NAME=VALUE"),
        ({"task__args": "top_k=0.5"}, r"task.args='top_k=0.5' does not fit: .*top_k=0.5 is"),
        ({"task__metrics": "f2"}, r"task.metrics='f2' does not fit: .*no metric 'f2'"),
        ({"stop__metric": "f1"}, r"stop.metric='f1' is not a score .*add those .* by task.metrics"),
        ({"checkpoint__best": "acuracy"}, r"checkpoint.best='acuracy' .*did you mean 'accuracy'"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused_before_anything_starts(fields, reason, tmp_path):
    made = support.config(tmp_path, SAMPLES)
    made.data.source = "digits"
    for path, value in fields.items():
        group, name = path.split("__")
        setattr(getattr(made, group), name, value)
    with pytest.raises(ConfigError, match=reason):
        resolve(made)


@pytest.mark.parametrize("load", [datasets.prepare, datasets.load_server])
def test_a_public_data_set_has_classes_and_no_numbers(load, tmp_path):
    made = support.config(tmp_path, SAMPLES)
    made.data.source, made.task.name = "digits", "regression"
    with pytest.raises(DataError, match=r"does not fit data.source='digits', whose targets are"):
        load(resolve(made))


def page() -> dict[str, str]:
    """The Python files and commands that docs/tasks.md shows."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# mytask\.py\n(.*?)```", text, re.S)
    commands = [one.replace("\\\n", " ") for one in re.findall(r"```\n(pipar .*?)```", text, re.S)]
    return {"code": code, **{str(i): command for i, command in enumerate(commands)}}


def shown_config(command: str, tmp_path):
    """The configuration of a command of the page, made small."""
    made = support.config(tmp_path, (40, 40), name="mlp", dtype="float32", batch=40)
    made.data.source, made.data.train_samples, made.data.test_samples = "digits", 80, 40
    made.aggregation.every, made.run.evaluate_every, made.epochs = "epoch", 1, 3
    for path, value in re.findall(r"--config\.([\w.]+)=('[^']*'|\S+)", command):
        group, name = path.split(".")
        value = value.strip("'")
        number = isinstance(getattr(getattr(made, group), name), float) or name == "target"
        setattr(getattr(made, group), name, float(value) if number else value)
    return made


def test_the_page_shows_what_works(tmp_path, monkeypatch):
    """Both commands of the page, with fewer samples; the second stops by its own metric."""
    shown = page()
    (tmp_path / "mytask.py").write_text(shown["code"])
    monkeypatch.syspath_prepend(str(tmp_path))
    from pipar_jax.launch.api import run_here
    from pipar_jax.launch.finished_run import load

    runs = tmp_path / "runs"
    first = load(run_here(resolve(shown_config(shown["0"], runs)), on_event=lambda event: None))
    last = [one for one in first.metrics if one["event"] == "evaluated"][-1]
    assert last["metrics"].keys() == {"accuracy", "top3", "f1"}
    assert np.asarray(last["tables"]["confusion"]).sum() == 40
    made = shown_config(shown["1"], runs)
    made.stop.target = 1.0  # reached at once: lower is better
    second = load(run_here(resolve(made), on_event=lambda event: None))
    (last,) = [one for one in second.metrics if one["event"] == "evaluated"]
    assert last["metrics"].keys() == {"error", "surest"} and second.score() == second.score("error")
    assert 0 <= second.score() <= 1
    (stopped,) = [one for one in second.metrics if one["event"] == "stopped"]
    assert "error" in stopped["reason"] and "stop.target=1" in stopped["reason"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def make(): return 3", r"own task module:bad\w+:make returned int, expected a stages"),
        ("def make(): raise ValueError('no')", r"own task .* failed: ValueError: no .*bad\w+.py"),
        ("import stages\ndef make(): return stages.Task('t', lambda o, t: o.mean())",
         r"task 't': the loss is a scalar, expected \[samples\]"),
    ],
    ids=["no task", "bug", "scalar"],
)  # fmt: skip
def test_a_task_of_ones_own_that_does_not_work_is_one_line(
    code, reason, tmp_path, monkeypatch, request
):
    name = f"bad_{request.node.callspec.id.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = support.config(tmp_path / "runs", (40,), name="mlp", dtype="float32", method="fl")
    made.data.source, made.data.train_samples, made.task.name = "digits", 40, f"module:{name}:make"
    from pipar_jax.launch.api import run_here

    with pytest.raises((PiparError, stages.StageError), match=reason) as error:
        run_here(resolve(made), on_event=lambda event: None)
    assert "\n" not in str(error.value)
