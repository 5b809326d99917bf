"""The data set as a value and a file, and tables of other devices beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.latency_data import collect, evaluation
from experiments.latency_data.published_tables import TABLES, read_tables, read_timings
from experiments.latency_data.timings import Timings
from pipar_jax.errors import DataError, DiskError
from tests.pipar_jax.profiling.predictor import synthetic

SHARED = Path(__file__).parents[4] / "shared" / "data" / "profiles"


def same(one: Timings, other: Timings) -> bool:
    return (
        one.devices == other.devices
        and [layer[:3] for layer in one.layers] == [layer[:3] for layer in other.layers]
        and np.allclose(one.forward_s, other.forward_s, equal_nan=True)
        and np.allclose(one.backward_s, other.backward_s, equal_nan=True)
    )


def test_times_survive_their_file(tmp_path):
    made = synthetic.timings(range(3))
    made.forward_s[1, 2] = np.nan
    made.save(tmp_path / "times.npz")
    read = Timings.load(tmp_path / "times.npz")
    assert same(read, made)
    for mine, theirs in zip(made.layers, read.layers, strict=True):
        assert np.allclose(mine.operators, theirs.operators)
    assert same(read_timings(tmp_path / "times.npz"), made)


def test_layers_of_every_kind_of_drawn_chain_are_timed_once_each():
    found = collect.layers(quick=True)
    assert len(set(found)) == len(found)
    kinds = {layer.network.rstrip("0123456789") for layer in found}
    assert kinds == {"reference", "mlp", *collect.CHAINS}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(collect.CHAINS["separable"]))
def test_a_separable_chain_has_depthwise_and_squeezed_layers(seed):
    model = collect.build(f"separable{seed}")
    graphs = [str(unit.graph) for unit in model.units]
    assert sum("depthwise" in graph for graph in graphs) >= 8
    assert sum("reduce" in graph for graph in graphs) > 1
    assert model.shapes(2)[-1].shape == (2, 10)


def test_what_holds_no_times_is_refused(tmp_path):
    file = tmp_path / "times.npz"
    with pytest.raises(DataError, match="cannot be read"):
        Timings.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="times of layers"):
        Timings.load(file)
    np.savez(file, about=np.array([object()], dtype=object))  # a pickle is never loaded
    with pytest.raises(DataError, match="times of layers"):
        Timings.load(file)
    with pytest.raises(DiskError, match=r"missing.times\.npz"):
        synthetic.timings(range(1)).save(tmp_path / "missing" / "times.npz")


def test_parts_that_are_gathered_one_by_one_make_a_whole():
    whole = synthetic.timings(range(4))
    columns = range(len(whole.layers))
    parts = [
        whole.select(devices, [i for i in columns if i % 2 == odd])
        for devices in ((0, 1), (2, 3)) for odd in (0, 1)
    ]  # fmt: skip
    joined = parts[0].join(parts[1]).join(parts[2]).join(parts[3])
    order = [[one[:3] for one in joined.layers].index(one[:3]) for one in whole.layers]
    assert same(joined.select(layers=order), whole)


def table(path: Path, devices: dict[str, float], rows: int) -> None:
    lines = ["device,layer,forward_ms,backward_ms,update_ms,activation_kb,weight_kb"]
    for name, factor in devices.items():
        lines += [f"{name},{i},{factor * (i + 1)},{2 * factor},0.0,10,10" for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")


def test_tables_are_further_devices(tmp_path):
    assert read_tables(tmp_path) is None
    table(tmp_path / "vgg19_cifar.csv", {"pi": 1.0, "vm": 0.0}, 25)
    table(tmp_path / "resnet101_cifar.csv", {"pi": 2.0}, 37)
    found = read_tables(tmp_path)
    assert [one.name for one in found.devices] == ["table-pi", "table-vm"]
    assert found.forward_s.shape == (2, 62)
    assert np.isfinite(found.forward_s[0]).all()
    assert np.isnan(found.forward_s[1]).all()  # a zero is a missing measurement
    assert found.forward_s[0].max() == pytest.approx(0.074)
    table(tmp_path / "vgg19_cifar.csv", {"pi": 1.0}, 20)
    with pytest.raises(DataError, match="'pi' has 20 layers, expected 25"):
        read_tables(tmp_path)


def test_backwards_of_some_tables_are_in_the_order_in_which_they_ran(tmp_path):
    header = "device,layer,forward_ms,backward_ms,update_ms,activation_kb,weight_kb"
    lines = [f"{name},{i},1,{i + 1},0,1,1" for name in ("pi", "jetson-cpu") for i in range(25)]
    (tmp_path / "vgg19_cifar.csv").write_text("\n".join([header, *lines]) + "\n")
    pi, jetson = 1000 * read_tables(tmp_path).backward_s
    assert pi == pytest.approx(range(1, 26))
    assert jetson == pytest.approx([*range(22, 0, -1), 23, 24, 25])


def test_rows_of_tables_compute_what_their_sizes_say():
    if not SHARED.is_dir():
        pytest.skip(f"no profile tables in {SHARED}")
    from pipar_jax.tuner.chain_search import read_profile

    for name, make in TABLES.items():
        for read, made in zip(read_profile(SHARED / name, "VM"), make(), strict=True):
            weights = made.operators[:, 2].sum()
            if weights > 1e5:  # of small ones the table counts what a file adds
                assert weights == pytest.approx(read.weight_bytes, rel=0.06), made[:3]


def test_times_that_do_not_suffice_are_told_before_anything_is_trained():
    made = synthetic.timings(range(4))
    evaluation.check_complete(made, [])
    lacking = [i for i, one in enumerate(made.layers) if one.network != "reference"]
    with pytest.raises(DataError, match="lack the reference layers"):
        evaluation.check_complete(made.select(layers=lacking), [])
    with pytest.raises(DataError, match="fewer than two families"):
        evaluation.check_complete(made.select([0, 3]), [])
    made.backward_s[1, 20] = np.nan
    evaluation.check_complete(made, [19])
    with pytest.raises(DataError, match="device law1 lacks times of cnn, unit 0"):
        evaluation.check_complete(made, [19, 20])
    unknown = 2 * made.layers[5].operators
    with pytest.raises(DataError, match="unit 1 of the network was not timed"):
        evaluation.measured_units(made, [made.layers[4].operators, unknown])
    assert evaluation.measured_units(made, [made.layers[4].operators]) == [4]
