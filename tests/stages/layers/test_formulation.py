"""The choice of a formulation: measured for all registered networks, bound to kinds, forceable."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stages
from experiments.benchmarks import layer_formulations
from experiments.benchmarks.layer_formulations import SAMPLES
from stages.layers import Conv, formulation, max_pool
from stages.layers.formulation import (
    Formulation,
    LayerShape,
    choose,
    fastest,
    forced,
    is_naive,
    recorded,
)

NARROW = LayerShape(25, 2, 2, 512, 512, 3, 1, 1)
PASSES = {
    "conv": {"conv_forward", "conv_input", "conv_kernel"},
    "depthwise": {"depthwise"},
    "max_pool": {"max_pool"},
}
# No registered network has so many channels.
WINDOWS = [(size, stride, size // 2) for size in (2, 3, 4, 5, 7) for stride in (1, 2, 3)]
UNKNOWN = [
    LayerShape(30, height, width, 44, 52, *window)
    for height, width in itertools.product((1, 2, 3, 4, 6, 11), repeat=2)
    for window in [*WINDOWS, (3, 1, 0), (3, 1, 2), (1, 1, 0), (1, 2, 0)]
    if min(height, width) + 2 * window[2] >= window[0]
]


@pytest.fixture
def _measured(tmp_path, monkeypatch):
    """Returns a function that puts another table in the place of the measured one."""

    def replace(rows):
        layer_formulations.write(rows, tmp_path / "table.csv")
        monkeypatch.setattr(formulation, "TABLE", tmp_path / "table.csv")
        formulation.table.cache_clear()
        fastest.cache_clear()

    yield replace
    monkeypatch.undo()
    formulation.table.cache_clear()
    fastest.cache_clear()


def test_a_table_that_cannot_be_written_leaves_the_one_before(tmp_path):
    (path := tmp_path / "table.csv").write_text("measured")
    with pytest.raises(TypeError):
        layer_formulations.write([("conv", (1,), {"xla": 1.0}), ("conv", None, {})], path)
    assert path.read_text() == "measured"
    assert [one.name for one in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.soak
@pytest.mark.parametrize(
    "samples",
    [
        SAMPLES[-1:],
        pytest.param(SAMPLES, marks=pytest.mark.soak),
    ],
)
def test_every_layer_of_every_registered_network_has_a_row_of_its_own(samples):
    """For all shapes of samples, and for the smallest, whose layers are the oddest."""
    layers = layer_formulations.registered_shapes(1, samples)
    assert {layer for layer, _ in layers} == set(PASSES)
    # The convolution whose nearest measured neighbour was on the other side of a border.
    assert ("conv", LayerShape(1, 2, 2, 256, 512, 3, 2, 1)) in layers
    table = formulation.table()
    wanted = {(operation, shape[1:]) for layer, shape in layers for operation in PASSES[layer]}
    known = {(operation, row) for operation, rows in table.items() for row in rows}
    assert wanted - known == set(), "run `python -m experiments.benchmarks.layer_formulations`"
    if samples == SAMPLES:
        assert known - wanted == set(), "no registered network has these any more"
    for operation, rows in table.items():
        own = "patches" if operation.startswith("conv_") else "direct"
        for batches in rows.values():
            assert sorted(batches) == sorted(layer_formulations.BATCHES)
            assert all(set(times) == {"xla", own} for times in batches.values())


def test_what_is_traced_in_training_is_what_was_measured():
    model = stages.build("resnet18", input_shape=(8, 8, 1), classes=10, stem="imagenet")
    with recorded() as asked:
        stages.stage_facts(model, (), 25)
    assert {operation for operation, _ in asked} >= PASSES["conv"]
    table = formulation.table()
    assert all(shape[1:] in table[operation] for operation, shape in asked)
    assert all(shape.batch == 25 for _, shape in asked)


def test_layers_tell_their_shapes():
    conv = Conv(3, 8, 5, stride=2, rngs=nnx.Rngs(0))
    grouped = Conv(8, 8, 3, groups=8, rngs=nnx.Rngs(0))
    with recorded() as asked:
        jax.eval_shape(conv, jnp.ones((2, 9, 7, 3)))
        jax.eval_shape(grouped, jnp.ones((2, 9, 7, 8)))
        jax.eval_shape(lambda x: max_pool(x, 3, stride=2, padding=1), jnp.ones((2, 9, 7, 8)))
    assert asked == {
        ("conv_forward", LayerShape(2, 9, 7, 3, 8, 5, 2, 2)),
        ("depthwise", LayerShape(2, 9, 7, 8, 8, 3, 1, 1)),
        ("max_pool", LayerShape(2, 9, 7, 8, 8, 3, 2, 1)),
    }


@pytest.mark.parametrize("operation", sorted(formulation.table()))
def test_every_measured_shape_gets_what_was_fastest_for_it(operation):
    for row, batches in formulation.table()[operation].items():
        for batch, times in batches.items():
            assert times[fastest(operation, LayerShape(batch, *row)).value] == min(times.values())


@pytest.mark.parametrize("operation", sorted(PASSES["conv"]))
def test_an_unknown_shape_never_gets_a_naive_loop(operation):
    found = [shape for shape in UNKNOWN if is_naive(operation, shape)]
    assert len(found) > 50
    assert {fastest(operation, shape) for shape in found} == {Formulation.PATCHES}


def test_naive_loops_are_where_the_window_has_more_pixels_than_the_map():
    down = LayerShape(100, 2, 2, 256, 512, 3, 2, 1)
    assert is_naive("conv_forward", down) and is_naive("conv_input", down)
    assert not is_naive("conv_kernel", down)
    larger = LayerShape(100, 4, 4, 256, 512, 3, 2, 1)
    assert not is_naive("conv_forward", larger) and is_naive("conv_input", larger)
    assert not any(is_naive(name, LayerShape(100, 8, 8, 8, 8, 3, 2, 1)) for name in PASSES["conv"])
    # By area, not by side; a single pixel is a matrix product; a kernel of even size pads more.
    assert not is_naive("conv_forward", LayerShape(10, 2, 8, 64, 64, 3, 1, 1))
    assert is_naive("conv_forward", LayerShape(10, 1, 8, 64, 64, 3, 1, 1))
    assert not is_naive("conv_forward", LayerShape(10, 1, 1, 64, 64, 3, 1, 1))
    assert is_naive("conv_kernel", LayerShape(10, 4, 4, 64, 64, 2, 1, 1))
    # There XLA's compiler ends the process.
    assert is_naive("conv_input", LayerShape(42, 1, 6, 33, 3, 2, 2, 1))
    assert is_naive("conv_input", LayerShape(42, 9, 1, 33, 3, 2, 2, 1))
    assert not is_naive("max_pool", LayerShape(10, 2, 2, 64, 64, 3, 1, 1))


def test_the_nearest_shape_of_the_kind_and_the_nearest_batch_decide(_measured):
    xla, patches = {"xla": 1.0, "patches": 2.0}, {"xla": 2.0, "patches": 1.0}
    rows = [
        (LayerShape(10, 8, 8, 64, 64, 3, 1, 1), xla),
        (LayerShape(100, 8, 8, 64, 64, 3, 1, 1), patches),
        (LayerShape(10, 8, 8, 64, 64, 3, 2, 1), patches),
        (LayerShape(10, 8, 8, 64, 64, 1, 1, 0), patches),
        (LayerShape(10, 1, 1, 64, 64, 3, 1, 1), patches),
        # What a naive loop took says nothing about shapes of other kinds.
        (LayerShape(10, 2, 2, 64, 64, 3, 1, 1), patches),
    ]
    _measured([("conv_forward", shape, times) for shape, times in rows])
    for batch, expected in ((1, "xla"), (30, "xla"), (33, "patches"), (500, "patches")):
        assert fastest("conv_forward", LayerShape(batch, 8, 8, 64, 64, 3, 1, 1)).value == expected
    near = LayerShape(10, 3, 3, 32, 100, 3, 1, 1)
    assert fastest("conv_forward", near) is Formulation.XLA
    assert fastest("conv_forward", near._replace(stride=2)) is Formulation.PATCHES
    assert fastest("conv_forward", near._replace(size=1, padding=0)) is Formulation.PATCHES
    assert fastest("conv_forward", near._replace(height=1, width=1)) is Formulation.PATCHES
    # Where there is none of the kind, one that differs in least.
    assert fastest("conv_forward", near._replace(height=40, size=5)) is Formulation.XLA


def test_other_platforms_always_use_xla(monkeypatch):
    assert choose("conv_forward", NARROW) is Formulation.PATCHES
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("conv_forward", NARROW) is Formulation.XLA


def test_a_choice_can_be_forced_and_is_restored():
    with forced(Formulation.XLA):
        assert choose("conv_forward", NARROW) is Formulation.XLA
        with forced(None):
            assert choose("conv_forward", NARROW) is Formulation.PATCHES
    assert choose("conv_forward", NARROW) is Formulation.PATCHES


def test_measuring_writes_a_table_that_can_be_read_back(_measured):
    layers = [
        ("conv", LayerShape(2, 4, 4, 3, 2, 3, 2, 1)),
        ("depthwise", LayerShape(2, 4, 4, 3, 3, 3, 1, 1)),
        ("max_pool", LayerShape(2, 4, 4, 3, 3, 2, 2, 0)),
    ]
    _measured(layer_formulations.measure(layers))
    table = formulation.table()
    assert set(table) == set.union(*PASSES.values())
    assert set(table["conv_input"][4, 4, 3, 2, 3, 2, 1][2]) == {"xla", "patches"}
    (((row, batches),),) = (rows.items() for name, rows in table.items() if name == "max_pool")
    assert row == (4, 4, 3, 3, 2, 2, 0) and set(batches[2]) == {"xla", "direct"}
    for rows in table.values():
        for batches in rows.values():
            assert all(np.isfinite(value) and value > 0 for value in batches[2].values())


def _slower(layers, limit):
    """Operations whose chosen formulation takes more than so many times the fastest one's time.

    What seems slow is measured again: other work on the machine can hit one of two.
    """
    count, slow = 0, []
    for layer, shape in layers:
        for case in layer_formulations.cases(layer, shape):
            count += 1
            chosen = fastest(case.operation, shape).value
            for _ in range(3):
                times = layer_formulations.time_ms(case.functions, *case.arguments)
                if times[chosen] <= limit * min(times.values()):
                    break
            else:
                slow.append((case.operation, shape, times))
    return count, slow


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", layer_formulations.BATCHES)
def test_what_is_chosen_for_registered_networks_is_nearly_the_fastest(batch):
    _, slow = _slower(layer_formulations.registered_shapes(batch), 1.3)
    assert not slow


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_what_is_chosen_for_other_shapes_is_seldom_much_slower_than_the_fastest():
    known = formulation.table()["conv_forward"]
    layers = [("conv", shape) for shape in random_shapes(200) if shape[1:] not in known]
    count, slow = _slower(layers, 2.0)
    print(f"{len(slow)} of {count} passes over twice as slow as the fastest: {slow}")
    assert count > 500 and len(slow) <= 0.05 * count


def random_shapes(count):
    """Shapes of convolutions that somebody's network could have."""
    random = np.random.default_rng(0)
    found = []
    while len(found) < count:
        batch, height, features, out = (
            int(2 ** random.uniform(0, top)) for top in (7.0, 5.5, 9.0, 9.0)
        )
        width = height if random.random() < 0.7 else int(2 ** random.uniform(0, 5.5))
        size, stride = int(random.choice((1, 2, 3, 3, 4, 5, 7))), int(random.choice((1, 1, 2, 3)))
        shape = LayerShape(batch, height, width, features, out, size, stride, size // 2)
        work = batch * shape.slid(height) * shape.slid(width) * size**2 * features * out
        # XLA's compiler ends the process there: its formulation cannot be timed.
        broken = size == stride == 2 and 1 in (height, width)
        # No formulation takes minutes, not even a naive loop.
        if work < 5e8 and not broken:
            found.append(shape)
    return found
