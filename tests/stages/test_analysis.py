"""Facts found without running equal what a run shows."""

from __future__ import annotations

import jax
import pytest

import stages
from tests.stages.support import batch


@pytest.fixture(scope="module")
def vgg():
    return stages.build("vgg5", input_shape=(32, 32, 3), classes=10)


def test_unit_facts_of_vgg5(vgg):
    facts = stages.unit_facts(vgg, 4)
    assert sum(row.parameters for row in facts) == 582_346
    assert [row.units for row in facts] == [(name,) for name in vgg.unit_names]
    assert facts[0].output_shape == (4, 16, 16, 32)
    assert facts[0].output_bytes == 4 * 16 * 16 * 32 * 4
    assert facts[0].state_bytes == 2 * 32 * 4
    # 3x3x3 products and sums for each of 32 channels and 32x32 pixels, less the border.
    ideal = 4 * 2 * 27 * 32 * 32 * 32
    assert 0.9 * ideal < facts[0].forward_flops < 1.5 * ideal
    assert facts[1].backward_flops > 1.5 * facts[1].forward_flops


def test_residual_bytes_equal_those_of_a_run(vgg):
    params, state = vgg.init(0)
    x, _ = batch(vgg, 4)
    for rematerialise in (False, True):
        first, _ = stages.split(vgg, (2,), rematerialise=rematerialise)
        own, stats = stages.select(first, params), stages.select(first, state)
        _, residuals, _ = first.forward(own, stats, x, stages.make_draw(4))
        (facts, _) = stages.stage_facts(vgg, (2,), 4, rematerialise=rematerialise)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(residuals) if leaf.ndim)
        assert facts.residual_bytes == held


def test_stages_sum_up_their_units(vgg):
    parts = stages.stage_facts(vgg, (2,), 3)
    units = stages.unit_facts(vgg, 3)
    assert parts[0].parameters == units[0].parameters + units[1].parameters
    assert parts[1].parameter_bytes == sum(row.parameter_bytes for row in units[2:])
    assert parts[0].output_shape == units[1].output_shape


def test_decoders_have_facts_too():
    model = stages.build("decoder_small", input_shape=(16,), classes=50)
    facts = stages.unit_facts(model, 2)
    assert facts[0].output_shape == (2, 16, 128)
    assert facts[-1].output_shape == (2, 16, 50)
