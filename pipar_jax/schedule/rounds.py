"""The rounds of a run: which steps each device takes, and all actions of a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from pipar_jax.errors import PlanError
from pipar_jax.schedule.actions import (
    AGGREGATE,
    ALL,
    RECEIVE_CLIENT_MODEL,
    RECEIVE_WEIGHTS,
    SEND_CLIENT_MODEL,
    SEND_WEIGHTS,
    Action,
    Span,
    batch_samples,
    micro_batch_sizes,
)
from pipar_jax.schedule.plan import COORDINATOR, OWNER, HandOn, Order, Plan
from pipar_jax.schedule.steps import Step, opens, predecessors, step_actions, update_of


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
        if step == span.first and opens(self.spans, position, self.holder):
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
