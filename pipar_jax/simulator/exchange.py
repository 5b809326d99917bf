"""Transfers of weights: aggregation at the end of a round, and the hand-over in SL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipar_jax.cost_model.costs import Costs, on_grid
from pipar_jax.schedule.actions import (
    AGGREGATE,
    ALL,
    RECEIVE_CLIENT_MODEL,
    SEND_CLIENT_MODEL,
    SEND_WEIGHTS,
    Action,
    host_of,
)
from pipar_jax.schedule.plan import COORDINATOR, Order, Plan, device_name
from pipar_jax.schedule.trace import Timed
from pipar_jax.simulator.state import SimulatedHost

if TYPE_CHECKING:
    from pipar_jax.simulator.engine import Simulation


class Exchange:
    """Sends weights to the average and back, and the client-side model from device to device.

    Attributes:
      stored_s: Time at which the coordinator knew of the last stored weights.

    Args:
      simulation: The simulation.
      plan: Its plan.
      costs: Its costs.
      collect: Whether timed actions are kept.
    """

    def __init__(self, simulation: Simulation, plan: Plan, costs: Costs, collect: bool) -> None:
        self._simulation, self._plan, self._costs = simulation, plan, costs
        self._collect = collect
        self._closing: dict[Action, list[Action]] | None = None
        self._left: dict[Action, int] = {}
        self.stored_s = 0.0

    @property
    def finished(self) -> bool:
        """Whether all transfers have finished."""
        if self._plan.order == Order.SEQUENTIAL:
            return True
        return self._closing is not None and not any(self._left.values())

    def stored(self, host: str) -> None:
        """Records that a host has stored weights; the coordinator is notified after the delay."""
        simulation = self._simulation
        self.stored_s = max(self.stored_s, simulation.network.control(host, simulation.now_s))

    def _close(self) -> None:
        """Prepares the closing actions of the round; no step is left out from here on."""
        self._closing = {}
        for action, before in self._simulation.round.schedule.closing():
            self._left[action] = len(before)
            for earlier in before:
                self._closing.setdefault(earlier, []).append(action)

    def over(self, action: Action) -> None:
        """Continues with the closing actions that waited for this one."""
        if self._closing is None:
            self._close()
        assert self._closing is not None
        for dependent in self._closing.pop(action, ()):
            self._left[dependent] -= 1
            if not self._left[dependent]:
                self._perform_closing(dependent)

    def _perform_closing(self, action: Action) -> None:
        """Performs a closing action: sends weights, averages them, or sends them back."""
        host = self._simulation.by_name[host_of(self._plan, action)]
        if action.kind == AGGREGATE:
            seconds = on_grid(self._costs.compute_s(ALL, action.stage, AGGREGATE, 0))
            start_s = max(self._simulation.now_s, host.free_s)
            host.free_s = start_s + seconds
            host.busy_s += seconds
            self._simulation.actions += 1
            self._simulation.at(host.free_s, self._averaged, host, action, start_s)
            return
        sending = action.kind == SEND_WEIGHTS
        ends = (host.name, COORDINATOR) if sending else (COORDINATOR, host.name)
        nbytes = self._costs.wire_bytes(action.device, action.stage, action.kind, 0)
        done = self.over if sending else self._weights_stored
        self._transfer(ends, nbytes, action if sending else None, None if sending else action, done,
                       action)  # fmt: skip

    def _averaged(self, host: SimulatedHost, action: Action, start_s: float) -> None:
        """Ends an average."""
        if self._collect:
            host.rows.append(Timed(action, start_s, self._simulation.now_s))
        self.stored(host.name)
        self.over(action)

    def _weights_stored(self, action: Action) -> None:
        """Ends the transfer of averaged weights."""
        self.stored(host_of(self._plan, action))

    def _transfer(
        self,
        ends: tuple[str, str],
        nbytes: float,
        sent: Action | None,
        received: Action | None,
        then: Callable[..., None],
        *arguments: Any,
    ) -> None:
        """Sends weights or a client-side model, and records its actions at both ends."""
        if ends[0] == ends[1]:
            then(*arguments)
            return
        link = self._simulation.network.direction(*ends)
        start_s, end_s = link.send(self._simulation.now_s, nbytes)
        self._simulation.actions += (sent is not None) + (received is not None)
        if self._collect:
            if sent is not None:
                self._simulation.by_name[ends[0]].rows.append(
                    Timed(sent, start_s, end_s, int(nbytes))
                )
            if received is not None:
                late = link.delay_s
                self._simulation.by_name[ends[1]].rows.append(
                    Timed(received, start_s + late, end_s + late, int(nbytes))
                )
        self._simulation.at(end_s + link.delay_s, then, *arguments)

    def hand_on(self, action: Action) -> None:
        """Sends the client-side model to the coordinator, which sends it to the next device."""
        spans = self._simulation.round.schedule.spans
        position = next(
            i for i, span in enumerate(spans)
            if span.device == action.device and span.stop - 1 == action.step
        )  # fmt: skip
        after = spans[position + 1] if position + 1 < len(spans) else None
        if after is not None and after.device == action.device:
            part = Action(0, RECEIVE_CLIENT_MODEL, after.device, after.first)
            self._simulation.arrive(self._simulation.by_name[device_name(after.device)], part)
            return
        nbytes = self._costs.wire_bytes(action.device, 0, SEND_CLIENT_MODEL, 0)
        ends = (device_name(action.device), COORDINATOR)
        if after is None:
            self._transfer(ends, nbytes, action, None, self._part_back)
        else:
            self._transfer(ends, nbytes, action, None, self.give_part, after.device, after.first)

    def give_part(self, device: int, step: int) -> None:
        """Sends the client-side model from the coordinator to the next device."""
        nbytes = self._costs.wire_bytes(device, 0, SEND_CLIENT_MODEL, 0)
        host = self._simulation.by_name[device_name(device)]
        part = Action(0, RECEIVE_CLIENT_MODEL, device, step)
        self._transfer(
            (COORDINATOR, host.name), nbytes, None, part, self._simulation.arrive, host, part
        )

    def _part_back(self) -> None:
        """Ends a sequential round."""
        self.stored(COORDINATOR)
