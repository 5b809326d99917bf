"""A worker's links to its neighbours in the chains: who opens a link, and how it is identified."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from comms import (
    Allowance,
    ChannelError,
    Endpoint,
    Link,
    LinkShape,
    Message,
    MessageKind,
    PeerClosed,
)
from comms.wire.bounded_json import one_line
from pipar_jax.config import Hosts, NetworkConfig
from pipar_jax.errors import JoinError, ProtocolError, RunError
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import Sender
from pipar_jax.runtime.link_table import LinkTable, dialler
from pipar_jax.schedule.plan import COORDINATOR, Boundary, is_node, long_name

#: What a neighbour may send before there is a plan.
_NOTHING = Allowance(tensor_bytes=0, bundle_bytes=0, bundle_tensors=0)


class PeerLinks:
    """Opens and accepts the direct links of one host.

    Args:
      hosts: The hosts of the run.
      network: The time limits.
      name: The host's name.
      endpoint: The endpoint of its links.
      tensors: Receives the tensors that arrive, with the peer's name and its link's boundary;
        returns what is wrong with a tensor, which ends that link; runs on the I/O thread.
      wake: Called when a link has credit again; runs on the I/O thread.
      lost: Receives the error of a link that ended before the run; runs on the I/O thread.
      cut: Receives the name of a neighbour that the run may lose, and why its link has ended; runs
        on the I/O thread.
      met: Called for each call of ``connect``, with its number, when every link that the last one
        asked for is connected; on any thread.

    Attributes:
      link_table: The links.
      refused: Number of unknown peers that were refused.
    """

    def __init__(
        self,
        hosts: Hosts,
        network: NetworkConfig,
        name: str,
        endpoint: Endpoint,
        *,
        tensors: Callable[[str, Message, Boundary | None], str | None],
        wake: Callable[[], None],
        lost: Callable[[BaseException], None],
        cut: Callable[[str, str], None],
        met: Callable[[int], None],
    ) -> None:
        self._hosts, self._network, self._name, self._endpoint = hosts, network, name, endpoint
        self._tensors, self._wake, self._lost, self._met = tensors, wake, lost, met
        self._cut = cut
        self.link_table = LinkTable(name)
        self.refused = 0
        self._lock = threading.Lock()
        self._expected: tuple[Boundary, ...] = ()
        self._numbers: list[int] = []  # of the meetings that are to be answered
        self._until_s, self._reason = 0.0, ""  # of waiting; of the last refusal
        self._early: list[tuple[Boundary, Link]] = []
        # Links that share an emulated line, by the device that owns the radio, or by boundary.
        self._lines: dict[str | Boundary, list[Link]] = {}
        self._began_s: float | None = None
        self._parting = False
        self._of: dict[Link, Boundary] = {}  # links that were taken

    def listen(self) -> tuple[str, int]:
        """Begins to listen on the configured address; returns host and port.

        Raises:
          RunError: The address cannot be listened on.
        """
        host, port = self._hosts[self._name].address
        try:
            return self._endpoint.listen(
                host, port, self.on_link, expected_peers=2 * len(self._hosts)
            )
        except ChannelError as error:
            raise RunError(
                f"{long_name(self._name)} cannot listen on {host}:{port}: {error}"
            ) from error

    def connect(
        self,
        number: int,
        boundaries: tuple[Boundary, ...],
        addresses: Mapping[str, tuple[str, int]],
    ) -> None:
        """Opens this host's links and waits for those that others open; ``met`` is called then.

        A later plan may need more links: existing links stay as they are. A later call replaces an
        earlier one that still waits, as when one of the neighbours is lost.

        Args:
          number: Number of the meeting.
          boundaries: All of a plan's boundaries that need a link of their own.
          addresses: Host and port of every node.

        Raises:
          JoinError: A neighbour cannot be reached.
        """
        mine = tuple(one for one in boundaries if self._name in one[:2])
        for boundary in self.link_table.missing(mine):
            if dialler(boundary) == self._name:
                self._dial(boundary, addresses)
        with self._lock:
            self._expected = mine
            self._numbers.append(number)
            self._until_s = time.monotonic() + self._patience_s
            early, self._early = self._early, []
        for boundary, link in early:
            self._take(boundary, link)
        self._look()

    def check(self) -> None:
        """Ends a wait for neighbours that do not connect, or are refused.

        Raises:
          JoinError: Some have not connected in time.
        """
        with self._lock:
            if not self._expected or time.monotonic() <= self._until_s:
                return
            late = self.link_table.missing(self._expected)
        if not late:  # the last is just being taken
            return
        names = ", ".join(sorted({long_name(one.peer(self._name)) for one in late}))
        refused = f"; {self.refused} refused, the last: {self._reason}" if self.refused else ""
        raise JoinError(
            f"{names} did not connect to {long_name(self._name)} within {self._patience_s:g} s "
            f"(network.join_timeout_s and deadline_s){refused}"
        )

    @property
    def _patience_s(self) -> float:
        """Seconds to wait for links that others open: as long as they may try to connect."""
        return self._network.join_timeout_s + self._network.deadline_s

    def allow(self, tensor_bytes: Callable[[str], int]) -> None:
        """Limits what neighbours may send to the largest tensors of a plan.

        Args:
          tensor_bytes: Returns the bytes of the largest tensor that a peer may send.
        """
        for boundary, link in self.link_table.direct():
            nbytes = tensor_bytes(boundary.peer(self._name))
            link.admit(Allowance(tensor_bytes=nbytes, bundle_bytes=0, bundle_tensors=0))

    def begin(self) -> None:
        """Starts the clocks of emulated links whose rates vary."""
        with self._lock:
            self._began_s = time.monotonic()
            for line, links in self._lines.items():
                if line != self._name and not self.shape_of(line).schedule:
                    continue
                if line != self._name:
                    links[0].set_shape(self.shape_of(line))
                for link in links:
                    self._share(line, link)

    def finish(self) -> None:
        """Records that the run is over, so that the end of a link is not a loss."""
        self._parting = True

    def _dial(self, boundary: Boundary, addresses: Mapping[str, tuple[str, int]]) -> None:
        peer = boundary.upper if boundary.lower == self._name else boundary.lower
        try:
            link = self._endpoint.connect(
                *addresses[peer],
                name_of_peer=peer,
                timeout_s=self._dial_s(peer),
                expected=peer,
                retry=not self._hosts.may_be_lost(peer),
            )
            self._shape(boundary, link)
            self._of[link] = boundary
            link.admit(_NOTHING)
            self._begin(link)
            registry.send(link, messages.Neighbour(boundary))
        except ChannelError as error:
            if self._hosts.may_be_lost(peer):
                return  # the coordinator hears of it, and plans without it
            raise JoinError(
                f"{long_name(self._name)} cannot reach its neighbour {peer}: {error}"
            ) from error
        self.link_table.add(boundary, link)

    def _dial_s(self, peer: str) -> float:
        """Returns the seconds within which a neighbour must answer, which listens before it joins.

        Others wait while this host tries to reach one that is gone.
        """
        limit_s = self._network.join_timeout_s
        may_be_lost = self._hosts.may_be_lost(peer)
        return min(limit_s, self._network.deadline_s) if may_be_lost else limit_s

    def on_link(self, link: Link) -> None:
        """Accepts a connection, whose first message names its boundary; on the I/O thread."""
        self._begin(link)

    def _begin(self, link: Link) -> None:
        link.start(
            lambda message: self._on_message(link, message),
            self._wake,
            lambda error: self._on_lost(link, error),
        )

    def _on_message(self, link: Link, message: Message) -> None:
        """Routes what arrives from neighbours; runs on the I/O thread."""
        taken = self._of.get(link)
        if taken is not None:
            self._on_neighbour(link, taken, message)
            return
        try:
            said = registry.decode(message, Sender.NEIGHBOUR, "a neighbour")
        except ProtocolError as error:
            self._refuse(link, str(error))
            return
        assert isinstance(said, messages.Neighbour)  # the one message between neighbours
        boundary = said.boundary
        if (reason := self._strange(boundary, link)) is not None:
            self._refuse(link, reason)
            return
        with self._lock:
            if not self._expected:  # it met the others before this host was asked to
                self._early.append((boundary, link))
                return
        self._take(boundary, link)
        self._look()

    def _strange(self, boundary: Boundary, link: Link) -> str | None:
        """Returns why a link cannot be a neighbour's under any plan, or None."""
        known = self._name in boundary[:2] and link.peer == boundary.peer(self._name)
        if not known or link.peer not in self._hosts or link.peer == COORDINATOR:
            return f"{link.peer} asked to be a neighbour for {tuple(boundary)}"
        with self._lock:
            if any(one == boundary for one, _ in self._early):
                return f"{link.peer} asked twice to be a neighbour for {tuple(boundary)}"
        return None

    def _on_neighbour(self, link: Link, boundary: Boundary, message: Message) -> None:
        """Receives what a connected neighbour sends: only tensors."""
        peer = boundary.peer(self._name)
        if message.kind == MessageKind.TENSOR:
            reason = self._tensors(peer, message, boundary)
        else:
            reason = f"a {message.kind} message, expected tensors"
            link.refuse(reason)
        if reason is not None:
            self._lost(ProtocolError(f"{long_name(peer)} sent {long_name(self._name)} {reason}"))

    def _refuse(self, link: Link, reason: str) -> None:
        """Ends the link of an unknown peer; the run goes on."""
        self.refused += 1
        self._reason = one_line(reason, 300)
        link.refuse(reason)

    def _take(self, boundary: Boundary, link: Link) -> None:
        """Accepts a link that a neighbour opened, if it is expected."""
        missing = self.link_table.missing(self._expected)
        if boundary not in missing or link.peer != boundary.peer(self._name):
            self._refuse(
                link,
                f"{long_name(self._name)} does not expect {link.peer} for {tuple(boundary)}: "
                "do all hosts belong to this run?",
            )
            return
        self._of[link] = boundary
        link.admit(_NOTHING)
        self._shape(boundary, link)
        self.link_table.add(boundary, link)

    def _look(self) -> None:
        """Calls ``met``, once for each meeting, when no link is missing."""
        with self._lock:
            if self.link_table.missing(self._expected):
                return
            self._expected = ()
            numbers, self._numbers = self._numbers, []
        for number in numbers:
            self._met(number)

    def _shape(self, boundary: Boundary, link: Link) -> None:
        """Shapes what this host sends over a link: a device's links share its one radio."""
        line = next((one for one in boundary[:2] if not is_node(one)), boundary)
        with self._lock:
            links = self._lines.setdefault(line, [])
            links.append(link)
            if line != self._name and len(links) == 1:
                shape = self.shape_of(line)
                began_s = self._began_s
                link.set_shape(
                    shape.opening if began_s is None else shape.after(time.monotonic() - began_s)
                )
            else:
                self._share(line, link)

    def _share(self, line: str | Boundary, link: Link) -> None:
        """Shares the line of an earlier link: a device's first is that to the coordinator."""
        first = self.link_table.control[COORDINATOR] if line == self._name else self._lines[line][0]
        if link is not first:
            link.share_shape(first)

    def shape_of(self, line: str | Boundary) -> LinkShape:
        """Returns the shape of this node's traffic to a device, or over a boundary of nodes."""
        if isinstance(line, Boundary):
            lower = self._hosts[line.lower]
            return lower.up if line.lower == self._name else lower.down
        return self._hosts[line].down

    def _on_lost(self, link: Link, error: ChannelError) -> None:
        """Reports a link that ended; runs on the I/O thread."""
        boundary = self._of.get(link)
        if boundary is None:  # an unknown peer
            with self._lock:
                self._early = [one for one in self._early if one[1] is not link]
            return
        if self._hosts.may_be_lost(boundary.peer(self._name)):
            # The coordinator decides who goes on without it; it may return over another link.
            del self._of[link]
            with self._lock:
                for links in self._lines.values():
                    if link in links:
                        links.remove(link)
            # Not if the neighbour has ended, or has been away and has met this host anew since.
            is_cut = not (self._parting or isinstance(error, PeerClosed))
            if is_cut and dict(self.link_table.direct()).get(boundary) is link:
                self._cut(boundary.peer(self._name), str(error))
            return
        # A peer that closes its link has finished, or has told the coordinator why not.
        if not (self._parting or isinstance(error, PeerClosed)):
            peer = boundary.peer(self._name)
            words = f"{long_name(self._name)} lost {peer}"
            self._lost(registry.end_of(error, long_name(peer), words))
