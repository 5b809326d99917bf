"""The paper's own selection as a plan: its formula for N, its recurrence, the best cut.

Zhang et al., arXiv 2302.12803. One N per cut, whole-batch times, no delay, no cost per message, no
overhead of small micro-batches, each device as if it had the server to itself, neither N = 1 nor FL
as a candidate: an ablation of the tuner.
"""

from __future__ import annotations

import dataclasses

from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS
from pipar_jax.schedule.plan import (
    COORDINATOR,
    OWNER,
    Codecs,
    DevicePlan,
    Order,
    Plan,
    WeightPolicy,
)
from pipar_jax.simulator.predict import StageCosts
from pipar_jax.tuner.recurrence import PaperChoice, StepTimes, paper_choice

#: No codecs, as in the paper.
RAW = Codecs()


def paper_plan(stages: StageCosts, frame: Plan, codecs: Codecs = RAW) -> Plan:
    """Returns the plan of the paper's selection, made for each device separately.

    Args:
      stages: Times and bytes.
      frame: A plan with the dispatch policy and aggregation.
      codecs: Codecs of activations and cotangents.

    Raises:
      PlanError: The model has one unit and cannot be split.
    """
    chains = []
    for device in range(len(stages.profile.devices)):
        choice = choose(stages, device, codecs)
        hosts = OWNER, COORDINATOR
        chains.append(DevicePlan((choice.cut,), hosts, choice.micro_batches, (codecs,)))
    return dataclasses.replace(
        frame, devices=tuple(chains), order=Order.PARALLEL, weights=WeightPolicy.COPY
    )


def choose(stages: StageCosts, device: int, codecs: Codecs = RAW) -> PaperChoice:
    """Returns the paper's choice for one device.

    Args:
      stages: Times and bytes.
      device: Index of the device.
      codecs: Codecs of activations and cotangents.

    Raises:
      PlanError: The model has one unit and cannot be split.
    """
    profile = stages.profile
    own, batch, count = profile.devices[device], profile.batch_size, len(profile.units)
    times = stages.devices[device]
    candidates = {}
    for cut in range(1, count):
        nbytes = stages.cut_bytes(cut, batch)
        # The server fuses forward and backward; the formulas only ever add the two.
        candidates[cut] = StepTimes(
            times.time_s(FORWARD, 0, cut, batch), times.time_s(BACKWARD, 0, cut, batch),
            0.0, stages.server.time_s(LOSS, cut, count, batch),
            _wire_s(own.up, nbytes * stages.codec(codecs.activation).ratio),
            _wire_s(own.down, nbytes * stages.codec(codecs.cotangent).ratio),
        )  # fmt: skip
    return paper_choice(candidates, batch)


def _wire_s(link: LinkModel, nbytes: float) -> float:
    """Returns bytes / rate: the paper's links have no delay and no cost per message."""
    return nbytes / link.rate_bytes_s if link.rate_bytes_s else 0.0
