"""Devices whose layers' times follow a law: so much per operation and per byte of each kind."""

from __future__ import annotations

import functools

import numpy as np

from experiments.latency_data import collect
from experiments.latency_data.timings import TimedDevice, Timings, layer
from experiments.latency_data.training import train
from pipar_jax.profiling.predictor.device_fit import Observation
from pipar_jax.profiling.predictor.latency_model import Weights
from pipar_jax.profiling.predictor.operators import KINDS, TRACED, model_operators
from pipar_jax.profiling.predictor.reference import ReferenceTimes, reference_layers

NETWORKS = ("reference", "mlp", "cnn", "chain0", "chain3")


class Law:
    """A device: operations and bytes per second of each kind, and what a call costs."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        speed = np.exp(rng.normal())
        self.flops = 2e10 * speed * np.exp(0.5 * rng.normal(size=len(KINDS)))
        self.bytes = 4e9 * speed * np.exp(0.4 * rng.normal(size=len(KINDS)))
        self.call_s = 3e-5 / speed

    def forward_s(self, table) -> float:
        return self._each(table).sum()

    def backward_s(self, table) -> float:
        return (self._each(table) * (1.0 + table[:, -1])).sum()

    def _each(self, table):
        kind = table[:, 0].astype(int)
        each = table[:, 1] / self.flops[kind] + table[:, 2:5].sum(1) / self.bytes[kind]
        return each + (kind == 0) * self.call_s


@functools.cache
def layers():
    made = []
    for name in NETWORKS:
        units = model_operators(collect.build(name), None, TRACED)[:-1]
        for index, operators in enumerate(units):
            for batch in (16,) if name == "reference" else (4, 16, 64):
                made.append(layer(name, index, batch, [one.at(batch) for one in operators]))
    return tuple(made)


def timings(seeds) -> Timings:
    laws = [Law(seed) for seed in seeds]
    tables = [one.operators for one in layers()]
    return Timings(
        tuple(TimedDevice(f"law{seed}", f"family{seed % 3}") for seed in seeds),
        layers(),
        np.array([[law.forward_s(table) for table in tables] for law in laws]),
        np.array([[law.backward_s(table) for table in tables] for law in laws]),
    )


@functools.cache
def weights() -> Weights:
    """A network trained on ten such devices, coarsely."""
    return train(timings(range(10)), steps=800, about="ten laws")


def reference_times(law: Law, factor: float = 1.0) -> ReferenceTimes:
    """What a device of a law says of the reference layers, if it is so many times slower."""
    tables = reference_layers()
    count = len(tables)
    return ReferenceTimes(
        tuple(law.forward_s(table) for table in tables),
        tuple(law.backward_s(table) for table in tables),
        (1e-4,) * count, tuple(1000.0 * (i + 1) for i in range(count)), law.call_s, 1e-9,
    ).slowed(factor)  # fmt: skip


def reference_of(law: Law) -> list[Observation]:
    found = []
    for one in layers():
        if one.network == "reference":
            empty = one.operators[:0]
            found.append(Observation(one.operators, empty, law.forward_s(one.operators)))
            found.append(Observation(empty, one.operators, law.backward_s(one.operators)))
    return found
