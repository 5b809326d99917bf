"""What fine-tuning GPT-2 small costs in bytes and memory, from shapes alone: nothing is computed.

SplitLoRA (Lin et al., arXiv 2407.00952) fine-tunes GPT-2 small by adapters of low rank, split over
devices and a server. What it gains is the ratio of what is averaged: adapters of the device's part
against all weights of it, and against the whole model, which federated learning sends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from pipar_jax.config import Config
from pipar_jax.methods.registry import plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.runtime import memory
from pipar_jax.runtime.setup import build_model
from pipar_jax.schedule.plan import COORDINATOR, device_name
from stages import Model
from stages.signature import TARGET, ArrayType, Signature

VOCABULARY, LENGTH, BATCH, STEPS = 50257, 512, 4, 100
RANKS = (1, 2, 4, 8)
#: GPT-2's own projections of attention, as the authors of LoRA adapt them.
MATCH = r"attention/inward"
CUT, DEVICES, MICRO_BATCHES = 4, 2, 4  # the embedding and three blocks on a device


class Way(NamedTuple):
    """A way to fine-tune.

    Attributes:
      name: Its name in the table.
      method: Method of the run.
      rank: Rank of the adapters; 0 to train all weights.
      dtype: Type in which the network computes.
    """

    name: str
    method: str
    rank: int
    dtype: str = "float32"


WAYS = (
    Way("FL, all weights", "fl", 0),
    Way("FL, adapters of rank 8", "fl", 8),
    Way("split, all weights", "pipar", 0),
    Way("split, adapters of rank 8", "pipar", 8),
    Way("split, adapters of rank 8, bfloat16", "pipar", 8, "bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a way costs, in bytes.

    Attributes:
      averaged: Weights that a device sends and receives in a round.
      activations: Activations, cotangents and targets of a round of ``STEPS`` steps, of one device.
      device: Memory of a device.
      server: Memory of the server.
    """

    averaged: int
    activations: int
    device: int
    server: int


def cost(way: Way) -> Cost:
    """Returns what a way costs."""
    config = setting(way)
    model = network(config)
    plan = plan_for(config, model.unit_names)
    cuts = plan.devices[0].cuts
    held = model.units[: cuts[0]] if cuts else model.units
    crossing = 0
    if cuts:
        shape = model.shapes(BATCH)[cuts[0]]
        crossing = 2 * shape.size * shape.dtype.itemsize + BATCH * LENGTH * 4
    samples = [BATCH * STEPS] * DEVICES
    needs = [
        memory.predict(model, plan, host, config, samples).arrays
        + (average_bytes(model) if host == COORDINATOR else 0)
        for host in (device_name(0), COORDINATOR)
    ]
    averaged = 2 * sum(memory.tree_bytes(unit.params) for unit in held)
    return Cost(averaged, STEPS * crossing, *needs)


def ratios() -> Iterator[tuple[int, float, float]]:
    """Yields for each rank the adapters' bytes relative to a device's part and the whole model."""
    plain = network(setting(Way("", "pipar", 0)))
    part, whole = (
        sum(memory.tree_bytes(unit.params) for unit in units)
        for units in (plain.units[:CUT], plain.units)
    )
    whole -= memory.tree_bytes(plain.units[-1].params["dense/kernel"])  # a copy of the token table
    for rank in RANKS:
        model = network(setting(Way("", "pipar", rank)))
        adapters = sum(memory.tree_bytes(unit.params) for unit in model.units[:CUT])
        yield rank, adapters / part, adapters / whole


def average_bytes(model: Model) -> int:
    """Returns the bytes of the global weights, which the coordinator keeps."""
    return sum(memory.tree_bytes(unit.params) for unit in model.units)


def setting(way: Way) -> Config:
    """Returns the configuration of a way; its data are never read."""
    config = Config(method=way.method)
    config.model.name, config.model.dtype = "gpt2", way.dtype
    config.task.name = "language"
    config.data.source, config.data.classes = "npz:tokens.npz", VOCABULARY
    config.data.batch_size, config.devices.count = BATCH, DEVICES
    config.pipeline.cut, config.pipeline.micro_batches = CUT, MICRO_BATCHES
    config.optimizer.name = "adamw"
    if way.rank:
        config.lora.match, config.lora.rank = MATCH, way.rank
    return resolve(config)


def network(config: Config) -> Model:
    """Returns GPT-2 small for a configuration, without its weights."""
    tokens = ArrayType((LENGTH,), "int32")
    return build_model(config, Signature(tokens, {}, {TARGET: tokens}, VOCABULARY))
