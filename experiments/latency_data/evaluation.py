"""Evaluates predictions on new layers and devices, and the resulting partitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.latency_data import baselines
from experiments.latency_data.published_tables import FAMILY
from experiments.latency_data.timings import Timings
from pipar_jax.errors import DataError
from pipar_jax.profiling.predictor.device_fit import BACKWARD_HEAD, FORWARD_HEAD, Observation, fit
from pipar_jax.profiling.predictor.latency_model import Weights
from pipar_jax.profiling.predictor.operators import Array
from pipar_jax.tuner.chain_search import ChainProblem, Layer, Node, evaluate, plan_chain

#: Candidates for the profiled device of the scalar ratio: the first one not of the tested family.
PROFILED = ("core-plain", "cores-plain")
METHODS = ("predictor", "scalar ratio", "FLOPs regression", "look-up")
#: Rows of a table in place of reference layers, on devices without times of those.
TABLE_REFERENCE = 11
#: Networks that are held out when partitions are evaluated.
PARTITIONED = ("vgg11", "resnet18", "mobilenetv3_small")
#: Speeds of the devices of a chain, in random order.
SPEEDS = (1.0, 2.0, 4.0, 8.0)


class Score(NamedTuple):
    """Errors of one method.

    Attributes:
      mape: Mean of |predicted / true - 1|.
      within: Share of predictions within 10 % of the truth.
      median: Median of |predicted / true - 1|.
      predictions: Number of predictions.
    """

    mape: float
    within: float
    median: float
    predictions: int


def score(ratios: Sequence[float]) -> Score:
    """Returns the errors of predictions.

    Args:
      ratios: Predicted over true.
    """
    off = np.abs(np.asarray(ratios, np.float64) - 1.0)
    off = off[np.isfinite(off)]
    if not len(off):
        return Score(float("nan"), float("nan"), float("nan"), 0)
    return Score(float(off.mean()), float((off <= 0.1).mean()), float(np.median(off)), len(off))


def predictions(
    weights: Weights, timings: Timings, device: int, seen: Sequence[int], wanted: Sequence[int]
) -> Mapping[str, tuple[Array, Array]]:
    """Returns the predictions of each method for layers of a device, from other layers of it.

    Args:
      weights: The shared network.
      timings: What was measured.
      device: The device.
      seen: Layers whose times on the device are given.
      wanted: Layers to predict.

    Returns:
      For each of ``METHODS`` forwards and backwards, [wanted] each.
    """
    tables = [layer.operators for layer in timings.layers]
    times = (timings.forward_s[device], timings.backward_s[device])
    observations = []
    for i in seen:
        empty = tables[i][:0]
        if np.isfinite(times[0][i]):
            observations.append(Observation(tables[i], empty, times[0][i]))
        if np.isfinite(times[1][i]):
            observations.append(Observation(empty, tables[i], times[1][i]))
    learned = fit(weights, observations)
    profiled = profiled_for(timings, device)
    found: dict[str, list[Array]] = {name: [] for name in METHODS}
    seen, wanted = list(seen), list(wanted)
    known, asked = [tables[i] for i in seen], [tables[i] for i in wanted]
    for head, table in ((FORWARD_HEAD, timings.forward_s), (BACKWARD_HEAD, timings.backward_s)):
        mine, reference = table[device], table[profiled]
        found["predictor"].append(learned.layers_s(asked, head))
        found["scalar ratio"].append(
            baselines.scalar_ratio(mine[seen], reference[seen], reference[wanted])
        )
        found["FLOPs regression"].append(baselines.flops_regression(known, mine[seen], asked))
        found["look-up"].append(baselines.look_up(known, mine[seen], asked))
    return {name: (pair[0], pair[1]) for name, pair in found.items()}


def held_out_layers(
    timings: Timings, train: Callable[[Timings], Weights], *, folds: int = 5, fold: int = 0
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Returns the errors on layers that no device trained with, on devices that it was trained on.

    A layer's sizes are held out together. First the errors on devices that were timed, then those
    on devices of tables.

    Args:
      timings: What was measured.
      train: Makes a network.
      folds: Number of folds.
      fold: Index of the held-out fold.
    """
    keys = [layer[:2] for layer in timings.layers]
    kinds = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    order = np.random.default_rng(0).permutation(len(kinds))
    reference = set(timings.reference())
    out = [
        i for i, key in enumerate(keys) if order[kinds[key]] % folds == fold and i not in reference
    ]
    left = [i for i in range(len(keys)) if i not in set(out)]
    weights = train(timings.select(layers=left))
    ratios: list[dict[str, list[float]]] = [{name: [] for name in METHODS} for _ in range(2)]
    for device, one in enumerate(timings.devices):
        given = _known(timings, device, left)
        if given:
            wanted = _known(timings, device, out)
            _collect(ratios[one.family == FAMILY], timings, weights, device, given, wanted)
    timed, tables = ({name: score(v) for name, v in some.items()} for some in ratios)
    return timed, tables


def unseen_devices(
    timings: Timings, trained: Mapping[int, Weights], samples: int, *, seed: int = 0
) -> dict[str, Score]:
    """Returns the errors on devices that were not trained on.

    Args:
      timings: What was measured.
      trained: For each device that is asked about a network that was trained without it.
      samples: How many times of each are given beside the reference layers: a forward and a
        backward of half as many layers.
      seed: Of the layers given.
    """
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    for device, weights in trained.items():
        known = _known(timings, device, range(len(timings.layers)))
        reference = references_of(timings, device)
        rest = [i for i in known if i not in set(reference)]
        drawn = np.random.default_rng(seed).permutation(rest)
        # The same layers are asked for whatever is given, or the columns could not be compared.
        most = min(100, int(0.7 * len(rest)))
        if samples // 2 > most:
            continue
        given = [*reference, *map(int, drawn[: samples // 2])]
        _collect(ratios, timings, weights, device, given, list(map(int, drawn[most:])))
    return {name: score(values) for name, values in ratios.items()}


def profiled_for(timings: Timings, device: int) -> int:
    """Returns the device whose times the scalar ratio scales: one that does not resemble it."""
    families = {one.name: one.family for one in timings.devices}
    mine = timings.devices[device].family
    names = [*(name for name in PROFILED if name in families), *families]
    other = next((name for name in names if families[name] != mine), names[0])
    return list(families).index(other)


def references_of(timings: Timings, device: int) -> list[int]:
    """Returns the layers that a device is known by: the reference layers, or some of its table."""
    if timings.devices[device].family != FAMILY:
        return timings.reference()
    known = _known(timings, device, range(len(timings.layers)))
    return [known[i] for i in np.linspace(0, len(known) - 1, TABLE_REFERENCE).astype(int)]


class Regret(NamedTuple):
    """The cost of a partition based on predictions.

    Attributes:
      regret: Its cost relative to the best partition, minus one, by true times.
      even: The same for equal numbers of layers.
      ratio: The same for the partition by scalar ratios.
    """

    regret: float
    even: float
    ratio: float


def partition_regret(
    timings: Timings,
    learn: Callable[[int, Sequence[int]], tuple[Array, Array]],
    devices: Sequence[int],
    units: Sequence[int],
    speeds: Sequence[float],
) -> Regret:
    """Returns the regret of the chain planner with predictions.

    Args:
      timings: What was measured.
      learn: Gives a device's predicted forwards and backwards of some layers.
      devices: The chain's devices, in order.
      units: For each of the network's units in order the layer that measured it.
      speeds: For each device how many times faster its times are taken.
    """
    columns = list(units)
    truth, guess, ratio = [], [], []
    reference = timings.reference()
    for place, (device, speed) in enumerate(zip(devices, speeds, strict=True)):
        times = (timings.forward_s, timings.backward_s)
        truth.append(_node(place, [table[device, columns] for table in times], speed))
        guess.append(_node(place, learn(device, columns), speed))
        profiled = profiled_for(timings, device)
        scaled = [
            baselines.scalar_ratio(
                table[device, reference], table[profiled, reference], table[profiled, columns]
            )
            for table in times
        ]
        ratio.append(_node(place, scaled, speed))
    true = _problem(truth)
    best = plan_chain(true, "accept").cost_s
    costs = []
    for nodes in (guess, ratio):
        plan = plan_chain(_problem(nodes), "accept")
        order = [int(stage.node) for stage in plan.stages]
        costs.append(evaluate(true, "accept", order, plan.cuts).cost_s)
    edges = np.linspace(0, len(columns), len(truth) + 1).round().astype(int)
    even = evaluate(true, "accept", range(len(truth)), [int(e) for e in edges[1:-1]]).cost_s
    return Regret(costs[0] / best - 1, even / best - 1, costs[1] / best - 1)


def chains(timings: Timings, count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Returns random chains of different devices, without those of tables."""
    able = [i for i, one in enumerate(timings.devices) if one.family != FAMILY]
    rng = np.random.default_rng(seed)
    return [tuple(map(int, rng.permutation(able)[:length])) for _ in range(count)]


def measured_units(
    timings: Timings, operators: Sequence[Array], network: str = "the network"
) -> list[int]:
    """Returns for units the layers that measured them, or one that computes the same.

    Args:
      timings: What was measured.
      operators: Each unit's operators, [operators, WIDTH].
      network: What the message calls their network.

    Raises:
      DataError: A unit was not measured.
    """
    marks = {one.operators.astype(np.float32).tobytes(): i for i, one in enumerate(timings.layers)}
    found = [marks.get(table.astype(np.float32).tobytes()) for table in operators]
    if None in found:
        raise DataError(f"unit {found.index(None)} of {network} was not timed")
    return [one for one in found if one is not None]


def check_complete(timings: Timings, layers: Sequence[int]) -> None:
    """Checks that times suffice to hold a family of devices out and to evaluate it.

    Args:
      timings: What was measured.
      layers: Layers of which each device needs times, beside the reference layers.

    Raises:
      DataError: They do not.
    """
    reference = timings.reference()
    if not reference:
        raise DataError("they lack the reference layers, by which a device is known")
    timed = [i for i, one in enumerate(timings.devices) if one.family != FAMILY]
    if len({timings.devices[i].family for i in timed}) < 2:
        raise DataError("they are of fewer than two families of devices: none can be held out")
    wanted = [*reference, *layers]
    for i in timed:
        known = np.isfinite(timings.forward_s[i, wanted]) & np.isfinite(
            timings.backward_s[i, wanted]
        )
        if not known.all():
            lacking = timings.layers[wanted[int(np.argmin(known))]]
            raise DataError(
                f"device {timings.devices[i].name} lacks times of {lacking.network}, unit "
                f"{lacking.unit}"
            )


def _known(timings: Timings, device: int, layers: Sequence[int] | range) -> list[int]:
    """Returns the layers of which at least one time is known on a device."""
    return [
        i
        for i in layers
        if np.isfinite(timings.forward_s[device, i]) or np.isfinite(timings.backward_s[device, i])
    ]


def _collect(
    ratios: dict[str, list[float]],
    timings: Timings,
    weights: Weights,
    device: int,
    seen: Sequence[int],
    wanted: Sequence[int],
) -> None:
    """Adds predicted over true of each method."""
    if not wanted:
        return
    true = (timings.forward_s[device, wanted], timings.backward_s[device, wanted])
    for name, pair in predictions(weights, timings, device, seen, wanted).items():
        for predicted, seconds in zip(pair, true, strict=True):
            ratios[name] += (predicted / seconds).tolist()


def _node(place: int, times: Sequence[Array], speed: float) -> Node:
    layers = tuple(Layer(float(f), float(b)) for f, b in zip(*times, strict=True))
    return Node(str(place), layers, speed)


def _problem(nodes: Sequence[Node]) -> ChainProblem:
    return ChainProblem(tuple(nodes), 0, len(nodes[0].layers), any_order=False)
