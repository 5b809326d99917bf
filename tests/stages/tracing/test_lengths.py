"""A traced network for samples of several lengths: what is refused, since it would go unnoticed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stages
from stages.errors import StageError
from stages.lengths import padded_to

LONGEST, WIDTH = 8, 3


def halved(x: jax.Array) -> jax.Array:
    """Every second position, so that lengths 3 and 4 give two."""
    return jnp.tanh(x)[:, ::2]


def mean(params, x):
    return (halved(x @ params["a"]["w"]) @ params["b"]["w"]).mean(1)


def by_length(params, x):
    """The sum over positions, divided by a length that nobody behind the cut can see."""
    return (halved(x @ params["a"]["w"]) @ params["b"]["w"]).sum(1) / x.shape[1]


def with_positions(params, x):
    return (jnp.tanh(x @ params["a"]["w"]) + params["b"]["w"][None]).mean(1)


def traced(network, shape=(WIDTH, WIDTH)) -> stages.Model:
    rng = np.random.default_rng(0)
    params = {"a": {"w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)))},
              "b": {"w": jnp.asarray(rng.normal(size=shape))}}  # fmt: skip
    example = np.ones((1, LONGEST, WIDTH), np.float32)
    return stages.trace(network, example, params=params, name="net")


def test_lengths_may_look_alike_behind_a_cut_where_nothing_depends_on_them() -> None:
    model = padded_to(traced(mean), (3, 4, LONGEST))
    params, state = model.init(0)
    for length in (3, 4, LONGEST):
        x = np.random.default_rng(length).normal(size=(2, length, WIDTH)).astype(np.float32)
        np.testing.assert_allclose(
            stages.predict(model, params, state, x), mean(params, x), rtol=1e-5
        )


def test_a_length_that_is_used_behind_a_cut_is_refused_where_it_cannot_be_seen() -> None:
    with pytest.raises(StageError, match=r"something else with sequences of 4 than with 3"):
        padded_to(traced(by_length), (3, 4, LONGEST))


def test_so_it_is_where_the_same_model_has_seen_the_other_length_in_an_earlier_run() -> None:
    model = traced(by_length)
    padded_to(model, (3, LONGEST))
    with pytest.raises(StageError, match=r"something else with sequences of 4 than with 3"):
        padded_to(model, (4, LONGEST))


def test_weights_of_a_fixed_number_of_positions_are_refused() -> None:
    with pytest.raises(StageError, match=r"net"):
        padded_to(traced(with_positions, (LONGEST, WIDTH)), (4, LONGEST))
