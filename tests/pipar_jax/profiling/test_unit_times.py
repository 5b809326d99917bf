"""Measuring a host: every unit gets times and bytes, and nothing is measured twice."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from flax import nnx

import stages
from pipar_jax.config import Config
from pipar_jax.config.codec_candidates import CodecCandidates
from pipar_jax.config.slowdown import UNSLOWED, Slowdown
from pipar_jax.cost_model.profile import NO_HANDLING, RuntimeOverhead
from pipar_jax.errors import RunError
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling import rehearsal, unit_times
from pipar_jax.profiling.codec_times import measure_codecs
from pipar_jax.profiling.predictor.predict_host import facts_of
from pipar_jax.profiling.rehearsal import measure_handling, measure_message_s
from pipar_jax.profiling.unit_times import emulated
from pipar_jax.schedule.actions import BACKWARD, FORWARD, UPDATE
from pipar_jax.schedule.plan import COORDINATOR, OWNER, DevicePlan, Plan
from pipar_jax.simulator.predict import HostTimes, StageCosts
from pipar_jax.training import optimizer
from pipar_jax.training.compile import Shape
from tests.pipar_jax.runtime import support
from tests.pipar_jax.tuner import profiles

SIZES = (2, 8)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Config:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Config()
    made.model.name, made.model.norm = "mlp", "group"
    return resolve(made)


def test_the_longest_unit_is_timed_at_the_longest_length_alone(settings, monkeypatch):
    found = {
        Shape(("a", "a"), kind, 8, length): float(seconds)
        for kind, length, seconds in (
            (FORWARD, 4, 1), (FORWARD, 8, 2), (BACKWARD, 4, 10), (BACKWARD, 8, 20),
            (UPDATE, None, 5),
        )
    }  # fmt: skip
    monkeypatch.setattr(unit_times, "run_all", lambda *arguments, **named: found)
    network = copy.copy(support.model(dtype="float32"))
    network.lengths = (4, 8)
    assert unit_times.measure_host(settings, network, SIZES).alone_s == 22


def test_a_host_is_measured_once(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(unit_times, "AGED_S", 60.0)  # however busy this machine has become
    network = support.model(dtype="float32")
    found = unit_times.measure_host(settings, network, SIZES)
    assert found.seconds > 0
    assert [unit.name for unit in found.units] == list(network.unit_names)
    host = found.host
    assert host.sizes == SIZES
    assert host.forward_s[-1] == (0.0, 0.0)  # the last unit is one call: forward, loss, backward
    assert all(seconds > 0 for row in (*host.forward_s[:-1], *host.backward_s) for seconds in row)
    assert host.call_s > 0
    assert host.average_s_per_byte > 0
    assert len(host.after_rest_s) == len(network.units) and host.after_rest_s[-1][0] == 0.0
    first = found.units[0]
    assert first.parameter_bytes == sum(leaf.size * 4 for leaf in network.units[0].params.values())
    assert first.optimizer_bytes >= first.parameter_bytes  # momentum
    assert first.output_bytes == 4 * network.shapes(1)[1].size
    assert 0 < first.residual_bytes < 1e5

    # What is predicted from shapes alone is what was found.
    transformation = optimizer.build(settings.optimizer, steps=1)
    assert facts_of(network, transformation, SIZES[0]) == found.units

    again = unit_times.measure_host(settings, network, SIZES)
    assert again == found._replace(seconds=0.0)
    (file,) = (tmp_path / "pipar_jax" / "profiles").iterdir()
    file.write_text(file.read_text()[:50])
    assert unit_times.measure_host(settings, network, SIZES).seconds > 0
    assert unit_times.measure_host(settings, network, SIZES).seconds == 0

    settings.optimizer.momentum = 0.0  # another update: what is known does not hold
    assert unit_times.measure_host(settings, network, SIZES).seconds > 0


@pytest.mark.soak
def test_a_host_that_has_become_faster_is_measured_anew(settings, tmp_path):
    network = support.model(dtype="float32")
    unit_times.measure_host(settings, network, SIZES)
    (file,) = (tmp_path / "pipar_jax" / "profiles").iterdir()
    kept = json.loads(file.read_text())
    kept["host"]["backward_s"][1] = [0.5, 0.7]  # seconds, as if this host had been a thousandth
    kept["alone_s"] = 0.7
    file.write_text(json.dumps(kept))
    found = unit_times.measure_host(settings, network, SIZES)
    assert found.seconds > 0
    assert max(found.host.backward_s[1]) < 0.5 and found.alone_s < 0.7
    assert json.loads(file.read_text())["host"]["backward_s"][1] == list(found.host.backward_s[1])


def test_units_that_compute_the_same_are_measured_once(settings, monkeypatch):
    timed = []
    real = unit_times.time_in_turns

    def noted(model, replicas, *rest, **named):
        timed.extend(replicas)
        return real(model, replicas, *rest, **named)

    monkeypatch.setattr(unit_times, "time_in_turns", noted)

    def unit(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(8, 8, rngs=rngs)

    def other(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    units = [("a", unit), ("b", unit), ("c", other), ("d", unit), ("e", unit)]
    network = stages.Model.from_units("repeated", units, (8,), 8)
    found = unit_times.measure_host(settings, network, (4,))
    assert timed == [0, 1, 2, 4]  # the first and the last are called in ways of their own
    assert found.host.forward_s[1] == found.host.forward_s[3]
    assert [unit.name for unit in found.units] == list("abcde")
    assert found.units[2].parameter_bytes < found.units[3].parameter_bytes


def test_measuring_ends_when_nobody_wants_it_any_more(settings):
    def stop() -> None:
        raise RunError("told to stop")

    with pytest.raises(RunError, match="told to stop"):
        unit_times.measure_host(settings, support.model(dtype="float32"), SIZES, stop)


def test_sizes_are_the_batch_and_parts_of_it_unless_given():
    assert unit_times.sizes_of("auto", 100) == (5, 10, 20, 25, 100)
    assert unit_times.sizes_of("8, 2", 100) == (2, 8)


def test_no_more_sizes_are_measured_than_the_plans_of_a_run_have():
    assert unit_times.sizes_of("auto", 32, {2}) == (16,)
    assert unit_times.sizes_of("auto", 33, {2}) == (16, 17)
    assert unit_times.sizes_of("auto", 100, {1, 4, 10}) == (10, 25, 100)
    assert unit_times.sizes_of("auto", 100, range(1, 21)) == (5, 10, 20, 25, 100)
    assert unit_times.sizes_of("8, 2", 100, {1}) == (2, 8)


def test_codecs_and_messages_cost_something(settings, quiet):
    settings.tuner.codecs = "raw,float16"
    candidates = CodecCandidates(settings.tuner, settings.pipeline)
    ((name, codec),) = measure_codecs(candidates, "raw").items()
    assert (name, codec.ratio) == ("float16", 0.5)
    encode_s, message_s = codec.encode_s_per_byte, measure_message_s()
    assert encode_s > 0 and message_s > 0
    assert not quiet or (encode_s < 1e-6 and message_s < 1)


def test_what_a_run_adds_to_a_computation_is_rehearsed_by_the_real_engine(quiet):
    found = measure_handling()
    assert found.call_s >= 0 and found.byte_s >= 0
    # Where other work interrupts the function alone, nothing is added to it.
    assert not quiet or (2e-5 < found.call_s < 0.05 and found.byte_s < 1e-6)


def test_a_rehearsal_sends_each_micro_batch_once_however_many_are_under_way(monkeypatch):
    monkeypatch.setattr(rehearsal, "UNDER_WAY", rehearsal.ITEMS // 2)
    monkeypatch.setattr(rehearsal, "MANY", 8)
    assert rehearsal.measure_handling().call_s >= 0  # one that is missing ends it by an error


def test_a_computation_of_a_run_has_what_is_added_once_and_an_update_has_not():
    alone = profiles.host()
    added = dataclasses.replace(alone, handling=RuntimeOverhead(call_s=0.01))
    for kind, first, stop in (("F", 0, 1), ("F", 0, 3), ("B", 1, 4), ("L", 2, 5)):
        grown = HostTimes(added).time_s(kind, first, stop, 25)
        assert grown == pytest.approx(HostTimes(alone).time_s(kind, first, stop, 25) + 0.01)
    assert HostTimes(added).time_s("U", 0, 3, 0) == HostTimes(alone).time_s("U", 0, 3, 0)


def test_an_emulated_slow_host_hides_it():
    measured = dataclasses.replace(profiles.host(), handling=RuntimeOverhead(call_s=0.01))
    assert emulated(measured, UNSLOWED).handling == measured.handling
    assert emulated(measured, Slowdown(5.0)).handling == NO_HANDLING


def test_bytes_count_where_they_cross_to_another_host():
    """Two stages on the device, then the server: only the second cut is a link's."""
    device = dataclasses.replace(profiles.device(), host=profiles.host())
    plan = Plan((DevicePlan((1, 3), (OWNER, OWNER, COORDINATOR), 4),))
    alone = profiles.profile(device)
    counted = dataclasses.replace(profiles.host(), handling=RuntimeOverhead(byte_s=1e-9))
    with_bytes = dataclasses.replace(
        alone, server=counted, devices=(dataclasses.replace(device, host=counted),)
    )
    before, after = (StageCosts(one).costs(plan).compute_s for one in (alone, with_bytes))
    crossing_s = 1e-9 * 25 * alone.units[2].output_bytes
    for stage, kind, times in ((0, "F", 0), (0, "B", 0), (1, "F", 1), (1, "B", 1), (2, "L", 2),
                               (2, "U", 0)):  # fmt: skip
        grown = after(0, stage, kind, 25) - before(0, stage, kind, 25)
        assert grown == pytest.approx(times * crossing_s, abs=1e-12)
