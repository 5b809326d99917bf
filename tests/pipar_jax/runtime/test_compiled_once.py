"""Everything is compiled before the first round, and once for the hosts of a process."""

from __future__ import annotations

import pytest

import stages
from pipar_jax.methods.registry import METHODS
from tests.pipar_jax.runtime import support

#: The functions of stages, private ones as well.
OF_STAGES = {
    f"jit({name})" for kind in ("forward", "backward", "loss") for name in (kind, f"_{kind}")
}
#: Every method, both dtypes that hosts compute samples in.
CASES = [(method, ("float32", "float64")[i % 2]) for i, method in enumerate(METHODS)]


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_no_stage_is_compiled_in_training_or_again(compiled, method, dtype, tmp_path, request):
    if dtype == "float64":
        request.getfixturevalue("double")
    network = stages.build("mlp", input_shape=support.SHAPE, classes=support.CLASSES, dtype=dtype)
    chosen = METHODS[method]
    samples = (13,) if chosen.one_device else (7, 13)
    before = []

    def run(name):
        made = support.config(tmp_path / name, samples, method=method, dtype=dtype)
        made.pipeline.cut, made.pipeline.micro_batches = 1, 2 if chosen.cuts else 1
        if chosen.uses_nodes:
            made.nodes.count, made.pipeline.cuts = 1, "1,2" if chosen.labels_home else "1"
        events = Starts(before, compiled)
        support.trained(made, samples, network, events)

    run("first")
    assert OF_STAGES & {*compiled}
    run("second")
    assert not OF_STAGES & {*compiled[before[0] :]}


class Starts(list):
    """Events, which counts what was compiled when a run started."""

    def __init__(self, counts, compiled):
        super().__init__()
        self._counts, self._compiled = counts, compiled

    def append(self, event):
        super().append(event)
        if event["event"] == "run_started":
            self._counts.append(len(self._compiled))
