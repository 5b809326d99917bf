"""Profiles made up for tests: one or many units, hosts of any speed, links by name."""

from __future__ import annotations

import dataclasses

from comms.emulation.shaping import parse_link
from pipar_jax.config import Config
from pipar_jax.config.codec_candidates import BITS
from pipar_jax.cost_model.profile import (
    CodecProfile,
    DeviceProfile,
    HostProfile,
    NodeProfile,
    Profile,
    UnitFacts,
)
from pipar_jax.methods.resolution import resolve
from pipar_jax.simulator import LinkModel

#: A convolutional network's shape: early units are wide and cheap to hold, late ones the opposite.
OUTPUT_BYTES = (32_768.0, 16_384.0, 16_384.0, 512.0, 40.0)
WEIGHTS = (3_000.0, 75_000.0, 150_000.0, 1_000_000.0, 5_000.0)
WORK = (1.0, 3.0, 3.0, 0.5, 0.1)


def host(scale_s: float = 1e-4, units: int = 5, sizes=(5, 25, 100), fixed_s=2e-4) -> HostProfile:
    """A host whose units take a fixed time and a time per sample."""
    work = [WORK[i * len(WORK) // units] for i in range(units)]

    def table(factor: float):
        return [[fixed_s + factor * scale_s * one * n for n in sizes] for one in work]

    forward, backward = table(1.0), table(2.0)
    backward[-1] = [f + b for f, b in zip(forward[-1], backward[-1], strict=True)]
    forward[-1] = [0.0] * len(sizes)
    return HostProfile(
        tuple(sizes), tuple(map(tuple, forward)), tuple(map(tuple, backward)),
        (2e-4,) * units, call_s=1e-4, average_s_per_byte=1e-9,
    )  # fmt: skip


def device(link: str = "4g", slower: float = 1.0, samples: int = 500, **values) -> DeviceProfile:
    up, down = (
        dataclasses.replace(LinkModel.of(shape), delay_s=0.002, message_s=2e-4)
        for shape in parse_link(link)
    )
    return DeviceProfile(host(**values).slowed(slower), samples, up, down)


def node(link: str = "none", slower: float = 1.0, **values) -> NodeProfile:
    made = device(link, slower, **values)
    return NodeProfile(made.host, made.up, made.down)


def profile(*devices: DeviceProfile, units: int = 5, **values) -> Profile:
    facts = tuple(
        UnitFacts(
            f"u{i}", WEIGHTS[j], 100.0, WEIGHTS[j], OUTPUT_BYTES[j], 2 * OUTPUT_BYTES[j]
        )
        for i in range(units)
        for j in [i * len(WORK) // units]
    )  # fmt: skip
    made = {"codecs": {"float16": CodecProfile(0.5, 1e-10, 1e-10)}, "window_bytes": 32e6} | values
    return Profile("made-up", 100, facts, host(units=units), devices, **made)


def bit_codecs(bytes_s: float = 1e9) -> dict[str, CodecProfile]:
    """The bit-level codec in every number of bits that the tuner may choose."""
    return {
        f"bits:{bits}": CodecProfile((bits + 1.125) / 32, 1 / bytes_s, 1 / bytes_s) for bits in BITS
    }


def config(count: int = 1, **tuner) -> Config:
    made = Config(method="auto")
    made.devices.count = count
    for name, value in tuner.items():
        setattr(made.tuner, name, value)
    return resolve(made)
