"""What a device's or node's host replies, as it goes to the coordinator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from comms import Link, Message
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.roles.course import Course
from pipar_jax.roles.link_stats import DirectTraffic, OwnWaits
from pipar_jax.roles.patience import Patience
from pipar_jax.runtime import trace_rows, unit_state
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.runtime.recorder import Recorder
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import SEND_CLIENT_MODEL, SEND_WEIGHTS, Action, ActionKind
from pipar_jax.schedule.plan import host_index
from pipar_jax.schedule.trace import Timed


class HostReplies:
    """Sends a host's replies, with its trace and what its links have brought.

    Attributes:
      recorder: The host's trace, once there is a host.
      step: The last step of this host's device in the round.

    Args:
      name: The host's name.
      link: Returns the link to the coordinator.
      course: Learns of each reply before it is sent.
      patience: Learns how long an action lasts here.
      codec: The codec of weights that are averaged.
      traced: Whether traces are sent.
    """

    recorder: Recorder

    def __init__(
        self,
        name: str,
        link: Callable[[], Link],
        course: Course,
        patience: Patience,
        *,
        codec: str,
        traced: bool,
    ) -> None:
        self._name, self._link, self._course, self._patience = name, link, course, patience
        self._codec, self._traced = codec, traced
        self.step = 0
        self._waits: OwnWaits | None = None
        self._direct: DirectTraffic | None = None

    def count_links(self, link_table: LinkTable) -> None:
        """Counts what the links bring from now on, those to neighbours among them."""
        if self._waits is None:
            self._waits = OwnWaits(self._link())
        self._direct = DirectTraffic(self._name, link_table)

    def send(self, said: ControlMessage, states: States) -> None:
        """Sends a reply; called on the host's threads."""
        link = self._link()
        self._course.replied(said)
        if isinstance(said, messages.Stored):
            self._patience.action(said.longest_s)
            rows, busy_s = self.recorder.take()
            assert self._waits is not None and self._direct is not None
            waits, direct = self._waits.take(), self._direct.take()
            registry.send(link, dataclasses.replace(said, busy_s=busy_s, link=waits, direct=direct))
            if self._traced:  # outside the round that it belongs to
                registry.send_bundle(link, messages.TraceRows(), trace_rows.pack_rows(rows))
        elif isinstance(said, messages.Dropped | messages.Rewound):
            registry.send_bundle(link, said, {})  # behind what was sent before
        elif not states:
            registry.send(link, said)
        else:
            codec, on_sent = "raw", None
            if isinstance(said, messages.Trained):  # what is not averaged must stay as it is
                codec = self._codec
                on_sent = self._recorded(SEND_WEIGHTS, self.step)
            elif isinstance(said, messages.ClientModel):
                on_sent = self._recorded(SEND_CLIENT_MODEL, said.step)
            arrays = unit_state.pack(states)
            registry.send_bundle(link, said, arrays, on_sent=on_sent, codec=codec)

    def note_arrival(self, kind: ActionKind, step: int, message: Message) -> None:
        """Adds a bundle that has arrived to the trace."""
        arrived = Action(0, kind, host_index(self._course.seat), step)
        self._record(arrived, message.first_byte_s, message.received_s, message.nbytes)

    def say_goodbye(self) -> None:
        """Sends the rest of the trace, the last that this host says."""
        rows, _ = self.recorder.take()
        registry.send_bundle(self._link(), messages.Bye(), trace_rows.pack_rows(rows))

    def _recorded(self, kind: ActionKind, step: int) -> Callable[[float, float, int], None]:
        """Returns what adds a bundle to the trace once it has left."""
        return functools.partial(self._record, Action(0, kind, host_index(self._course.seat), step))

    def _record(self, action: Action, start_s: float, end_s: float, nbytes: int) -> None:
        self.recorder.add(Timed(action, start_s, end_s, nbytes))
