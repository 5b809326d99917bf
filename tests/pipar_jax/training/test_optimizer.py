"""Every option of the optimiser, unit by unit, against plain optax on the whole tree."""

from __future__ import annotations

import dataclasses
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stages
from pipar_jax.config import OptimizerConfig, plugins
from pipar_jax.config.training_fields import OPTIMIZERS, SCHEDULES
from pipar_jax.errors import RunError
from pipar_jax.training import optimizer
from tests.pipar_jax.runtime import support
from tests.pipar_jax.training import brought

STEPS = 3
OWN = "module:tests.pipar_jax.training.brought"
#: For each field the values that are tried, and what they need to make a difference. A field that
#: is missing here fails: whoever adds an option says what it equals.
VALUES = {
    "name": [
        {"name": "sgd"}, {"name": "adam"}, {"name": "adamw"}, {"name": f"{OWN}:rmsprop"},
        {"name": f"{OWN}:listed"}, {"name": f"{OWN}:injected"},
        {"name": f"{OWN}:injected", "schedule": "linear"},
    ],
    "args": [{"name": f"{OWN}:rmsprop", "args": "decay=0.5"}],
    "learning_rate": [{"learning_rate": 0.5}],
    "groups": [{"groups": "one/=0.1 two=3"}, {"name": "adam", "groups": "'w$|a'=0"}],
    "momentum": [{"momentum": 0.0}, {"name": "adam", "momentum": 0.5}],
    "nesterov": [{"nesterov": True}, {"name": "adam", "nesterov": True}],
    "beta2": [{"name": "adam", "beta2": 0.5}],
    "epsilon": [{"name": "adam", "epsilon": 0.1}],
    "weight_decay": [
        {"name": name, "weight_decay": 0.1} for name in ("sgd", "adam", "adamw")
    ],
    "clip_norm": [{"clip_norm": 0.5}, {"clip_norm": 1e6}],
    "schedule": [
        *({"schedule": name, "drop_every": 1} for name in ("constant", "cosine", "linear", "step")),
        {"schedule": f"{OWN}:square_root"},
    ],
    "schedule_args": [{"schedule": f"{OWN}:square_root", "schedule_args": "power=2"}],
    "drop_every": [{"schedule": "step", "drop_every": 2}],
    "drop_factor": [{"schedule": "step", "drop_every": 1, "drop_factor": 0.5}],
    "warmup_steps": [{"warmup_steps": 2}, {"warmup_steps": 1, "schedule": "linear"},
                     {"warmup_steps": 1, "schedule": f"{OWN}:square_root"}],
}  # fmt: skip
CASES = [(field, values, mu) for field, some in VALUES.items() for values in some for mu in (0.0,)]
# Everything again where units are coupled, and where the round's weights pull.
CASES += [(field, {"clip_norm": 0.5, **values}, 0.3) for field, values, _ in CASES]


def reference(config: OptimizerConfig, mu: float, start) -> optax.GradientTransformation:
    """The same in optax's own words, on the whole tree."""
    rate, rest = config.learning_rate, STEPS - config.warmup_steps
    course = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "step": lambda count: rate * config.drop_factor ** (count // config.drop_every),
        f"{OWN}:square_root": brought.square_root(
            rate, **plugins.read_args(config.schedule_args), steps=rest
        ),
    }[config.schedule]
    if config.warmup_steps:
        ramp = [rate * (i + 1) / (config.warmup_steps + 1) for i in range(config.warmup_steps)]
        later = course

        def course(count):
            return jnp.where(count < len(ramp), jnp.take(jnp.array(ramp), count, mode="clip"),
                             later(count - len(ramp)))  # fmt: skip

    adam = {"b1": config.momentum, "b2": config.beta2, "eps": config.epsilon,
            "nesterov": config.nesterov}  # fmt: skip
    rule = {
        "sgd": lambda: optax.sgd(course, config.momentum, nesterov=config.nesterov),
        "adam": lambda: optax.adam(course, **adam),
        "adamw": lambda: optax.adamw(course, weight_decay=config.weight_decay, **adam),
        f"{OWN}:rmsprop": lambda: brought.rmsprop(
            course, **plugins.read_args(config.args), momentum=config.momentum
        ),
        f"{OWN}:listed": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(course)),
        f"{OWN}:injected": lambda: optax.adam(course),
    }[config.name]()
    pull = optax.stateless(lambda g, w: jax.tree.map(lambda g, w, a: g + mu * (w - a), g, w, start))
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    l2 = 0.0 if config.name == "adamw" else config.weight_decay
    factors = {unit: {path: factor(config, f"{unit}/{path}") for path in arrays}
               for unit, arrays in start.items()}  # fmt: skip
    groups = optax.stateless(lambda g, w: jax.tree.map(jnp.multiply, g, factors))
    return optax.chain(pull, clip, optax.add_decayed_weights(l2), rule, groups)


def factor(config: OptimizerConfig, name: str) -> float:
    """The factor of a weight's learning rate."""
    pairs = [(pair.rpartition("=")) for pair in shlex.split(config.groups)]
    return next((float(n) for pattern, _, n in pairs if re.search(pattern, name)), 1.0)


def weights():
    rng = np.random.default_rng(0)
    shapes = {"one": {"w": (3, 4), "b": (4,)}, "none": {}, "two": {"w": (4, 2)}, "three": {"a": ()}}
    return {
        unit: {path: jnp.asarray(rng.normal(size=shape), jnp.float32)
               for path, shape in arrays.items()}
        for unit, arrays in shapes.items()
    }  # fmt: skip


def gradients(params, step):
    return jax.tree.map(lambda w: jnp.cos(w * (step + 2)) * (step + 1), params)


def trained(config: OptimizerConfig, mu: float):
    """Trains unit by unit, as replicas do."""
    made = optimizer.compiled(config, steps=STEPS, proximal_mu=mu)
    params = weights()
    states = {unit: made.transformation.init(arrays) for unit, arrays in params.items()}
    for step in range(STEPS):
        params, states = made.update(params, states, gradients(params, step))
    return params, states


def close(ours, theirs) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def test_every_option_is_tried():
    fields = dataclasses.fields(OptimizerConfig)
    assert list(VALUES) == [field.name for field in fields]
    for field in fields:
        choices = field.metadata["choices"] or {"name": OPTIMIZERS, "schedule": SCHEDULES}.get(
            field.name, ()
        )
        tried = {one[field.name] for one in VALUES[field.name]}
        assert set(choices) - {field.default} <= tried, field.name


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("field", "values", "mu"), CASES)
def test_units_together_equal_optax_on_the_whole_tree(field, values, mu):
    config = OptimizerConfig(**{"learning_rate": 0.1, **values})
    ours, states = trained(config, mu)
    theirs = weights()
    tx = reference(config, mu, theirs)
    state = tx.init(theirs)
    for step in range(STEPS):
        updates, state = tx.update(gradients(theirs, step), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert close(ours, theirs)
    for unit, arrays in weights().items():  # a unit moves with a state of its own
        like = optimizer.build(config, steps=STEPS, proximal_mu=mu).init(arrays)
        assert jax.tree.structure(states[unit]) == jax.tree.structure(like)
    # An option that changed nothing would have been compared with nothing.
    plain = {k: v for k, v in values.items() if k != field}
    if values[field] not in (getattr(OptimizerConfig(), field), 1e6):
        assert not close(ours, trained(OptimizerConfig(**{"learning_rate": 0.1, **plain}), mu)[0])


def test_what_couples_units_is_marked_and_keeps_no_state():
    """Whatever is not marked must give the same for a unit alone as among others."""
    for _, values, mu in CASES:
        parts = optimizer.parts(OptimizerConfig(**values), steps=STEPS, proximal_mu=mu)
        params = weights()
        for part in parts:
            if isinstance(part, stages.Joint):
                assert part.init(params) == optax.EmptyState()
                continue
            whole, _ = part.update(gradients(params, 0), part.init(params), params)
            alone = {
                unit: part.update(gradients(params, 0)[unit], part.init(own), own)[0]
                for unit, own in params.items()
            }
            assert close(whole, alone)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": f"{OWN}:lookalike"}, r"own optimiser \S+ failed: TypeError: .*positional"),
        ({"name": f"{OWN}:scalar"}, "its updates came back as PyTreeDef"),
        ({"name": f"{OWN}:counting"}, r"state came back with float32.*, expected int32.* be lost"),
        ({"name": f"{OWN}:keyed"}, "its state has a .* key<fry>, expected arrays of numbers"),
        ({"name": f"{OWN}:fails"}, r"failed: ValueError: no such moment \(.*brought.py:\d+"),
        ({"name": f"{OWN}:nothing"}, "returned a NoneType, expected an optax.Gradient"),
        ({"name": f"{OWN}:ratesless"}, r"has no parameter 'learning_rate' \(known: none\)"),
        ({"name": f"{OWN}:injected", "beta2": 0.5}, r"has no parameter 'beta2'"),
        ({"name": f"{OWN}:rmsprop", "args": "dcay=1"}, "optimizer.args='dcay=1': .*no param"),
        ({"schedule": f"{OWN}:nothing"}, "returned a NoneType, expected a function from the"),
        ({"schedule": f"{OWN}:vector"}, r"gives float32\[3\] as learning rate"),
        ({"schedule": f"{OWN}:ratesless"}, "has no parameter 'learning_rate'"),
    ],
)
def test_mistakes_in_own_functions_are_reported_in_one_line(values, says):
    with pytest.raises((RunError, stages.StageError), match=says) as caught:
        trained(OptimizerConfig(**values), 0.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sgd", "adam", f"{OWN}:injected"])
def test_a_fresh_state_within_a_run_takes_the_learning_rate_of_the_moment(name):
    """Only the schedule's count is moved: Adam's belongs to its moments."""
    config = OptimizerConfig(name=name, momentum=0.9, schedule="linear", learning_rate=0.4)
    made = optimizer.compiled(config, steps=4)
    rates = []
    for step in range(4):
        params = {"unit": {"w": jnp.ones(2)}}
        state = optimizer.at_step({"unit": made.transformation.init(params["unit"])}, step)
        assert optimizer.at_step(state, step) is not state
        after, _ = made.update(params, state, {"unit": {"w": jnp.ones(2)}})
        rates.append(1 - float(after["unit"]["w"][0]))
    np.testing.assert_allclose(rates, [0.4, 0.3, 0.2, 0.1], rtol=1e-4)


def test_a_group_without_weights_is_refused():
    config = OptimizerConfig(groups="head=0.1 lora=10")
    with pytest.raises(RunError, match=r"no trained weight matches 'lora' .*such as head/w"):
        optimizer.check_groups(config, ["head/w"])


@pytest.mark.soak
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"schedule": f"{OWN}:warm"}, id="schedule"),
        pytest.param({"name": f"{OWN}:patient"}, id="name", marks=pytest.mark.soak),
    ],
)
def test_what_a_run_needs_many_steps_for_is_never_asked_for_a_few(tmp_path, fields):
    """In all places where there are states of an optimiser: a run with checkpoints and a tuner."""
    made = support.config(tmp_path, (14, 14), dtype="float32", method="auto")
    made.epochs, made.aggregation.every, made.checkpoint.every_rounds = 3, "epoch", 1
    made.optimizer.momentum = OptimizerConfig().momentum
    for name, value in fields.items():
        setattr(made.optimizer, name, value)
    support.trained(made, (14, 14))
