"""Federated evaluation: the network's scores on each device's own test data, which stay there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.typing import DTypeLike

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.data import Dataset
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import EVERY
from pipar_jax.roles.evaluation import Evaluator, Score
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.told_sums import odd_sums
from pipar_jax.runtime import unit_state
from pipar_jax.runtime.metrics import Totals
from pipar_jax.runtime.personal import PersonalWeights
from pipar_jax.runtime.unit_state import States, Wanted
from pipar_jax.schedule.plan import host_index
from stages import Model
from stages.tasks.task import Task


def network_states(names: Sequence[str]) -> Wanted:
    """Returns what a device receives in order to evaluate: weights and statistics of all units."""
    return {(EVERY, name): ("params", "state") for name in names}


class LocalEvaluation:
    """A device's half: scores weights on the device's test data.

    Args:
      model: The whole model.
      dataset: The device's data, with a test split.
      dtype: What samples are computed in.
      personal: The device's personal weights, if it has any.
    """

    def __init__(
        self, model: Model, dataset: Dataset, dtype: DTypeLike, personal: PersonalWeights | None
    ) -> None:
        self._evaluator, self._personal = Evaluator(model, dataset, dtype), personal

    def answer(self, round_: int, states: States) -> messages.Evaluated:
        """Returns the sums over the test data for the weights after a round."""
        params = {unit: dict(one.params or {}) for (_, unit), one in states.items()}
        state = {unit: dict(one.state or {}) for (_, unit), one in states.items()}
        if self._personal is not None:
            params = self._personal.completed(params)
        totals = self._evaluator.sums(params, state)
        return messages.Evaluated(round_, totals.loss, totals.samples, dict(totals.metrics))


class LocalScores(NamedTuple):
    """The devices' scores.

    Attributes:
      by_device: By the device's index.
      samples: Test samples by the device's index.
      overall: Of all samples alike: the devices' means, weighted by their samples.
    """

    by_device: Mapping[int, Score]
    samples: Mapping[int, int]
    overall: Score


def evaluate_on_devices(
    members: Membership,
    names: Sequence[str],
    aggregator: Aggregator,
    task: Task,
    index: int,
    most: int,
) -> LocalScores:
    """Conducts an evaluation on devices.

    Args:
      members: The devices' links.
      names: The devices that take part, idle between two rounds.
      aggregator: Has the weights.
      task: What the model is trained for.
      index: The round that is over.
      most: The most test samples that a device may have.

    Raises:
      PeerError: A device was lost, or its metrics are not those of the task.
    """
    wanted = network_states(tuple(aggregator.params))
    tensors = unit_state.pack(unit_state.known(wanted, aggregator))
    for name in names:
        members.send_bundle(name, messages.Evaluate(index), tensors)
    found: dict[int, Totals] = {}
    for name, mail in sorted(members.collect(messages.Evaluated, names).items()):
        said = mail.said
        if (odd := odd_sums(task, said, most)) is not None:
            members.blame(name, f"'evaluated' with {odd}")
            continue
        found[host_index(name)] = Totals(said.loss, said.samples, said.metrics)
    overall = Totals()
    for device in sorted(found):
        overall = overall.plus(found[device])
    return LocalScores(
        {device: score_of(task, totals) for device, totals in found.items()},
        {device: totals.samples for device, totals in found.items()},
        score_of(task, overall),
    )


def score_of(task: Task, totals: Totals) -> Score:
    """Returns the score that sums amount to."""
    return Score(totals.loss / max(totals.samples, 1), task.finish(totals.metrics), {})
