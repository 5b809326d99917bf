"""The family of averages on the pseudo-gradient, against formulas written out in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stages
from pipar_jax.aggregation import aggregator
from pipar_jax.aggregation.aggregator import Aggregator, Contribution, broken_units
from pipar_jax.aggregation.rules import COMBINATIONS, RULES
from pipar_jax.config import AggregationConfig, OptimizerConfig
from pipar_jax.errors import RunError
from pipar_jax.training import optimizer


def variables(seed: int) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    params = {"a": {"kernel": rng.normal(size=(3, 2))}, "b": {"bias": rng.normal(size=4)}}
    state = {"a": {"mean": rng.normal(size=3)}, "b": {}}
    cast = lambda tree: {  # noqa: E731
        u: {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()} for u, arrays in tree.items()
    }
    return cast(params), cast(state)


def rounds_of(config: AggregationConfig, count: int):
    """Runs the aggregator for some rounds; yields (old, mean, new) of one weight as float64."""
    params, state = variables(0)
    made = Aggregator(config, params, state)
    for index in range(count):
        old = np.asarray(made.params["a"]["kernel"], np.float64)
        replicas = [
            Contribution(*variables(10 * index + d + 1), weight=w) for d, w in ((0, 3), (1, 1))
        ]
        mean = sum(
            w * np.asarray(one.params["a"]["kernel"], np.float64)
            for one, w in zip(replicas, (0.75, 0.25), strict=True)
        )
        made.aggregate(replicas)
        yield old, mean, np.asarray(made.params["a"]["kernel"], np.float64)


def expected(config: AggregationConfig, history):
    """The rules as their papers write them."""
    m = v = None
    for old, mean, new in history:
        delta = mean - old
        b1, b2, tau, rate = config.momentum, config.beta2, config.epsilon, config.learning_rate
        if config.rule == "fedavg":
            step = delta
        elif config.rule == "fedavgm":
            m = delta if m is None else b1 * m + delta
            step = m
        else:
            m = (1 - b1) * delta if m is None else b1 * m + (1 - b1) * delta
            v = np.full_like(delta, tau**2) if v is None else v
            if config.rule == "fedadagrad":
                v = v + delta**2
            elif config.rule == "fedadam":
                v = b2 * v + (1 - b2) * delta**2
            else:
                v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
            step = m / (np.sqrt(v) + tau)
        yield old + rate * step, new


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_its_papers_formula(rule):
    config = AggregationConfig(rule=rule, learning_rate=1.0 if rule == "fedavg" else 0.1)
    for wanted, new in expected(config, rounds_of(config, 4)):
        np.testing.assert_allclose(new, wanted, rtol=2e-5, atol=1e-6)


def test_batch_statistics_take_the_weighted_mean_under_every_rule():
    for rule in RULES:
        params, state = variables(0)
        made = Aggregator(AggregationConfig(rule=rule), params, state)
        one, other = variables(1), variables(2)
        made.aggregate([Contribution(*one, weight=1.0), Contribution(*other, weight=4.0)])
        wanted = 0.2 * one[1]["a"]["mean"] + 0.8 * other[1]["a"]["mean"]
        np.testing.assert_allclose(made.state["a"]["mean"], wanted, rtol=1e-6)


def test_a_unit_is_averaged_over_whoever_holds_it():
    params, state = variables(0)
    made = Aggregator(AggregationConfig(), params, state)
    first, second = variables(1), variables(2)
    only_b = Contribution({"b": second[0]["b"]}, {"b": {}}, weight=1.0)
    made.aggregate([Contribution(*first, weight=1.0), only_b])
    np.testing.assert_allclose(made.params["a"]["kernel"], first[0]["a"]["kernel"], rtol=1e-6)
    wanted = (first[0]["b"]["bias"] + second[0]["b"]["bias"]) / 2
    np.testing.assert_allclose(made.params["b"]["bias"], wanted, rtol=1e-6)


def test_compiling_ahead_changes_nothing():
    params, state = variables(0)
    made = Aggregator(AggregationConfig(rule="fedadam"), params, state)
    made.compile()
    np.testing.assert_array_equal(made.params["a"]["kernel"], variables(0)[0]["a"]["kernel"])


@jax.jit
def one_program(old, replicas, weights):
    """FedAvg of all replicas in one compiled program, as it would be written down."""
    shares = weights / jnp.sum(weights)
    mean = sum(share * one for share, one in zip(shares, replicas, strict=True))
    return old + -1.0 * (old - mean)


def compiled(caplog):
    """Returns what jax has said of its compilations."""
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("count", range(1, 8))
def test_any_number_of_replicas_is_averaged_by_the_same_step_to_the_same_bits(count, caplog):
    rng = np.random.default_rng(count)
    old, *some = (rng.normal(size=(33, count)).astype(np.float32) for _ in range(count + 1))
    weights = rng.integers(1, 1000, count).astype(np.float32)
    made = Aggregator(AggregationConfig(), {"a": {"w": jnp.asarray(old)}}, {"a": {}})
    replicas = [
        Contribution({"a": {"w": jnp.asarray(one)}}, {"a": {}}, float(weight))
        for one, weight in zip(some, weights, strict=True)
    ]
    with jax.log_compiles():
        made.compile()
        assert "fold" in compiled(caplog)
        caplog.clear()
        made.aggregate(replicas)
        assert "fold" not in compiled(caplog)
    np.testing.assert_array_equal(made.params["a"]["w"], one_program(old, some, weights))


def test_fedprox_pulls_towards_the_rounds_weights():
    tx = optimizer.build(OptimizerConfig(learning_rate=0.1, momentum=0.0), steps=1, proximal_mu=2.0)
    start = {"w": jnp.array([1.0, -1.0])}
    state = {"unit": tx.init(start)}
    moved = {"w": jnp.array([2.0, 0.0])}
    zero = {"w": jnp.zeros(2)}
    updates, _ = tx.update(zero, state["unit"], moved)
    np.testing.assert_allclose(updates["w"], -0.1 * 2.0 * np.array([1.0, 1.0]), rtol=1e-6)
    renewed = optimizer.anchor(state, {"unit": moved})
    updates, _ = tx.update(zero, renewed["unit"], moved)
    np.testing.assert_allclose(updates["w"], [0.0, 0.0])


def test_without_fedprox_a_new_round_leaves_the_optimiser_alone():
    tx = optimizer.build(OptimizerConfig(), steps=1)
    state = {"unit": tx.init({"w": jnp.ones(2)})}
    assert optimizer.anchor(state, {"unit": {"w": jnp.zeros(2)}}) == state


def test_the_step_size_warms_up_and_decays():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=3)
    course = optimizer.learning_rate(config, 11)
    assert [round(float(course(i)), 4) for i in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1.0]
    assert float(course(7)) == pytest.approx(0.5)
    assert float(course(11)) == pytest.approx(0.0)


OWN = "module:tests.pipar_jax.training.brought"


def averaged(rule, **values):
    """The weights after a round of three replicas under a rule, and the replicas'."""
    params, state = variables(0)
    made = Aggregator(AggregationConfig(rule=rule, **values), params, state)
    made.compile()
    replicas = [Contribution(*variables(d), weight=w) for d, w in ((1, 3.0), (2, 1.0), (3, 2.0))]
    made.aggregate(replicas)
    return made, [np.asarray(one.params["a"]["kernel"], np.float64) for one in replicas]


def test_a_rule_of_the_users_takes_the_place_of_the_mean():
    start = np.asarray(variables(0)[0]["a"]["kernel"], np.float64)
    made, replicas = averaged(f"{OWN}:median", learning_rate=0.5)
    wanted = start + 0.5 * np.median([one - start for one in replicas], axis=0)
    np.testing.assert_allclose(made.params["a"]["kernel"], wanted, rtol=1e-5)
    mean = averaged(f"{OWN}:mean")[0]
    like = averaged("fedavg")[0]
    for unit, arrays in like.params.items():
        for path, array in arrays.items():
            np.testing.assert_allclose(mean.params[unit][path], array, rtol=1e-5)
    np.testing.assert_array_equal(made.state["a"]["mean"], like.state["a"]["mean"])


def test_a_rule_of_the_users_is_an_optimiser_of_the_server():
    start = variables(0)[0]["a"]
    made, replicas = averaged(f"{OWN}:adam_of_server", learning_rate=0.1, beta2=0.5)
    mean = sum(w * one for w, one in zip((3 / 6, 1 / 6, 2 / 6), replicas, strict=True))
    tx = optax.adam(0.1, b2=0.5)
    updates, _ = tx.update({"kernel": start["kernel"] - mean}, tx.init(start), start)
    np.testing.assert_allclose(
        made.params["a"]["kernel"], start["kernel"] + updates["kernel"], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("rule", "values", "says"),
    [
        ("first", {}, r"its delta came back with float32\[\d, 3, 2\], expected float32\[3, 2\]"),
        ("breaks", {}, r"own rule \S+ failed: ValueError: no replicas \(.*brought.py:\d+"),
        ("nothing", {}, "returned a NoneType, expected an optax.GradientTransformation or"),
        ("median", {"args": "trim=1"}, r"aggregation.args='trim=1': .*no parameter 'trim'"),
    ],
)
def test_mistakes_in_a_rule_of_the_users_are_reported_in_one_line(rule, values, says):
    with pytest.raises((RunError, stages.StageError), match=says) as caught:
        averaged(f"{OWN}:{rule}", **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_a_unit_with_any_number_that_is_not_finite_is_broken(dtype, array):
    most = float(jnp.finfo(dtype).max)
    for value, broken in ((np.nan, True), (np.inf, True), (-np.inf, True), (most, False)):
        one = np.full((5, 3), most, dtype)  # whose sum is not finite either
        one[4, 2] = value
        parts = {"a": {"w": array(one)}, "b": {"n": array(np.ones(3, np.int32))}}, {"b": {}}
        assert broken_units(["b", "a"], *parts) == (("a",) if broken else ())
    assert broken_units(["a"], {"a": {"w": array(np.array([np.inf, -np.inf], dtype))}}) == ("a",)


@pytest.mark.parametrize("rule", [*RULES, *COMBINATIONS])
@pytest.mark.parametrize("count", [1, 3])
def test_small_arrays_that_are_averaged_together_have_the_bits_of_each_by_itself(
    rule, count, monkeypatch
):
    shapes = {"z": (7, 3), "a": (), "m": (5,), "long": (40, 3), "half": (6,), "empty": (0, 2)}

    def drawn(seed: int) -> tuple[dict, dict]:
        rng = np.random.default_rng(seed)
        made = {path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}
        made["half"] = made["half"].astype(jnp.bfloat16)
        return {"u": made, "bare": {}}, {"u": {**made, "steps": jnp.arange(3) + seed}, "bare": {}}

    found = []
    for small in (50, 0):
        monkeypatch.setattr(aggregator, "SMALL", small)
        config = AggregationConfig(rule=rule, learning_rate=0.7, liars=1 if count > 2 else 0)
        made = Aggregator(config, *drawn(9))
        made.compile()
        for index in range(2):
            made.aggregate(
                [Contribution(*drawn(4 + d), weight=1.0 + d + index) for d in range(count)]
            )
        found.append(jax.tree.map(np.asarray, (made.params, made.state, made.rule_state)))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert found[0][0]["u"]["half"].dtype == jnp.bfloat16
