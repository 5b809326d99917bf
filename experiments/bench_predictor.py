"""Errors of the latency predictor on new layers and devices, and the partitions it leads to.

Devices are held out by family, so that no similar device is in the training set; the layers of the
networks for which partitions are evaluated are either all unknown to the predictor or all known.
Baselines are the times of a profiled device multiplied by a ratio, a regression on FLOPs and bytes,
and a look-up of the most similar layer. Times are those in the package unless --timings is given.

  python -m experiments.bench_predictor [--tables=FOLDER]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.benchmarks import harness
from pipar_jax.errors import DataError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.binary import wrong_use

if TYPE_CHECKING:
    from experiments.latency_data.evaluation import Score
    from experiments.latency_data.timings import Timings
    from pipar_jax.profiling.predictor.latency_model import Weights
    from pipar_jax.profiling.predictor.operators import Array

_TIMINGS = plain_flags.define_path(
    "timings", None, "Times of layers; by default those in the package."
)
_TABLES = plain_flags.define_path("tables", None, "Folder of profile tables; by default none.")
SAMPLES = (0, 10, 50, 200)
CHAINS, LENGTHS = 12, (2, 3, 4)


def measure(run: harness.Bench) -> None:
    """Trains on the rest of the data and tests on what was held out.

    Raises:
      ConfigError: The times cannot be read, or are not complete enough to be evaluated.
    """
    from experiments.latency_data import evaluation, training
    from experiments.latency_data.published_tables import FAMILY, read_timings

    with wrong_use():
        timings = read_timings(_TIMINGS.value, _TABLES.value)
        units = partitioned_units(timings)  # before training, which takes minutes
    steps = 600 if run.quick else training.STEPS

    def train(some: Timings) -> Weights:
        return training.train(some, steps=steps)

    run.progress("held-out layers")
    timed, tables = evaluation.held_out_layers(timings, train)
    tell(run, "new layers, known devices", timed)
    tell(run, "new layers, known devices of tables", tables)
    families = sorted({device.family for device in timings.devices})
    folds, informed = {}, {}
    kept = [i for i, one in enumerate(timings.layers) if one.network not in evaluation.PARTITIONED]
    for done, family in enumerate(families[:2] if run.quick else families):
        run.progress(f"without {family}", done, len(families))
        left = [i for i, one in enumerate(timings.devices) if one.family != family]
        folds[family] = train(timings.select(left, kept))
        if family != FAMILY:  # tables' devices are in no chain
            informed[family] = train(timings.select(left))
    for name, table in (("new devices", False), ("new devices of tables", True)):
        tested = {
            i: folds[one.family]
            for i, one in enumerate(timings.devices)
            if one.family in folds and (one.family == FAMILY) == table
        }
        for samples in SAMPLES:
            scores = evaluation.unseen_devices(timings, tested, samples)
            tell(run, f"{name}, {samples} samples", scores)
    speed(run, timings, next(iter(folds.values())))
    for name, networks in (("known", informed), ("new", folds)):
        regret(run, timings, units, f"{name} networks", networks)
    run.note(f"{len(timings.layers)} layers on {len(timings.devices)} devices; "
             f"held out in turn: {', '.join(folds)}")  # fmt: skip


def partitioned_units(timings: Timings) -> list[list[int]]:
    """Returns for each network that is partitioned, and each batch, the layers of its units.

    Raises:
      DataError: The times are not complete enough to be evaluated.
    """
    import stages
    from experiments.latency_data import collect, evaluation
    from pipar_jax.profiling.predictor import operators

    try:
        found = []
        for network in evaluation.PARTITIONED:
            model = stages.build(network, input_shape=(32, 32, 3), classes=10)
            for batch in collect.SIZES:
                described = operators.model_operators(model, range(len(model.units) - 1), batch)
                tables = [operators.rows(one) for one in described]
                found.append(evaluation.measured_units(timings, tables, network))
        evaluation.check_complete(timings, [layer for units in found for layer in units])
    except DataError as error:
        raise DataError(f"these times do not suffice: {error}; collect the others too") from error
    return found


def tell(run: harness.Bench, name: str, scores: Mapping[str, Score]) -> None:
    """Adds the errors of all methods."""
    for method, one in scores.items():
        if one.predictions:
            run.row(f"{name}: {method}, MAPE", one.mape * 100, "%")
            run.row(f"{name}: {method}, median error", one.median * 100, "%")
            run.row(f"{name}: {method}, within 10 %", one.within * 100, "%")


def speed(run: harness.Bench, timings: Timings, weights: Weights) -> None:
    """Adds the time of fitting a device to its reference layers, and of a prediction."""
    from pipar_jax.profiling.predictor import device_fit

    reference = timings.reference()
    tables = [timings.layers[i].operators for i in reference]
    seen = [
        device_fit.Observation(table, table[:0], timings.forward_s[0, i])
        for table, i in zip(tables, reference, strict=True)
    ]
    known = device_fit.fit(weights, seen)

    def predict() -> harness.Seconds:
        began_s = time.perf_counter()
        for _ in range(50):
            known.layers_s(tables, device_fit.FORWARD_HEAD)
        return harness.Seconds((time.perf_counter() - began_s) / 50 / len(tables))

    cases = {"fit": lambda: device_fit.fit(weights, seen), "predict": predict}
    samples = run.compare(cases, repeats=9)
    run.row("time per prediction of a layer", samples.median("predict") * 1e6, "us")
    run.row("learning a device from its reference layers", samples.median("fit") * 1e3, "ms")


def regret(
    run: harness.Bench,
    timings: Timings,
    units: Sequence[Sequence[int]],
    about: str,
    folds: Mapping[str, Weights],
) -> None:
    """Adds the regret of predicted partitions on chains of devices unknown to the predictor.

    Args:
      run: The results are added to it.
      timings: The measured times.
      units: See ``partitioned_units``.
      about: Describes the partitions.
      folds: For each family, the predictor trained without it.
    """
    import numpy as np

    from experiments.latency_data import evaluation
    from pipar_jax.profiling.predictor import device_fit

    tested = [i for i, one in enumerate(timings.devices) if one.family in folds]
    chosen = timings.select(tested)
    reference = chosen.reference()
    known = {}
    for place, one in enumerate(chosen.devices):
        observations = []
        for i in reference if np.isfinite(chosen.forward_s[place, reference]).all() else ():
            table = chosen.layers[i].operators
            empty = table[:0]
            observations += [
                device_fit.Observation(table, empty, chosen.forward_s[place, i]),
                device_fit.Observation(empty, table, chosen.backward_s[place, i]),
            ]
        if observations:
            known[place] = device_fit.fit(folds[one.family], observations)

    def learn(place: int, columns: Sequence[int]) -> tuple[Array, Array]:
        tables = [chosen.layers[i].operators for i in columns]
        forward_s, backward_s = (known[place].layers_s(tables, head) for head in range(2))
        return forward_s, backward_s

    rng = np.random.default_rng(1)
    by_length: dict[int, list[evaluation.Regret]] = {length: [] for length in LENGTHS}
    for columns in units:
        for length in LENGTHS:
            for devices in evaluation.chains(chosen, CHAINS, length):
                speeds = rng.permutation(evaluation.SPEEDS)[: len(devices)]
                by_length[length].append(
                    evaluation.partition_regret(chosen, learn, devices, columns, speeds.tolist())
                )
    for length, found in by_length.items():
        name = f"{about}, partition over {length} devices"
        values = [one.regret for one in found]
        run.row(f"{name}: mean regret", statistics.fmean(values) * 100, "%", target=3.0)
        run.row(f"{name}: 90th percentile", float(np.quantile(values, 0.9)) * 100, "%")
        run.row(f"{name}: by scalar ratios", statistics.fmean(o.ratio for o in found) * 100, "%")
        run.row(f"{name}: even cuts", statistics.fmean(o.even for o in found) * 100, "%")


if __name__ == "__main__":
    harness.run(measure)
