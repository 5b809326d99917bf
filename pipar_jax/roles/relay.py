"""Devices in turns: the client-side model goes from device to device, and back at last."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pipar_jax.errors import ProtocolError
from pipar_jax.protocol import messages
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.replies import Reply, reply
from pipar_jax.roles.round_attempt import RoundAttempt, merged_turns
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.runtime import exchanges
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import Plan


class Relay:
    """Relays the client-side model, in sequential order.

    Attributes:
      client_model: The client-side model as it was handed back last.

    Args:
      names: The model's units in order.
      members: The devices.
      states: How states travel.
    """

    def __init__(self, names: Sequence[str], members: Membership, states: StateExchange) -> None:
        self._names, self._members, self._states = names, members, states
        self._holder = members.roll(())  # who gave it back last and still has it
        self.client_model: States = {}

    def holder(self, now: RoundAttempt) -> int | None:
        """Returns the place that has the client-side model already, if it is the first to go on."""
        if not now.spans:
            return None
        first = now.spans[0].device
        return first if self._holder.stayed(now.device(first)) else None

    def owed(self, now: RoundAttempt, name: str, spans: Sequence[Span]) -> list[Reply]:
        """Returns the parts that a device owes, one for each of its turns."""
        return [
            reply(messages.ClientModel, device=turn.device, step=turn.stop - 1)
            for turn in merged_turns(spans)
            if now.device(turn.device) == name
        ]

    def run(self, now: RoundAttempt, plan: Plan, drop: Callable[[int, str], None]) -> None:
        """Relays it from device to device, until the last gives it back.

        Args:
          now: The round.
          plan: The plan in force.
          drop: Removes a place from the round, and says why.
        """
        holder = self.holder(now)
        self._holder = self._members.roll(())
        while turn := _next_turn(now):
            if turn.device != holder:
                why = messages.PushState(step=turn.first)
                self._states.push(now.device(turn.device), self.client_model, why)
            holder = None
            self._await(now, turn, plan, drop)

    def _await(
        self, now: RoundAttempt, turn: Span, plan: Plan, drop: Callable[[int, str], None]
    ) -> None:
        """Waits until a device gives the client-side model back, or is out."""
        giver = now.device(turn.device)
        wait = self._members.waiting("part", computing=True)
        while turn.device not in now.out:
            found = self._members.early.take(messages.ClientModel, (giver,))
            if giver in found:
                wanted = exchanges.client_model(plan, turn.device, self._names)
                try:
                    self.client_model = self._states.read(found[giver], wanted)
                except ProtocolError:
                    if giver in self._members.by_name:
                        raise
                    continue  # it is lost, and so its turn is undone
                self._holder = self._members.roll((giver,))
                now.turns_done.add((turn.device, turn.first))
                break
            ends_s = now.end.ends_s()
            if ends_s is not None and time.monotonic() >= ends_s:
                drop(turn.device, "late")
                break
            wait.look((giver,))


def undone_from(now: RoundAttempt, place: int) -> int:
    """Returns the first step of a place whose turn is not over."""
    return next(
        (turn.first for turn in merged_turns(now.spans)
         if turn.device == place and (place, turn.first) not in now.turns_done),
        max(span.stop for span in now.begun if span.device == place),
    )  # fmt: skip


def _next_turn(now: RoundAttempt) -> Span | None:
    """Returns the first turn that is not over yet."""
    turns = merged_turns(now.spans)
    return next((turn for turn in turns if (turn.device, turn.first) not in now.turns_done), None)
