"""Schedules: partial orders of actions, as data.

An action is the unit of everything that is executed, simulated, traced or drawn. Its text, such as
``d1.2F0@17`` (device 1, stage 2, forward of micro-batch 0 in step 17), can be parsed. This module
generates the actions of a device's step with their predecessors; the policy chooses which of a
host's ready actions runs next (``dispatch.py``).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipar_jax.errors import PlanError
from pipar_jax.schedule.plan import COORDINATOR, OWNER, HandOn, Order, Plan


class ActionKind(enum.StrEnum):
    """What an action does; the value is its text in a schedule.

    Sends and receives are named after the computation whose result they transfer.
    """

    FORWARD = "F"
    BACKWARD = "B"
    #: Fused last stage: forward, loss and backward in one computation.
    LOSS = "L"
    UPDATE = "U"
    AGGREGATE = "A"
    SEND_CLIENT_MODEL = "H"
    EVALUATE = "E"
    SEND_FORWARD = "SF"
    RECEIVE_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECEIVE_BACKWARD = "RB"
    #: The client-side model with its optimiser state arrives (sequential order).
    RECEIVE_CLIENT_MODEL = "RH"
    #: Weights leave a host for aggregation, and return to it.
    SEND_WEIGHTS = "SA"
    RECEIVE_WEIGHTS = "RA"


# Names of the module: an attribute of a class costs more to look up, and every action needs some.
FORWARD, BACKWARD, LOSS = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.LOSS
UPDATE, AGGREGATE, EVALUATE = ActionKind.UPDATE, ActionKind.AGGREGATE, ActionKind.EVALUATE
SEND_FORWARD, RECEIVE_FORWARD = ActionKind.SEND_FORWARD, ActionKind.RECEIVE_FORWARD
SEND_BACKWARD, RECEIVE_BACKWARD = ActionKind.SEND_BACKWARD, ActionKind.RECEIVE_BACKWARD
SEND_CLIENT_MODEL = ActionKind.SEND_CLIENT_MODEL
RECEIVE_CLIENT_MODEL = ActionKind.RECEIVE_CLIENT_MODEL
SEND_WEIGHTS, RECEIVE_WEIGHTS = ActionKind.SEND_WEIGHTS, ActionKind.RECEIVE_WEIGHTS

#: Kinds that occupy a host's processor.
COMPUTE = frozenset((FORWARD, BACKWARD, LOSS, UPDATE, AGGREGATE))
#: Kinds that a host awaits instead of performing.
RECEIVES = frozenset((RECEIVE_FORWARD, RECEIVE_BACKWARD, RECEIVE_CLIENT_MODEL, RECEIVE_WEIGHTS))
#: Kinds that belong to one micro-batch.
MICRO = frozenset((FORWARD, BACKWARD, LOSS, SEND_FORWARD, RECEIVE_FORWARD, SEND_BACKWARD,
                   RECEIVE_BACKWARD))  # fmt: skip
KINDS = frozenset(ActionKind)
#: Names of the kinds in traces and reports.
KIND_NAMES: Mapping[ActionKind, str] = {
    FORWARD: "forward", BACKWARD: "backward", LOSS: "forward, loss, backward", UPDATE: "update",
    AGGREGATE: "average", EVALUATE: "evaluate",
    SEND_FORWARD: "send activation", RECEIVE_FORWARD: "receive activation",
    SEND_BACKWARD: "send cotangent", RECEIVE_BACKWARD: "receive cotangent",
    SEND_CLIENT_MODEL: "send client model", RECEIVE_CLIENT_MODEL: "receive client model",
    SEND_WEIGHTS: "send weights", RECEIVE_WEIGHTS: "receive weights",
}  # fmt: skip

#: Device number of an action that serves all devices at once.
ALL = -1

#: Number of the attempt at a round while there is none; attempts are counted over a run.
NO_ATTEMPT = -1

_TEXT = re.compile(r"d(\d+|\*)\.(\d+)([A-Z]{1,2})(\d*)@(\d+)")


class Action(NamedTuple):
    """One action of a schedule.

    Attributes:
      stage: Index of the stage in the device's chain.
      kind: One of ``KINDS``.
      device: Device whose data it processes; ``ALL`` for all devices.
      step: Step of the device, counted over the whole run.
      micro_batch: Index in the mini-batch; 0 for kinds without one.
    """

    stage: int
    kind: ActionKind
    device: int
    step: int
    micro_batch: int = 0

    def __str__(self) -> str:
        """Returns the text that ``parse`` reads."""
        device = "*" if self.device == ALL else self.device
        micro_batch = self.micro_batch if self.kind in MICRO else ""
        return f"d{device}.{self.stage}{self.kind}{micro_batch}@{self.step}"


def parse(text: str) -> Action:
    """Parses the text of an action, such as ``d1.2F0@17``.

    Raises:
      PlanError: The text is not that of an action.
    """
    match = _TEXT.fullmatch(text)
    if match is None or match[3] not in KINDS or (match[3] in MICRO) != bool(match[4]):
        raise PlanError(
            f"{text!r} is not an action: expected d<device>.<stage><kind><micro-batch>@<step> "
            f"such as d1.2F0@17, with a kind of {', '.join(sorted(KINDS))}"
        )
    device = ALL if match[1] == "*" else int(match[1])
    return Action(int(match[2]), ActionKind(match[3]), device, int(match[5]), int(match[4] or 0))


#: Actions with the actions that must have finished before they start.
Step = tuple[tuple[Action, tuple[Action, ...]], ...]


class Span(NamedTuple):
    """Consecutive steps ``[first, stop)`` of one device within a round."""

    device: int
    first: int
    stop: int


@functools.lru_cache(maxsize=4096)
def micro_batch_sizes(samples: int, micro_batches: int) -> tuple[int, ...]:
    """Returns the sizes of the micro-batches of a mini-batch, which differ by at most one.

    Args:
      samples: Samples in the mini-batch.
      micro_batches: Maximum number of micro-batches; each has at least one sample.
    """
    parts = max(1, min(micro_batches, samples))
    size, larger = divmod(samples, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)


def batch_samples(samples: int, batch_size: int, step: int) -> int:
    """Returns the number of samples in a device's mini-batch; the last of an epoch may be smaller.

    Args:
      samples: Samples in the device's shard.
      batch_size: Samples in a full mini-batch.
      step: The device's step, counted over the whole run.
    """
    full, rest = divmod(samples, batch_size)
    in_epoch = step % (full + (rest > 0))
    return batch_size if in_epoch < full else rest


def rounds(plan: Plan, steps_per_epoch: Sequence[int], epochs: int) -> tuple[tuple[Span, ...], ...]:
    """Returns the spans of every round of a run.

    In parallel order a round has one span per device that has steps left. In sequential order its
    spans are executed one after another, with the client-side model handed on between them.

    Args:
      plan: The plan, which defines when weights are averaged or handed on.
      steps_per_epoch: Number of steps per epoch of each device.
      epochs: Epochs to train; with averaging every few steps an epoch is that of the device with
        the most data, and an exhausted shard reshuffles.

    Raises:
      PlanError: Gradients are to be summed over devices whose epochs have different lengths.
    """
    if plan.sums_gradients and not plan.aggregate_every and len(set(steps_per_epoch)) > 1:
        raise PlanError(
            "weights shared by devices in parallel take one step for all of them, but the devices' "
            f"epochs have {', '.join(map(str, steps_per_epoch))} steps: give the devices equal "
            "shards, or set --config.aggregation.every='10 steps', with which a device that has "
            "used all its samples starts over"
        )
    devices = range(len(plan.devices))
    if plan.order == Order.SEQUENTIAL and plan.hand_on == HandOn.STEP:
        return tuple(
            tuple(
                Span(d, epoch * steps_per_epoch[d] + i, epoch * steps_per_epoch[d] + i + 1)
                for i in range(max(steps_per_epoch))
                for d in devices
                if i < steps_per_epoch[d]
            )
            for epoch in range(epochs)
        )
    if plan.order == Order.SEQUENTIAL or plan.aggregate_every == 0:
        return tuple(
            tuple(Span(d, e * steps_per_epoch[d], (e + 1) * steps_per_epoch[d]) for d in devices)
            for e in range(epochs)
        )
    total = max(steps_per_epoch) * epochs
    starts = range(0, total, plan.aggregate_every)
    return tuple(
        tuple(Span(d, start, min(start + plan.aggregate_every, total)) for d in devices)
        for start in starts
    )


def update_of(plan: Plan, device: int, stage: int, step: int) -> Action:
    """Returns the update of a stage in a step: one for all devices if they share weights."""
    shared = plan.sums_gradients and plan.is_colocated(stage)
    return Action(stage, UPDATE, ALL if shared else device, step)


class _Row(NamedTuple):
    """An action of a step template: its deps are indices of rows; ``waits`` marks weight deps."""

    stage: int
    kind: ActionKind
    micro_batch: int
    deps: tuple[int, ...]
    waits: bool


@functools.lru_cache(maxsize=1024)
def _template(hosts: tuple[str, ...], micro_batches: int) -> tuple[_Row, ...]:
    """Returns the actions of one step of one device, in a valid order."""
    rows: list[_Row] = []
    index: dict[tuple[int, ActionKind, int], int] = {}
    last = len(hosts) - 1

    def add(stage: int, kind: ActionKind, m: int, *deps: tuple[int, ActionKind, int]) -> None:
        known = tuple(index[key] for key in deps if key[2] >= 0)
        first = m == 0 and kind in (FORWARD, LOSS)
        index[stage, kind, m] = len(rows)
        rows.append(_Row(stage, kind, m, known, first))

    # Forwards (or the fused last stage) run in index order, so that running statistics and
    # accumulated gradients are summed in the same order, whichever input arrives first.
    for m in range(micro_batches):
        for s, host in enumerate(hosts):
            kind = LOSS if s == last else FORWARD
            source: tuple[tuple[int, ActionKind, int], ...] = ()
            if s and host == hosts[s - 1]:
                source = ((s - 1, FORWARD, m),)
            elif s:
                add(s - 1, SEND_FORWARD, m, (s - 1, FORWARD, m))
                add(s, RECEIVE_FORWARD, m, (s - 1, SEND_FORWARD, m))
                source = ((s, RECEIVE_FORWARD, m),)
            add(s, kind, m, *source, (s, kind, m - 1))
        for s in range(last - 1, -1, -1):
            above = (s + 1, LOSS if s + 1 == last else BACKWARD, m)
            if hosts[s] != hosts[s + 1]:
                add(s + 1, SEND_BACKWARD, m, above)
                add(s, RECEIVE_BACKWARD, m, (s + 1, SEND_BACKWARD, m))
                above = (s, RECEIVE_BACKWARD, m)
            add(s, BACKWARD, m, above, (s, FORWARD, m), (s, BACKWARD, m - 1))
    for s in range(last + 1):
        add(s, UPDATE, 0, (s, LOSS if s == last else BACKWARD, micro_batches - 1))
    return tuple(rows)


class HostTemplate(NamedTuple):
    """The part of a step on one host, for any device whose chain is on the same hosts.

    Attributes:
      actions: Stage, kind and micro-batch of its computations and of their receives.
      rows: For each computation its index, the indices of its predecessors, and whether it also
        waits for its stage's weights.
    """

    actions: tuple[tuple[int, ActionKind, int], ...]
    rows: tuple[tuple[int, tuple[int, ...], bool], ...]


@functools.lru_cache(maxsize=4096)
def host_template(hosts: tuple[str, ...], micro_batches: int, host: str) -> HostTemplate:
    """Returns the part of a step on one host.

    Args:
      hosts: The host of each stage.
      micro_batches: Micro-batches of the step.
      host: Name of the host.
    """
    rows = _template(hosts, micro_batches)
    own = [
        i
        for i, row in enumerate(rows)
        if hosts[row.stage] == host and (row.kind in COMPUTE or row.kind in RECEIVES)
    ]
    place = {i: k for k, i in enumerate(own)}
    return HostTemplate(
        tuple((rows[i].stage, rows[i].kind, rows[i].micro_batch) for i in own),
        tuple(
            (place[i], tuple(place[j] for j in rows[i].deps), rows[i].waits)
            for i in own
            if rows[i].kind in COMPUTE
        ),
    )


def step_actions(
    plan: Plan, device: int, step: int, micro_batches: int, after: Mapping[int, Action]
) -> Step:
    """Returns the actions of one device's step on all hosts, with their predecessors.

    Args:
      plan: The plan.
      device: Index of the device.
      step: Step of the device, counted over the whole run.
      micro_batches: Micro-batches of this step's mini-batch.
      after: For each stage, the action that provides the weights of this step: the update of the
        step before, or the arrival of the client-side model. A stage that is missing has its
        weights already.
    """
    rows = _template(tuple(plan.host(device, s) for s in range(plan.devices[device].stages)),
                     micro_batches)  # fmt: skip
    actions = [
        update_of(plan, device, row.stage, step)
        if row.kind == UPDATE
        else Action(row.stage, row.kind, device, step, row.micro_batch)
        for row in rows
    ]
    return tuple(
        (
            action,
            tuple(actions[i] for i in row.deps)
            + ((after[row.stage],) if row.waits and row.stage in after else ()),
        )
        for action, row in zip(actions, rows, strict=True)
    )


def _opens(spans: Sequence[Span], position: int, holder: int | None) -> bool:
    """Returns whether a span of a sequential round starts by receiving the client-side model."""
    device = spans[position].device
    return device != (spans[position - 1].device if position else holder)


def predecessors(
    plan: Plan,
    spans: Sequence[Span],
    position: int,
    step: int,
    holder: int | None = None,
    *,
    alone: bool = False,
) -> dict[int, Action]:
    """Returns, for each stage, the action that provides the weights of a step.

    Args:
      plan: The plan.
      spans: The round's spans.
      position: Index of the step's span among them.
      step: The step, inside that span.
      holder: In sequential order, the device that has the client-side model at the start of the
        round.
      alone: Whether the span before it was taken out of the round, so that it follows nothing.
    """
    span = spans[position]
    stages = range(plan.devices[span.device].stages)
    if step > span.first:
        return {s: update_of(plan, span.device, s, step - 1) for s in stages}
    if plan.order == Order.PARALLEL:
        return {}
    after: dict[int, Action] = {}
    before = spans[position - 1] if position and not alone else None
    if _opens(spans, position, holder):
        part = Action(0, RECEIVE_CLIENT_MODEL, span.device, step)
        after = {s: part for s in stages if plan.devices[span.device].hosts[s] == OWNER}
    if before is not None:
        for s in stages:
            after.setdefault(s, update_of(plan, before.device, s, before.stop - 1))
    return after


@dataclasses.dataclass(frozen=True)
class RoundSchedule:
    """All actions of a round, generated step by step, so that long rounds take no memory.

    Attributes:
      plan: The plan.
      spans: The round's spans.
      samples: Samples in each device's shard.
      batch_size: Samples in a full mini-batch.
      holder: In sequential order, the device that has the client-side model at the start of the
        round and need not receive it if it is the first; None: the coordinator has it.
    """

    plan: Plan
    spans: tuple[Span, ...]
    samples: tuple[int, ...]
    batch_size: int
    holder: int | None = None

    def sizes(self, device: int, step: int) -> tuple[int, ...]:
        """Returns the micro-batch sizes of a device's step."""
        return micro_batch_sizes(
            batch_samples(self.samples[device], self.batch_size, step),
            self.plan.devices[device].micro_batches,
        )

    def batch_of_all(self, step: int) -> int:
        """Returns the total number of samples in a step over all devices."""
        return sum(
            batch_samples(self.samples[span.device], self.batch_size, step)
            for span in self.spans
            if span.first <= step < span.stop
        )

    def steps_of_round(self, device: int) -> int:
        """Returns the steps of a device in a full round of devices in parallel."""
        of_epoch = -(-self.samples[device] // self.batch_size)
        return self.plan.aggregate_every or of_epoch

    def trained_samples(self, span: Span) -> int:
        """Returns the number of samples that a device trains on in a span."""
        samples = self.samples[span.device]
        return sum(
            batch_samples(samples, self.batch_size, step) for step in range(span.first, span.stop)
        )

    def opens(self, position: int) -> bool:
        """Returns whether a span of a sequential round begins a device's turn."""
        return self.plan.order == Order.SEQUENTIAL and (
            not position or self.spans[position].device != self.spans[position - 1].device
        )

    def step(self, position: int, step: int) -> Step:
        """Returns the actions of one step of the span at ``position``.

        In sequential order a span starts by receiving the client-side model and ends by handing it
        on, unless the neighbouring span belongs to the same device or the device already has it.
        """
        span = self.spans[position]
        device = span.device
        micro_batches = len(self.sizes(device, step))
        after = predecessors(self.plan, self.spans, position, step, self.holder)
        rows = step_actions(self.plan, device, step, micro_batches, after)
        if self.plan.order == Order.PARALLEL:
            return rows
        before = self.spans[position - 1] if position else None
        if step == span.first and _opens(self.spans, position, self.holder):
            source = (
                (Action(0, SEND_CLIENT_MODEL, before.device, before.stop - 1),) if before else ()
            )
            rows = ((Action(0, RECEIVE_CLIENT_MODEL, device, step), source), *rows)
        last = position + 1 == len(self.spans) or self.spans[position + 1].device != device
        if step == span.stop - 1 and last:
            hosts = self.plan.devices[device].hosts
            owned = tuple(s for s, host in enumerate(hosts) if host == OWNER)
            updates = tuple(update_of(self.plan, device, s, step) for s in owned)
            rows = (*rows, (Action(0, SEND_CLIENT_MODEL, device, step), updates))
        return rows

    def closing(self) -> Step:
        """Returns the aggregation that ends the round: weights in, average, weights out.

        Stages whose replicas are on one host are averaged there, without traffic; all others at the
        coordinator. In sequential order there is one copy and nothing to average.
        """
        if self.plan.order == Order.SEQUENTIAL:
            return ()
        rows: list[tuple[Action, tuple[Action, ...]]] = []
        sources: dict[Action, list[Action]] = {}
        returns: list[tuple[Action, tuple[Action, ...]]] = []
        for span in self.spans:
            device, step = span.device, span.stop - 1
            for s in range(self.plan.devices[device].stages):
                update = update_of(self.plan, device, s, step)
                host = self.plan.host(device, s)
                local = self.plan.is_colocated(s) and host != COORDINATOR
                average = Action(s if local else 0, AGGREGATE, ALL, self.spans[0].stop - 1)
                if local or host == COORDINATOR:
                    sources.setdefault(average, []).append(update)
                    continue
                sent = Action(s, SEND_WEIGHTS, device, step)
                rows.append((sent, (update,)))
                sources.setdefault(average, []).append(sent)
                returns.append((Action(s, RECEIVE_WEIGHTS, device, step), (average,)))
        rows.extend((average, tuple(before)) for average, before in sources.items())
        return (*rows, *returns)

    def steps(self) -> Iterator[Step]:
        """Yields every step of the round, span by span."""
        for position, span in enumerate(self.spans):
            for step in range(span.first, span.stop):
                yield self.step(position, step)


def host_of(plan: Plan, action: Action) -> str:
    """Returns the host that performs (or, for a receive, awaits) an action."""
    if action.kind == EVALUATE or (action.kind == AGGREGATE and action.stage == 0):
        return COORDINATOR
    return plan.host(0 if action.device == ALL else action.device, action.stage)
