"""The plan compiled for one host: a table that runtime and simulator follow.

For every place of the cohort (the devices of a round in their fixed order), stage and kind of
computation that a host performs there is an ``Operation``: the source of its input, the target of
its result, its weights and its limits. The round defines which device holds a place
(``RoundSchedule.device``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pipar_jax.schedule.actions import (
    ALL,
    BACKWARD,
    FORWARD,
    LOSS,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_CLIENT_MODEL,
    SEND_FORWARD,
    UPDATE,
    Action,
    ActionKind,
    batch_samples,
    micro_batch_sizes,
)
from pipar_jax.schedule.plan import Boundary, Order, Plan
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.steps import HostTemplate, host_template, predecessors

#: An action and what must be complete before it.
Bare = tuple[Action, tuple[Action, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One kind of computation of a place's stage.

    Attributes:
      place: Place of the cohort whose data it processes, or ``ALL``.
      stage: Its stage in that place's chain.
      kind: F, L, B, U or H.
      host: The host that performs it.
      replica_key: Key of the weights that it uses.
      source: Boundary over which its input arrives; None if the input is on the host already.
      received: Kind of the receive that brings the input; empty without a source.
      output_of: Computation (stage, kind) of this host whose result is its input; None if it has a
        source or begins a chain.
      target: Boundary over which its result leaves; None if it stays.
      sent: Kind of the send of its result; empty if there is no result.
      arrives_as: Kind of the receive of its result at the other side; empty likewise.
      target_stage: Stage that receives its result.
      cut: Index of the cut between the two stages; -1 without a result.
      codec: Codec of the result if it leaves.
      limited: Whether ``Plan.in_flight`` limits its stage.
    """

    place: int
    stage: int
    kind: ActionKind
    host: str
    replica_key: tuple[int, int]
    source: Boundary | None
    received: ActionKind
    output_of: tuple[int, ActionKind] | None
    target: Boundary | None
    sent: ActionKind
    arrives_as: ActionKind
    target_stage: int
    cut: int
    codec: str
    limited: bool


class Beside(NamedTuple):
    """What crosses a boundary beside an activation, in this order.

    Attributes:
      targets: Whether the targets do: the last stage is on another host than the data.
      sides: Names of the side inputs that do: those that a stage above the boundary names on
        another host than the one with the data.
    """

    targets: bool = False
    sides: tuple[str, ...] = ()


def find_beside(
    plan: Plan, place: int, below: int, unit_sides: Sequence[Collection[str]]
) -> Beside:
    """Returns what crosses a boundary beside a place's activations.

    Targets and side inputs go up the chain from host to host, each once.

    Args:
      plan: The plan.
      place: The place.
      below: Stage below the boundary.
      unit_sides: For each unit of the model the names of its side inputs.
    """
    device = plan.devices[place]
    hosts = plan.chains[place]
    names = {
        name
        for stage in range(below + 1, device.stages)
        if hosts[stage] != hosts[0]
        for unit in plan.units(place, stage, len(unit_sides))
        for name in unit_sides[unit]
    }
    return Beside(hosts[0] != hosts[-1], tuple(sorted(names)))


class HostProgram:
    """A host's operations under a plan.

    Attributes:
      plan: The plan.
      host: The host's name.
      places: The places of the cohort whose chains the host takes part in, rising.

    Args:
      plan: The plan.
      host: The host's name.
    """

    def __init__(self, plan: Plan, host: str) -> None:
        self.plan, self.host = plan, host
        self._operations: dict[tuple[int, int, str], Operation] = {}
        # Of a host's own places alone: a thousand devices have a thousand programs.
        self.places = plan.places_of.get(host, ())
        for place in self.places:
            device, chain = plan.devices[place], plan.chains[place]
            own = [stage for stage in range(device.stages) if chain[stage] == host]
            for stage in own:
                last = stage == device.stages - 1
                for kind in (LOSS,) if last else (FORWARD, BACKWARD):
                    self._add(_operation(plan, place, stage, kind))
                shared = plan.sums_gradients and plan.is_colocated(stage)
                self._add(_operation(plan, ALL if shared else place, stage, UPDATE))
            if own and own[0] == 0 and plan.order == Order.SEQUENTIAL:
                self._add(_operation(plan, place, 0, SEND_CLIENT_MODEL))
        self._hosts = plan.chains
        self._templates: dict[tuple[int, int], HostTemplate] = {}
        self._hands_on = plan.order == Order.SEQUENTIAL
        self._shared = frozenset(
            stage
            for stage in range(plan.devices[0].stages)
            if plan.sums_gradients and plan.is_colocated(stage)
        )
        self._takes_part = frozenset(self.places)

    def takes_part(self, place: int) -> bool:
        """Returns whether the host runs a stage of a place's chain."""
        return place in self._takes_part

    def operation(self, place: int, stage: int, kind: ActionKind) -> Operation:
        """Returns the operation of a place's stage.

        Raises:
          KeyError: The host performs no such computation.
        """
        return self._operations[place, stage, kind]

    def is_first(self, place: int) -> bool:
        """Returns whether the host runs the first stage of a place's chain: it has the samples."""
        return self._hosts[place][0] == self.host

    def operations(self) -> tuple[Operation, ...]:
        """Returns all operations, place by place and stage by stage."""
        return tuple(self._operations.values())

    def replica_key(self, place: int, stage: int) -> tuple[int, int]:
        """Returns the key of the weights that a place's stage uses."""
        return replica_key(self.plan, place, stage)

    def sizes(self, samples: Sequence[int], batch_size: int, *, ragged: bool = True) -> set[int]:
        """Returns all micro-batch sizes of an epoch on this host.

        Args:
          samples: Samples that each place's device trains on in an epoch.
          batch_size: Samples in a full mini-batch.
          ragged: Whether those of a last mini-batch that is not full are among them.
        """
        sizes: set[int] = set()
        for place in self.places:
            last = -(-samples[place] // batch_size) - 1
            for step in {0, last} if ragged else {0}:
                size = batch_samples(samples[place], batch_size, step)
                sizes.update(micro_batch_sizes(size, self.plan.devices[place].micro_batches))
        return sizes

    def step(
        self, schedule: RoundSchedule, position: int, step: int, *, alone: bool = False
    ) -> list[Bare]:
        """Returns the host's computations of a step of the span at ``position``.

        In sequential order the last step of a span ends with handing the client-side model on,
        unless the next span is the same device's.

        Args:
          schedule: The round.
          position: Index of the span among the round's.
          step: The step, inside that span.
          alone: Whether the span before it was taken out of the round.
        """
        span = schedule.spans[position]
        place, shared = span.device, self._shared
        micro_batches = len(schedule.sizes(place, step))
        template = self._templates.get((place, micro_batches))
        if template is None:
            template = host_template(self._hosts[place], micro_batches, self.host)
            self._templates[place, micro_batches] = template
        actions = [
            Action(stage, kind, ALL if stage in shared and kind is UPDATE else place, step, m)
            for stage, kind, m in template.actions
        ]
        within = step > span.first
        after = {} if within else predecessors(
            self.plan, schedule.spans, position, step, schedule.holder, alone=alone
        )  # fmt: skip
        rows: list[Bare] = []
        for i, deps, waits in template.rows:
            action = actions[i]
            before = tuple([actions[k] for k in deps])
            if waits:  # wait for the weights of the step before
                stage = action.stage
                if within:
                    owner = ALL if stage in shared else place
                    before += (Action(stage, UPDATE, owner, step - 1),)
                elif stage in after:
                    before += (after[stage],)
            rows.append((action, before))
        if self._hands_on and (place, 0, SEND_CLIENT_MODEL) in self._operations:
            following = schedule.spans[position + 1 : position + 2]
            if step == span.stop - 1 and not (following and following[0].device == place):
                updates = tuple(action for action in actions if action.kind is UPDATE)
                rows.append((Action(0, SEND_CLIENT_MODEL, place, step), updates))
        return rows

    def _add(self, operation: Operation) -> None:
        key = operation.place, operation.stage, operation.kind
        self._operations.setdefault(key, operation)


def replica_key(plan: Plan, place: int, stage: int) -> tuple[int, int]:
    """Returns the key of the weights that a place's stage uses: its own, or the shared copy."""
    return (ALL if plan.is_shared(place, stage) else place), stage


def _operation(plan: Plan, place: int, stage: int, kind: ActionKind) -> Operation:
    """Returns the operation of a place's stage."""
    known = 0 if place == ALL else place
    device = plan.devices[known]
    hosts = plan.chains[known]
    last = device.stages - 1
    source = target = None
    received = RECEIVE_BACKWARD if kind == BACKWARD else RECEIVE_FORWARD
    up = kind == FORWARD
    sent, arrives_as = (SEND_FORWARD, RECEIVE_FORWARD) if up else (SEND_BACKWARD, RECEIVE_BACKWARD)
    output_of = None
    target_stage, cut, codec = stage, -1, "raw"
    before = {FORWARD: stage - 1, LOSS: stage - 1, BACKWARD: stage + 1}.get(kind, -1)
    if before >= 0:
        if hosts[before] == hosts[stage]:
            kinds = (LOSS if before == last else BACKWARD) if kind == BACKWARD else FORWARD
            output_of = before, kinds
        else:
            source = plan.boundary(known, min(stage, before))
    if up or (kind in (BACKWARD, LOSS) and stage):
        target_stage = stage + 1 if up else stage - 1
        below = min(stage, target_stage)
        cut = device.cuts[below]
        if hosts[target_stage] != hosts[stage]:
            target = plan.boundary(known, below)
            pair = device.codecs[below]
            codec = pair.activation if up else pair.cotangent
    limited = bool(plan.in_flight and plan.sums_gradients and plan.is_colocated(stage))
    return Operation(
        place=place,
        stage=stage,
        kind=kind,
        host=hosts[stage],
        replica_key=(place, stage) if place == ALL else replica_key(plan, place, stage),
        source=source,
        received=received,
        output_of=output_of,
        target=target,
        sent=sent,
        arrives_as=arrives_as,
        target_stage=target_stage,
        cut=cut,
        codec=codec,
        limited=limited and kind in (FORWARD, BACKWARD),
    )
