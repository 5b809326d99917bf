"""Sums over samples as hosts tell them: whether they can be what a host has computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipar_jax.protocol import messages
from pipar_jax.schedule.plan import Plan
from stages.errors import StageError
from stages.tasks.task import Task


def odd_sums(
    task: Task, said: messages.Stored | messages.Evaluated, most: int | None = None
) -> str | None:
    """Returns what is wrong with the sums of a host, or None.

    They go into the sums of all hosts, and may be any numbers there; but a metric has to be one of
    which its task can make a figure, or nobody's figures could be told.

    Args:
      task: What the model is trained for.
      said: The sums.
      most: The most samples that they may be over; None: any number.
    """
    if most is not None and said.samples > most:
        return f"{said.samples} samples, expected {most} at most"
    if said.metrics.keys() != (set(task.streamed) if said.samples else set()):
        return "metrics that its task does not have"
    if not said.samples and said.loss:
        return f"a loss of {said.loss:g} without samples"
    for name, (value, weight) in said.metrics.items():
        if weight < 0 or math.isinf(weight):
            return f"a weight of {weight:g} of {name}, expected a finite one from 0 on"
        # Alone it has no mean, and in a sum it would move that of all others to anywhere, such as
        # below zero, of which an error has no root.
        if not weight and value and not math.isnan(value):
            return f"a sum of {value:g} of {name} without weight, expected 0"
    try:
        task.finish(said.metrics)
    except StageError as error:
        return f"a metric that is none: {error}"
    return None


def most_samples(
    plan: Plan, samples: Sequence[int], batch_size: int, host: str, places: Sequence[int]
) -> int:
    """Returns over how many samples the sums of a host in a round may be, at most.

    They are of the devices whose last stage is there. A round may be shorter than its plan has it,
    and never longer.

    Args:
      plan: The plan in force.
      samples: Samples of an epoch in each place.
      batch_size: Samples of a full mini-batch.
      host: The host, as the plan calls it.
      places: The places that take part.
    """
    own = [place for place in places if plan.chains[place][-1] == host]
    of_epoch = {place: -(-samples[place] // batch_size) for place in own}
    return sum(max(plan.aggregate_every, of_epoch[place]) * batch_size for place in own)
