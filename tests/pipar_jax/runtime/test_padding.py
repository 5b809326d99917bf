"""Mini-batches padded to a few lengths train as unpadded ones do, by every method."""

from __future__ import annotations

import numpy as np
import pytest

from pipar_jax.config.texts import whole_numbers
from pipar_jax.errors import DataError
from pipar_jax.launch.api import train
from pipar_jax.methods.registry import METHODS, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.actions import RECEIVE_BACKWARD, RECEIVE_FORWARD
from stages.lengths import padded_to, variants
from tests.pipar_jax.runtime import sequences, support
from tests.pipar_jax.runtime.test_compiled_once import OF_STAGES

RTOL = 1e-9


def cases():
    """Both networks by every method; the second by one is enough for `make test`."""
    soaked = {("writer", method) for method in METHODS if method != "mpsl"}
    return [
        pytest.param(name, method, marks=[pytest.mark.soak] * ((name, method) in soaked))
        for name in ("reader", "writer")
        for method in METHODS
    ]


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize(("name", "method"), cases())
def test_a_run_equals_training_in_one_place_without_padding(
    double, name, method, tmp_path, compiled
):
    samples = sequences.samples_of(method)
    made = sequences.setting(tmp_path, method, samples)
    fresh = sequences.network(name)  # of which nothing is compiled yet
    started: list[int] = []

    def told(event):
        if event["event"] == "run_started":
            started.append(len(compiled))

    run = sequences.trained(made, fresh, samples, told)
    before, after = compiled[: started[0]], compiled[started[0] :]
    assert not OF_STAGES & {*after}
    assert len([name for name in before if name in OF_STAGES]) == functions_of(made, fresh)
    devices = sequences.loaders(made, name, samples)
    check_what_crossed(run.trace(), devices)
    groups = sequences.steps_of(method, devices)
    lengths = {batch.x.shape[1] for group in groups for batch in group}
    assert lengths == {length for one in devices for length in one.steps_by_length()}
    assert len(lengths) > 1  # else nothing varies
    expected = sequences.centralised(made, name, groups)
    assert support.largest_difference(run.params, expected) < RTOL


def functions_of(made, network) -> int:
    """How many functions of stages there are: of each length that they see, and no other size."""
    plan = plan_for(resolve(made, models=("mlp",), reads_data=False), network.unit_names)
    forms = [
        form.shapes(1) for form in variants(padded_to(network, whole_numbers(made.data.pad_to)))
    ]
    count = len(network.units)
    stages = {
        (units[0], units[-1] + 1)
        for place, device in enumerate(plan.devices)
        for units in (plan.units(place, stage, count) for stage in range(device.stages))
    }
    return sum(
        (1 if stop == count else 2) * len({(form[start].shape, form[stop].shape) for form in forms})
        for start, stop in stages
    )


def check_what_crossed(trace, devices) -> None:
    """Checks that each tensor that was received is as long as the mini-batch of its step."""
    for rows in trace.hosts.values():
        for row in rows:
            action = row.action
            if action.kind in (RECEIVE_FORWARD, RECEIVE_BACKWARD):
                length, rest = divmod(row.nbytes, row.samples * sequences.WIDTH * 8)
                assert not rest
                # Behind the last token, which one network takes out, nothing has positions.
                assert length in (1, devices[action.device].length(action.step))
                below = action.stage - (action.kind == RECEIVE_FORWARD)
                assert length > 1 or below == 2


@pytest.mark.parametrize("method", ["pipar", pytest.param("sl", marks=pytest.mark.soak)])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(double, method, tmp_path):
    network = sequences.network("reader")

    def run(folder, epochs, resume=""):
        made = sequences.setting(tmp_path / folder, method)
        made.epochs, made.run.resume, made.checkpoint.every_rounds = epochs, resume, 1
        made.aggregation.every = "epoch"
        return sequences.trained(made, network, sequences.SAMPLES)

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2, "auto")
    assert support.largest_difference(parts.params, whole.params) == 0.0


def test_a_finished_run_predicts_lists_of_sequences_of_any_length(double, tmp_path):
    made = sequences.setting(tmp_path, "fl", (8,))
    run = sequences.trained(made, sequences.network("reader"), (8,))
    inputs, _ = sequences.pairs("reader", (8,))[-1]
    whole = run.outputs(inputs)
    assert whole.shape == (6, sequences.CLASSES)
    first = {"x": inputs["x"][0][None], "lengths": inputs["lengths"][:1]}
    np.testing.assert_allclose(run.outputs(first), whole[:1], rtol=1e-12)
    with pytest.raises(DataError, match=r"must be \[batch, 6\], got shape \(1, 7\)"):
        run.outputs({"x": np.zeros((1, 7), int), "lengths": [7]})


CHANGES = {
    "a sample is too long": (
        lambda x, y: ({"x": [*x["x"][:7], np.zeros(7, int)], "lengths": [1] * 8}, y),
        r"d0: .*sample 7 has 7 positions, and data.pad_to goes to 6",
    ),
    "nothing says how long samples are": (
        lambda x, y: ({"x": np.zeros((8, 6), int)}, y),
        "data.pad_to needs the length of each sample",
    ),
    "a length is not valid": (
        lambda x, y: ({"x": np.zeros((8, 6), int), "lengths": [0] * 8}, y),
        "side input lengths of sample 0 is 0, expected 1 to 6",
    ),
    "targets are of positions and all count": (
        lambda x, y: (x, [np.zeros(len(one), int) for one in x["x"]]),
        "the loss of the task would count padded ones",
    ),
    "samples differ in more than their length": (
        lambda x, y: ({**x, "x": [np.zeros((2, i % 2 + 1), int) for i in range(8)]}, y),
        "behind their first axis, which alone may vary",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_cannot_be_padded_are_refused_before_anything_starts(double, change, tmp_path):
    made = sequences.setting(tmp_path, "pipar")
    first, *others = sequences.pairs("reader")
    changed, says = CHANGES[change]
    with pytest.raises(DataError, match=says):
        train(made, sequences.network("reader"), [changed(*first), *others])
    assert not (tmp_path / "run").exists()
