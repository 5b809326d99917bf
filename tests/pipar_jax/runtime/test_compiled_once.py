"""Everything is compiled before the first round, and once for the hosts of a process."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

import stages
from pipar_jax.methods.registry import METHODS
from tests.pipar_jax.runtime import support

#: The functions of stages, private ones as well.
OF_STAGES = {
    f"jit({name})" for kind in ("forward", "backward", "loss") for name in (kind, f"_{kind}")
}
#: Every method, both dtypes that hosts compute samples in.
CASES = [(method, ("float32", "float64")[i % 2]) for i, method in enumerate(METHODS)]


def network_of(dtype):
    """A network of three units whose names do not rise: what is compiled sorts them."""

    def layer(inputs, outputs):
        def made(rngs):
            return nnx.Sequential(Flat(), nnx.Linear(inputs, outputs, param_dtype=dtype, rngs=rngs))

        return made

    units = [("low", layer(64, 12)), ("middle", layer(12, 11)), ("high", layer(11, 10))]
    return stages.Model.from_units(
        "own", units, support.SHAPE, support.CLASSES, input_dtype=np.dtype(dtype)
    )


class Flat(nnx.Module):
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_nothing_is_compiled_in_training_and_no_stage_again(
    compiled, method, dtype, tmp_path, request
):
    if dtype == "float64":
        request.getfixturevalue("double")
    network = network_of(dtype)
    chosen = METHODS[method]
    samples = (13,) if chosen.one_device else (7, 13)
    before, after = [], []

    def run(name):
        made = support.config(tmp_path / name, samples, method=method, dtype=dtype)
        made.pipeline.cut, made.pipeline.micro_batches = 1, 2 if chosen.cuts else 1
        if chosen.uses_nodes:
            made.nodes.count, made.pipeline.cuts = 1, "1,2" if chosen.labels_home else "1"
        events = Counts(compiled, {"run_started": before, "round_finished": after})
        support.trained(made, samples, network, events)

    run("first")
    assert OF_STAGES & {*compiled}
    assert compiled[before[0] : after[-1]] == []
    run("second")
    assert not OF_STAGES & {*compiled[before[0] :]}


class Counts(list):
    """Events, which counts what was compiled when some of them happened."""

    def __init__(self, compiled, counts):
        super().__init__()
        self._counts, self._compiled = counts, compiled

    def append(self, event):
        super().append(event)
        if event["event"] in self._counts:
            self._counts[event["event"]].append(len(self._compiled))
