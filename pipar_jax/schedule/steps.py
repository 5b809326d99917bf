"""The actions of a device's step, with their predecessors: the same for all steps of a shape."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipar_jax.schedule.actions import (
    ALL,
    BACKWARD,
    COMPUTE,
    FORWARD,
    LOSS,
    RECEIVE_BACKWARD,
    RECEIVE_CLIENT_MODEL,
    RECEIVE_FORWARD,
    RECEIVES,
    SEND_BACKWARD,
    SEND_FORWARD,
    UPDATE,
    Action,
    ActionKind,
    Span,
)
from pipar_jax.schedule.plan import OWNER, Order, Plan

#: Actions with the actions that must have finished before they start.
Step = tuple[tuple[Action, tuple[Action, ...]], ...]


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
    rows = _template(plan.chains[device],
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


def opens(spans: Sequence[Span], position: int, holder: int | None) -> bool:
    """Returns whether a span of a sequential round starts by receiving the client-side model.

    Args:
      spans: The round's spans.
      position: Index of the span among them.
      holder: The device that has the client-side model at the start of the round.
    """
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
    if opens(spans, position, holder):
        part = Action(0, RECEIVE_CLIENT_MODEL, span.device, step)
        after = {s: part for s in stages if plan.devices[span.device].hosts[s] == OWNER}
    if before is not None:
        for s in stages:
            after.setdefault(s, update_of(plan, before.device, s, before.stop - 1))
    return after
