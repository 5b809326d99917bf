"""Devices that follow a law are learned from their reference layers, and better from more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments.latency_data import evaluation
from experiments.latency_data.training import train
from pipar_jax.errors import DataError
from pipar_jax.profiling.predictor.device_fit import Observation, fit, typical
from pipar_jax.profiling.predictor.latency_model import load
from tests.pipar_jax.profiling.predictor import synthetic

NEW = 77


def others() -> list:
    return [one.operators for one in synthetic.layers() if one.network != "reference"]


def error(device, law, tables) -> float:
    forward = device.layers_s(tables, 0) / [law.forward_s(table) for table in tables] - 1
    backward = device.layers_s(tables, 1) / [law.backward_s(table) for table in tables] - 1
    return float(np.abs(np.concatenate([forward, backward])).mean())


def test_a_new_device_is_known_from_its_reference_layers_and_better_from_samples():
    law, tables = synthetic.Law(NEW), others()
    first = synthetic.reference_of(law)
    nothing, little = typical(synthetic.weights()), fit(synthetic.weights(), first)
    more = [Observation(table, table[:0], law.forward_s(table)) for table in tables[::3]]
    more += [Observation(table[:0], table, law.backward_s(table)) for table in tables[::3]]
    much = fit(synthetic.weights(), first + more)
    errors = [error(one, law, tables[1::3]) for one in (nothing, little, much)]
    assert errors[0] > 2 * errors[1] > 2.4 * errors[2]
    assert errors[1] < 0.2


def test_a_device_that_is_slower_by_a_factor_is_slower_by_that_factor():
    law, tables = synthetic.Law(NEW), others()
    quick = fit(synthetic.weights(), synthetic.reference_of(law))
    slow = fit(
        synthetic.weights(),
        [one._replace(seconds=8 * one.seconds) for one in synthetic.reference_of(law)],
    )
    assert slow.layers_s(tables, 0) / quick.layers_s(tables, 0) == pytest.approx(8, rel=0.1)


def test_what_is_larger_than_all_that_was_trained_on_lasts_longer_in_proportion():
    law = synthetic.Law(NEW)
    device = fit(synthetic.weights(), synthetic.reference_of(law))
    largest = max(others(), key=lambda table: table[:, 1].sum())
    for times in (30, 1000):  # as many channels on both sides as make it so many times larger
        grown = largest.copy()
        grown[1:, [1, 2]] *= times
        for head, seconds in ((0, law.forward_s), (1, law.backward_s)):
            factor = device.layers_s([grown], head)[0] / seconds(grown)
            assert 1 / 3 < factor < 3


def test_a_profiled_device_is_of_another_family():
    made = synthetic.timings(range(4))  # two of family 0
    assert [evaluation.profiled_for(made, device) for device in range(4)] == [1, 0, 0, 1]
    named = [made.devices[0], made.devices[1]._replace(name="core-plain"), *made.devices[2:]]
    made = dataclasses.replace(made, devices=tuple(named))
    assert [evaluation.profiled_for(made, device) for device in range(4)] == [1, 0, 1, 1]


def test_a_hiccup_is_not_believed_where_other_times_contradict_it():
    law, tables = synthetic.Law(NEW), others()
    seen = synthetic.reference_of(law)
    seen += [Observation(table[:0], table, law.backward_s(table)) for table in tables[::4]]
    plain = error(fit(synthetic.weights(), seen), law, tables)
    seen[3] = seen[3]._replace(seconds=20 * seen[3].seconds)
    assert error(fit(synthetic.weights(), seen), law, tables) < plain + 0.1


def test_sums_over_layers_teach_as_well():
    law, tables = synthetic.Law(NEW), others()[::3]
    seen = synthetic.reference_of(law)
    before = error(fit(synthetic.weights(), seen), law, tables)
    for pair in zip(tables[::2], tables[1::2], strict=False):
        both = np.concatenate(pair)
        seen.append(Observation(both, both, law.forward_s(both) + law.backward_s(both)))
    assert error(fit(synthetic.weights(), seen), law, tables) < before


def test_training_repeats_exactly_and_needs_times():
    made = synthetic.timings(range(3))
    one, other = (train(made, steps=5) for _ in range(2))
    assert all((one.values[name] == other.values[name]).all() for name in one.values)
    unknown = np.full_like(made.forward_s, np.nan)
    with pytest.raises(DataError, match="no time"):
        train(dataclasses.replace(made, forward_s=unknown, backward_s=unknown), steps=5)


def test_a_network_survives_its_file_and_nothing_else_is_taken_for_one(tmp_path):
    made, file = synthetic.weights(), tmp_path / "network.safetensors"
    made.save(file)
    assert file.stat().st_size < 16_000
    read = load(file)
    assert read.about == "ten laws"
    table = others()[0]
    before, after = made.basis(table), read.basis(table)
    assert np.allclose(before.base, after.base, atol=0.03)
    file.write_bytes(b"no network")
    with pytest.raises(DataError, match="not a latency predictor"):
        load(file)
    with pytest.raises(DataError, match="not a latency predictor"):
        load(tmp_path / "missing")


def test_evaluation_ranks_what_knows_the_device_above_what_does_not():
    made = synthetic.timings([*range(10), NEW, NEW + 1])
    names = [one.name for one in made.devices]
    assert names[10:] == [f"law{NEW}", f"law{NEW + 1}"]
    scores = {
        samples: evaluation.unseen_devices(
            made, dict.fromkeys((10, 11), synthetic.weights()), samples
        )
        for samples in (0, 10)
    }
    assert scores[10]["predictor"].mape < scores[0]["predictor"].mape
    assert scores[0]["predictor"].mape < scores[0]["FLOPs regression"].mape
    held_out, tables = evaluation.held_out_layers(made, lambda some: train(some, steps=300))
    assert held_out["predictor"].mape < held_out["look-up"].mape
    assert held_out["predictor"].predictions > 100
    assert tables["predictor"].predictions == 0


def test_chains_are_of_different_devices_that_were_timed():
    made = synthetic.timings(range(5))
    table = made.devices[2]._replace(family="table")
    made = dataclasses.replace(made, devices=(*made.devices[:2], table, *made.devices[3:]))
    found = evaluation.chains(made, 9, 4)
    assert len(found) == 9 and len(set(found)) > 1
    assert all(sorted(chain) == [0, 1, 3, 4] for chain in found)


def test_a_partition_by_true_times_has_no_regret():
    made = synthetic.timings([*range(4)])
    made = dataclasses.replace(
        made, devices=(made.devices[0]._replace(name="core-plain"), *made.devices[1:])
    )
    units = [i for i, one in enumerate(made.layers) if one.network == "chain0" and one.batch == 4]

    def truth(place, columns):
        return made.forward_s[place, columns], made.backward_s[place, columns]

    found = evaluation.partition_regret(made, truth, (0, 1, 2), units, (1.0, 8.0, 2.0))
    assert found.regret == pytest.approx(0.0, abs=1e-12)
    assert found.even > 0 and found.ratio >= 0
