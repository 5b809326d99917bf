"""Messages of joining: who asks, who is refused, and how neighbours meet."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pipar_jax.disk.json_text import JsonObject
from pipar_jax.protocol.registry import ControlMessage, Sender, message
from pipar_jax.protocol.values import (
    ADDRESS,
    BOUNDARY,
    HOST,
    MOST_HOSTS,
    MOST_UNITS,
    SPENT,
    Address,
    Count,
    Place,
    Sampled,
    Words,
)
from pipar_jax.protocol.wire_fields import Free, Many, Table, Text, Truth, Whole
from pipar_jax.schedule.plan import Boundary

_VARIABLES = Table(Table(Text(64), 10_000, Text(1024)), MOST_UNITS)


@dataclasses.dataclass(frozen=True, slots=True)
class Join(ControlMessage):
    """What every host says that asks to join.

    Attributes:
      control_version: Version of these messages.
      version: Version of the package.
      name: Name of the host.
      config: Its configuration, as written by ``config.to_json``.
    """

    control_version: Count
    version: Annotated[str, Text(64)]
    name: Annotated[str, Text(64)]
    config: Annotated[JsonObject, Free(8, 50_000, 4096)]


@message("join_device", Sender.HOST)
class JoinDevice(Join):
    """A device asks to join.

    Attributes:
      samples: Number of samples per epoch.
      steps: Number of steps per epoch.
      signature: Shapes and dtypes of its samples.
      units: Dtype and shape of the variables of each unit.
      fingerprint: Identifies its samples.
      spent: What the releases of a private device's ledger come to, as mu**2, those of earlier
        runs under its name included.
      epsilon: Their epsilon.
    """

    samples: Annotated[int, Whole(0, 2**53)]
    steps: Annotated[int, Whole(0, 2**53)]
    signature: Sampled
    units: Annotated[dict[str, dict[str, str]], _VARIABLES]
    fingerprint: Annotated[str, Text(64)]
    spent: Annotated[float, SPENT] = 0.0
    epsilon: Annotated[float, SPENT] = 0.0


@message("join_node", Sender.HOST)
class JoinNode(Join):
    """A compute node asks to join.

    Attributes:
      address: Address at which its neighbours reach it.
    """

    address: Address


@message("refused", Sender.COORDINATOR)
class Refused(ControlMessage):
    """A join is refused.

    Attributes:
      reason: The reason.
      again: Whether the host may be accepted later.
    """

    reason: Words
    again: Annotated[bool, Truth()]


@message("model", Sender.COORDINATOR)
class ModelFacts(ControlMessage):
    """Shapes and dtypes of samples, for a node, which has none."""

    signature: Sampled


@message("meet", Sender.COORDINATOR)
class Meet(ControlMessage):
    """Asks neighbours to connect to each other; answered by ``Met``.

    A later one replaces it, as when a neighbour is lost; each of them is answered.

    Attributes:
      number: Number of the meeting, from 1.
      boundaries: All boundaries that need a link of their own.
      addresses: Host and port of every node.
      anew: Those of them whose links are to be opened anew, even where an earlier one seems alive.
    """

    number: Count
    boundaries: Annotated[tuple[Boundary, ...], Many(BOUNDARY, MOST_HOSTS)]
    addresses: Annotated[dict[str, tuple[str, int]], Table(ADDRESS, MOST_HOSTS, HOST)]
    anew: Annotated[tuple[Boundary, ...], Many(BOUNDARY, MOST_HOSTS)]


@message("met", Sender.HOST)
class Met(ControlMessage):
    """All links requested by ``Meet``, or by a later one, are open."""

    number: Count


@message("neighbour_lost", Sender.HOST)
class NeighbourLost(ControlMessage):
    """The link to a neighbour in a chain has ended for good; the neighbour may still be there.

    Attributes:
      peer: The neighbour.
      reason: Why the link has ended; with ``fault`` what the neighbour sent.
      fault: Whether this host has ended it for what the neighbour sent.
    """

    peer: Annotated[str, HOST]
    reason: Words
    fault: Annotated[bool, Truth()]


@message("neighbour", Sender.NEIGHBOUR)
class Neighbour(ControlMessage):
    """The first message on a link between neighbours: its purpose.

    Attributes:
      boundary: The boundary that it is for.
      number: Number of the meeting for which it is opened.
    """

    boundary: Place
    number: Count
