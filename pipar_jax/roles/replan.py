"""Conducts a change of plan: pulls the states that leave hosts and pushes those they gain."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import EVERY
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.node_copies import NodeCopies
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.runtime import exchanges, unit_state
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.plan import COORDINATOR, Plan


def conduct(
    members: Membership,
    workers: Sequence[str],
    states: StateExchange,
    old: Plan,
    new: Plan,
    aggregator: Aggregator,
    copies: NodeCopies,
    rounds: int,
    without: Collection[str] = (),
) -> None:
    """Changes the plan of all hosts; runs on the coordinator, between two rounds.

    Args:
      members: The devices and compute nodes.
      workers: Those that take part.
      states: Moves states between the hosts.
      old: The plan so far.
      new: The plan from now on; its neighbours are connected, and all hosts have compiled it.
      aggregator: The coordinator's, which takes over the compute nodes' averages so far.
      copies: What is left of hosts that are gone.
      rounds: How many rounds are over.
      without: Hosts that are there, but what they have counts as lost.

    Raises:
      PeerError: A device or node was lost or failed.
      RunError: This process failed, or a host sent states that do not fit the model.
    """
    hosts, names = (COORDINATOR, *workers), tuple(aggregator.params)
    given = states.pull(
        {name: exchanges.leaving(old, new, name, names) for name in hosts if name not in without}
    ).states
    moved: States = {}
    for name, some in given.items():
        copies.take(some, rounds, name)
        moved |= {key: one for key, one in some.items() if key[0] != EVERY}
    for name in hosts:
        wanted = exchanges.arriving(old, new, name, names)
        own = {
            key: moved[key] if key in moved else copies.optimizer(key)
            for key in wanted
            if key[0] != EVERY
        }
        own |= unit_state.known(
            {k: some for k, some in wanted.items() if k[0] == EVERY}, aggregator
        )
        states.push(name, own, messages.PushState(plan=new))
    members.collect(messages.PushedState, hosts)
