"""The coordinator's side of state transfer: pulls states of units from hosts and pushes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipar_jax.errors import ProtocolError
from pipar_jax.protocol import messages
from pipar_jax.roles.holdings import Holdings
from pipar_jax.roles.mail import Mail
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.replies import Reply
from pipar_jax.runtime import unit_state
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.unit_state import Key, States, Tensors, UnitState, Wanted
from pipar_jax.schedule.plan import long_name


class Pulled(NamedTuple):
    """The states that hosts sent.

    Attributes:
      states: The states by host.
      nbytes: Bytes on the wire.
    """

    states: dict[str, States]
    nbytes: int


class StateExchange:
    """Pulls states of units from hosts and pushes them there, over a link or in this process.

    Args:
      members: The devices and compute nodes.
      host: The host in this process.
      holdings: The contents of bundles of the model.
    """

    def __init__(self, members: Membership, host: Host, holdings: Holdings) -> None:
        self._members, self._host, self._holdings = members, host, holdings

    def read(self, mail: Mail[Any], wanted: Wanted) -> States:
        """Returns the states that came with a host's message.

        Raises:
          ProtocolError: They are not the requested states.
        """
        if mail.message is None:
            return mail.states
        with self._members.reading(mail.source):
            return self._holdings.states(mail.message, wanted, long_name(mail.source))

    def pull(self, wanted: Mapping[str, Wanted]) -> Pulled:
        """Returns hosts' states of some units; a host without requested states is not asked.

        Args:
          wanted: The requested states by host.

        Returns:
          What they gave; of those that the run may lose and has lost, nothing.

        Raises:
          PeerError: A device or node was lost or failed.
          RunError: This process failed.
        """
        asked = {name: some for name, some in wanted.items() if some}
        for name, some in asked.items():
            if name == self._host.name:
                self._host.pull(some)
            else:
                self._members.send(name, messages.PullState(unit_state.rows(some)))
        mails = self._members.collect(messages.PulledState, tuple(asked))
        states: dict[str, States] = {}
        for name, mail in mails.items():
            try:
                states[name] = self.read(mail, asked[name])
            except ProtocolError:
                if name in self._members.by_name:
                    raise
        return Pulled(
            states,
            sum(mail.message.nbytes for mail in mails.values() if mail.message is not None),
        )

    def are_in(self, tensors: Tensors, wanted: Wanted) -> bool:
        """Returns whether all arrays of some states are among those that ``pack`` named."""
        return self._holdings.arrays(wanted).keys() <= tensors.keys()

    def push(
        self,
        name: str,
        states: Mapping[Key, UnitState],
        why: messages.PushState,
        *replies: Reply,
    ) -> None:
        """Sends a host its states of some units from now on.

        Args:
          name: The host's name.
          states: The states.
          why: The command, which names their purpose.
          *replies: The replies, where they depend on the plan.

        Raises:
          PeerError: The host is lost.
        """
        if name == self._host.name:
            self._host.push(why, states)
        else:
            self._members.send_bundle(name, why, unit_state.pack(states), *replies)
