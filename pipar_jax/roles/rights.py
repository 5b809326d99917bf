"""What may arrive at a device or node under the plans that it follows: tensors and bundles."""

from __future__ import annotations

from collections.abc import Callable

from comms import Link, Message, Role
from pipar_jax.protocol import messages
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.course import Course
from pipar_jax.roles.federated_evaluation import network_states
from pipar_jax.roles.holdings import Holdings
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.runtime import exchanges
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.unit_state import States, Wanted
from pipar_jax.schedule.plan import COORDINATOR, Boundary, host_index, long_name
from stages import Model

#: Tensors of a neighbour that may be ahead of this host, and bytes of those that take no credit.
MOST_AHEAD, MOST_AHEAD_BYTES = 4096, 64 << 20


class EarlyTensors:
    """Tensors of a round that this host has not heard of yet, of no peer more than it can bear."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Message, Boundary | None]] = []
        self._of: dict[str, tuple[int, int]] = {}

    def add(self, peer: str, message: Message, boundary: Boundary | None) -> bool:
        """Keeps a tensor, unless its sender has too many here already; returns whether it did."""
        count, nbytes = self._of.get(peer, (0, 0))
        if message.tag is not None and message.tag.role in (Role.LABEL, Role.SIDE):
            nbytes += message.nbytes  # all others wait within the credit of their link
        if count >= MOST_AHEAD or nbytes > MOST_AHEAD_BYTES:
            return False
        self._of[peer] = count + 1, nbytes
        self._waiting.append((peer, message, boundary))
        return True

    def take(self) -> list[tuple[str, Message, Boundary | None]]:
        """Returns all tensors with their senders and boundaries, in order, and keeps none."""
        waiting, self._waiting = self._waiting, []
        self._of.clear()
        return waiting


class Rights:
    """Hands on what the plans have for a host, each tensor in its turn, and nothing larger.

    Args:
      model: The whole model.
      host: Receives the tensors.
      holdings: What the host can hold.
      course: Where the run is.
      neighbours: The host's direct links.
      batch_size: Samples of a mini-batch.
      evaluates: Whether the host evaluates weights of the whole model.
      refuse: Ends a link for what came over it.
    """

    def __init__(
        self,
        model: Model,
        host: Host,
        holdings: Holdings,
        course: Course,
        neighbours: PeerLinks,
        *,
        batch_size: int,
        evaluates: bool,
        refuse: Callable[[Link, str], None],
    ) -> None:
        self._model, self._host, self._holdings = model, host, holdings
        self._course, self._neighbours, self._refuse = course, neighbours, refuse
        self._batch_size, self._evaluates = batch_size, evaluates
        self._acceptance: Acceptance | None = None
        self._ahead = EarlyTensors()  # the I/O thread's

    def follow(self, coordinator: Link) -> None:
        """Takes from other hosts what the plan in force has for them, from the next step on."""
        course = self._course
        assert course.plan is not None
        self._acceptance = Acceptance(
            self._model, course.plan, course.seat, samples=course.samples,
            batch_size=self._batch_size, lengths=self._host.share.lengths,
        )  # fmt: skip
        self.allow_neighbours()
        self.allow(coordinator)

    def allow_neighbours(self) -> None:
        """Limits what neighbours may send to the plan's tensors, once there is a plan."""
        if self._acceptance is not None:
            self._neighbours.allow(self._acceptance.tensor_bytes)

    def allow(self, coordinator: Link) -> None:
        """Lets the coordinator send what this host may get under its plans, and nothing larger."""
        course, names = self._course, self._model.unit_names
        assert self._acceptance is not None and course.plan is not None
        bundles = [exchanges.whole(course.plan, course.seat, names, optimizers=True)]
        bundles += [
            exchanges.arriving(course.plan, plan, course.seat, names) for plan in course.ahead
        ]
        if self._evaluates:
            bundles.append(network_states(names))
        tensor_bytes = self._acceptance.tensor_bytes(COORDINATOR)
        coordinator.admit(self._holdings.room(bundles, tensor_bytes))

    def states(self, said: messages.PushState | messages.Evaluate, message: Message) -> States:
        """Returns the states that came with a command.

        Raises:
          ProtocolError: They are not what the plan has for this host.
        """
        return self._holdings.states(message, self._wanted(said), long_name(COORDINATOR))

    def _wanted(self, said: messages.PushState | messages.Evaluate) -> Wanted:
        plan, seat, names = self._course.plan, self._course.seat, self._model.unit_names
        if isinstance(said, messages.Evaluate):
            return network_states(names)
        assert plan is not None
        if said.plan is not None:
            old, new = self._course.plans
            return exchanges.arriving(old, new, seat, names)
        if said.step is not None:
            return exchanges.client_model(plan, host_index(seat), names)
        if said.round is not None:
            return exchanges.averaged(plan, seat, names)
        return exchanges.whole(plan, seat, names, optimizers=said.optimizers)

    def drop(self, place: int) -> None:
        """Rejects further tensors of a place in this round."""
        assert self._acceptance is not None
        self._acceptance.drop(place)

    # --- on the I/O thread --------------------------------------------------------------------

    def open(self, said: messages.Release) -> None:
        """Takes a round's tensors, those first that came too early."""
        assert self._acceptance is not None
        self._acceptance.open(said.spans, said.attempt, said.samples)
        for peer, message, boundary in self._ahead.take():
            link = message.link
            if boundary is not None and not self._neighbours.has(link):
                message.release()  # its link has ended meanwhile
            elif (reason := self.on_tensor(peer, message, boundary)) is not None:
                self._refuse(link, reason)

    def on_tensor(self, peer: str, message: Message, boundary: Boundary | None) -> str | None:
        """Hands a tensor to the host, or returns why not: its link is to be ended then.

        Args:
          peer: Who sent it.
          message: The tensor.
          boundary: The boundary of its link; None for the coordinator's.
        """
        acceptance, tag = self._acceptance, message.tag
        if acceptance is None or tag is None:
            reason: str | None = f"a tensor ({tag}) before there is a plan"
        elif (reason := acceptance.objection(peer, message, boundary)) is None:
            self._host.on_message(message)
            return None
        elif acceptance.is_past(tag):
            message.release()
            return None
        elif acceptance.is_ahead(tag) and self._ahead.add(peer, message, boundary):
            return None
        message.release()
        return reason
