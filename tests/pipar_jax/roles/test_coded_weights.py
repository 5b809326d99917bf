"""With a lossy ``aggregation.codec`` the global weights are what hosts hold, bit for bit."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from comms import codec_names
from pipar_jax.methods.personal_checks import averaging_methods
from pipar_jax.runtime.host import Host
from tests.patience import PATIENCE_S
from tests.pipar_jax.roles.open_runs import OpenRun, Points, config, equal
from tests.pipar_jax.roles.test_checkpoints import assert_equal, resumed, samples_of, setting
from tests.pipar_jax.runtime import support

LOSSY = [name for name in codec_names() if name != "raw"]


def cases(methods, quick):
    """All methods with all codecs; most of them for `make soak`."""
    for method in methods:
        for codec in LOSSY:
            marks = [] if method == methods[0] or codec == quick else [pytest.mark.soak]
            yield pytest.param(method, codec, marks=marks, id=f"{method} {codec}")


@pytest.mark.sampled(4, 1)
@pytest.mark.parametrize(("method", "codec"), list(cases(averaging_methods(), "int4")))
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(double, tmp_path, method, codec):
    def trained(folder, epochs, resume=False):
        made = setting(tmp_path / folder, method, epochs, every_rounds=1)
        made.aggregation.codec = codec
        return support.trained(resumed(made, epochs) if resume else made, samples_of(method))

    whole = trained("whole", 2)
    trained("parts", 1)
    assert_equal(trained("parts", 2, resume=True), whole)


class Given:
    """What hosts are given of each weight, in the order in which it comes."""

    def __init__(self, monkeypatch) -> None:
        self.weights: dict[str, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        given, push = self, Host.push

        def note(self, why, states):
            if why.step is None and why.plan is None:
                given.note(states)
            push(self, why, states)

        monkeypatch.setattr(Host, "push", note)

    def note(self, states) -> None:
        with self._lock:
            for (_, unit), one in states.items():
                for path, array in (one.params or {}).items():
                    seen = self.weights.setdefault(f"{unit}/{path}", [])
                    if not any(np.array_equal(array, before) for before in seen):
                        seen.append(np.array(array))


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize(("method", "codec"), list(cases(("pipar", "fl"), "int4")))
def test_all_that_are_given_the_weights_of_a_moment_are_given_the_same(
    tmp_path, monkeypatch, method, codec
):
    """Also the server's own host, whoever is back, and all after a round that was undone."""
    given, points = Given(monkeypatch), Points(monkeypatch)
    made = config(tmp_path, method, rounds=3, quorum=3, below="repeat", wait_s=PATIENCE_S)
    made.aggregation.codec, made.optimizer.momentum = codec, 0.0
    if method == "pipar":  # so that units of one device are on the server for another
        made.devices.overrides = {1: {"cut": 2}}
    undisturbed = OpenRun(made).run(range(3)).weights()
    made.name, given.weights = "disturbed", {}
    run = OpenRun(made, when=lambda run, e: e["event"] == "device_lost" and run.start(1))

    points.once("count", "server", 1, lambda: run.end(1))
    run.run(range(3))
    assert not points.hooks
    weights = run.weights()
    assert equal(weights, undisturbed)
    for name, seen in given.weights.items():
        assert len(seen) <= 3, name  # of each round one
        np.testing.assert_array_equal(seen[-1], weights[name])
