"""Transforms of updates, and rules that bear liars."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipar_jax.aggregation.aggregator import Aggregator, Contribution
from pipar_jax.config import AggregationConfig, Config
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.methods.resolution import resolve
from pipar_jax.runtime.update_transforms import (
    arrive,
    compile_transforms,
    leave,
    update_transforms,
)
from pipar_jax.training.replica import Noise
from stages.release import bits_shape

START = {"u": {"w": np.zeros((3, 2), np.float32), "b": np.ones(2, np.float32)}}


def contribution(value, weight=1.0):
    params = {"u": {name: one + np.float32(value) for name, one in START["u"].items()}}
    return Contribution(params, {"u": {}}, weight)


def config(**fields):
    made = Config(method="fl")
    made.devices.count = 7
    made.aggregation.weighted = False
    for name, value in fields.items():
        setattr(made.aggregation, name, value)
    return resolve(made)


def values(contributions):
    return [float(np.asarray(one.params["u"]["w"])[0, 0]) for one in contributions]


def test_without_transforms_contributions_are_left_alone():
    made = [contribution(1.0), contribution(2.0, 3.0)]
    assert arrive(update_transforms(config(), None), START, made, 0) == made


def test_an_update_is_scaled_down_to_its_bound_on_both_sides():
    transforms = update_transforms(config(update_bound=1.0), None)
    norm = 8**0.5  # of an update of ones
    made = arrive(transforms, START, [contribution(1.0), contribution(0.1, 5.0)], 0)
    assert values(made) == pytest.approx([1 / norm, 0.1], rel=1e-4)
    assert [one.weight for one in made] == [1.0, 5.0]
    left = leave(transforms, START, contribution(1.0).params, 0)
    assert float(left["u"]["w"][0, 0]) == pytest.approx(1 / norm, rel=1e-4)


def test_multi_krum_leaves_out_what_is_far_from_the_rest():
    transforms = update_transforms(config(rule="multi_krum", liars=2), None)
    honest = [1.0, 1.1, 0.9, 1.05, 0.95]
    for lies in ((50.0, -3.0), (4.0, 4.01), (np.nan, np.inf)):
        given = [contribution(value) for value in (lies[0], *honest, lies[1])]
        assert values(arrive(transforms, START, given, 0)) == pytest.approx(honest)
    with pytest.raises(RunError, match="needs at least 7 devices that finish, got 6"):
        arrive(transforms, START, [contribution(1.0)] * 6, 0)


@pytest.mark.parametrize(("rule", "liars"), [("median", 0), ("trimmed_mean", 2)])
def test_coordinates_bear_liars(rule, liars):
    made = Aggregator(AggregationConfig(rule=rule, liars=liars), dict(START), {"u": {}})
    made.compile()
    honest = [1.0, 1.1, 0.9, 1.05, 0.95]
    made.aggregate([contribution(value) for value in (1e6, *honest, -1e7)])
    wanted = np.median(honest) if rule == "median" else np.mean([0.95, 1.0, 1.05])
    np.testing.assert_allclose(made.params["u"]["w"], wanted, rtol=1e-5)
    np.testing.assert_allclose(made.params["u"]["b"], 1 + wanted, rtol=1e-5)


def test_a_trimmed_mean_of_too_few_devices_is_refused():
    made = Aggregator(AggregationConfig(rule="trimmed_mean", liars=2), dict(START), {"u": {}})
    with pytest.raises(RunError, match="needs more than 4 devices"):
        made.aggregate([contribution(1.0)] * 4)


@pytest.mark.parametrize(("fields", "message"), [
    ({"liars": 1}, "do not fit"),
    ({"rule": "trimmed_mean"}, "do not fit"),
    ({"rule": "trimmed_mean", "liars": 4}, "needs at least 9 devices that finish a round, got 7"),
    ({"rule": "multi_krum", "liars": 3}, "needs at least 9 devices"),
    ({"rule": "median", "weighted": True}, "counts every device alike"),
])  # fmt: skip
def test_what_a_robust_rule_needs_is_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize("fields", [{"rule": "multi_krum", "liars": 1}, {"update_bound": 1.0}])
def test_whole_updates_are_those_of_fl(fields):
    made = Config()
    made.devices.count, made.aggregation.weighted = 7, False
    for name, value in fields.items():
        setattr(made.aggregation, name, value)
    with pytest.raises(ConfigError, match="looks at whole updates"):
        resolve(made)


@pytest.mark.parametrize(("fields", "message"), [
    ({"rule": "median"}, "adds noise to a sum"),
    ({"rule": "module:own:rule"}, "adds noise to a sum"),
    ({"update_bound": 1.0}, "bounded by privacy.update_clip"),
])  # fmt: skip
def test_noise_of_the_server_is_for_sums(fields, message):
    made = Config(method="fl")
    made.aggregation.weighted, made.model.norm = False, "group"
    made.privacy.epsilon, made.privacy.update_clip = 8.0, 1.0
    made.privacy.unit, made.privacy.noise_at = "user", "server"
    for name, value in fields.items():
        setattr(made.aggregation, name, value)
    with pytest.raises(ConfigError, match=message):
        resolve(made)


class Noted:
    """Noise, and what it was asked to do."""

    clip = 1.0

    def __init__(self):
        self.asked = []

    def observe(self, within, round_):
        self.asked.append("observe")

    def enter_update(self):
        self.asked.append("enter")

    def update_noise(self, round_, numbers):
        self.asked.append("noise")
        return Noise(np.ones(bits_shape(numbers), np.uint32), np.float32(0.5))


@pytest.mark.parametrize(("fields", "noise_at"), [
    ({"update_bound": 1.0}, ""), ({"rule": "multi_krum", "liars": 1}, ""), ({}, "device"),
    ({}, "server"),
])  # fmt: skip
def test_no_round_compiles_what_updates_pass(fields, noise_at, compiled):
    made = Config(method="fl")
    made.devices.count, made.aggregation.weighted, made.model.norm = 7, False, "group"
    for name, value in fields.items():
        setattr(made.aggregation, name, value)
    if noise_at:
        made.privacy.noise, made.privacy.update_clip = 1.0, 1.0
        made.privacy.unit, made.privacy.noise_at = "user", noise_at
    noise = Noted()
    transforms = update_transforms(resolve(made), noise)
    # A shape of its own for each case, which no other test has compiled.
    shape = (3, 40 + len(noise_at) + 20 * len(fields))
    weights = {"u": {"w": jnp.ones(shape), "b": jnp.ones(2)}}
    compile_transforms(transforms, weights)
    assert compiled and noise.asked == []
    jax.block_until_ready(weights)
    compiled.clear()
    trained = jax.tree.map(lambda one: np.asarray(one) + 1, weights)
    left = leave(transforms, weights, trained, 0)
    arrive(transforms, weights, [Contribution(left, {"u": {}}, 1.0)] * 7, 0)
    of_updates = {"clip_tree", "bound_tree", "add_noise", "_difference", "_sum"}
    assert not [name for name in compiled if name.removeprefix("jit(").rstrip(")") in of_updates]
    assert bool(noise.asked) == bool(noise_at)
