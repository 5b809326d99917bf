"""Compiler options of stages, and stages inside other traced functions."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages import program as module
from stages.layers.conv_functions import Geometry, xla_convolve
from stages.program import Program, compiler_options


@pytest.fixture
def afresh():
    """What was found out about this platform is found out again, before and after."""
    compiler_options.cache_clear()
    yield
    compiler_options.cache_clear()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)


def convolved(x, kernel):
    return xla_convolve(x, kernel, Geometry(3, 1, 1))


IMAGES, KERNEL = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs have options")
def test_convolutions_are_xlas_own_on_cpus():
    if not compiler_options():
        pytest.skip("this version of XLA does not know the option")
    assert " convolution(" in Program(convolved).lower(IMAGES, KERNEL).compile().as_text()


def test_a_program_inside_a_traced_function_is_a_part_of_it():
    program = Program(lambda x, kernel: convolved(x, kernel) ** 2)
    expected = program(IMAGES, KERNEL)
    np.testing.assert_allclose(jax.jit(program)(IMAGES, KERNEL), expected)
    # Traced though none of its arguments is.
    np.testing.assert_allclose(jax.jit(lambda: program(IMAGES, KERNEL))(), expected)
    gradient = jax.grad(lambda kernel: program(IMAGES, kernel).sum())(KERNEL)
    wanted = jax.grad(lambda kernel: (convolved(IMAGES, kernel) ** 2).sum())(KERNEL)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)
    assert jax.eval_shape(program, IMAGES, KERNEL).shape == expected.shape


LATE = """
import sys
import jax, stages
model = stages.build("mlp", input_shape=(8, 8, 1), classes=10)
params, state = model.init(0)
x = jax.numpy.ones((2, 8, 8, 1))
assert "stages.program" not in sys.modules
jax.grad(lambda params: stages.predict(model, params, state, x).sum())(params)
program = sys.modules["stages.program"]
assert program.get_opaque_trace_state() == program._OUTSIDE
"""


def test_programs_may_be_loaded_while_a_function_is_traced():
    subprocess.run([sys.executable, "-c", LATE], check=True)


def test_donated_arguments_are_given_away():
    program = Program(lambda x: x + 1, donate_argnums=(0,))
    x = jnp.zeros(1000)
    program(x)
    assert x.is_deleted()


def test_what_the_user_tells_xla_stands(afresh, monkeypatch, two_cores):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert compiler_options() == {}


def test_a_version_that_does_not_know_the_option_does_without(afresh, monkeypatch, two_cores):
    monkeypatch.setattr(module, "LIBRARY", "xla_cpu_of_another_version")
    assert compiler_options() == {}
    assert Program(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("cores", [1, 2])
def test_only_what_has_several_cores_orders_its_work_for_them(afresh, monkeypatch, cores):
    whole = Program(lambda x: (x @ x, jnp.sin(x)))(jnp.ones((8, 8)))
    compiler_options.cache_clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert (module.CONCURRENT in compiler_options()) == (cores == 1)
    ordered = Program(lambda x: (x @ x, jnp.sin(x)))(jnp.ones((8, 8)))
    jax.tree.map(np.testing.assert_array_equal, ordered, whole)
    compiler_options.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", f"--{module.CONCURRENT}=true")
    assert module.CONCURRENT not in compiler_options()


def test_other_platforms_get_no_options(afresh, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() == {}
