"""A worker's links to its neighbours in the chains: who opens a link, and how it is identified.

What a neighbour sends, or does not send, ends its own link at most: this host says so to the
coordinator, which decides who goes (``roles/broken_links.py``), and goes on with what it has.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping

from comms import Allowance, ChannelError, Endpoint, Link, LinkShape, Message, MessageKind
from comms.wire.bounded_json import one_line
from pipar_jax.config import Hosts, NetworkConfig
from pipar_jax.errors import ProtocolError, RunError
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import Sender
from pipar_jax.roles.patience import limit_s
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
      cut: Receives the name of a neighbour, why there is no link to it any more, and whether this
        host has ended it for what the neighbour sent; on any thread.
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
        cut: Callable[[str, str, bool], None],
        met: Callable[[int], None],
    ) -> None:
        self._hosts, self._network, self._name, self._endpoint = hosts, network, name, endpoint
        self._tensors, self._wake, self._cut, self._met = tensors, wake, cut, met
        self.link_table = LinkTable(name)
        self.refused = 0
        self._lock, self._telling = threading.RLock(), threading.Lock()
        self._expected: tuple[Boundary, ...] = ()
        self._numbers: list[int] = []  # of the meetings that are to be answered
        self._number = 0  # of the last meeting that this host was asked to
        self._anew: dict[Boundary, int] = {}  # the last meeting that asked for a new link
        self._until_s, self._reason = 0.0, ""  # of waiting; of the last refusal
        # Links of neighbours that have been asked to a meeting before this host was.
        self._early: dict[Boundary, tuple[int, Link]] = {}
        # Links that share an emulated line, by the device that owns the radio, or by boundary.
        self._lines: dict[str | Boundary, list[Link]] = {}
        self._began_s: float | None = None
        self._parting = False
        self._strangers: set[Link] = set()  # links that have not said what they are for
        self._of: dict[Link, Boundary] = {}  # links that were taken and have not ended

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
        anew: Collection[Boundary] = (),
    ) -> None:
        """Opens this host's links and waits for those that others open; ``met`` is called then.

        A later plan may need more links: existing links stay as they are. A later call replaces an
        earlier one that still waits, as when one of the neighbours is lost. A neighbour that cannot
        be reached is reported.

        Args:
          number: Number of the meeting, from 1.
          boundaries: All of a plan's boundaries that need a link of their own.
          addresses: Host and port of every node.
          anew: Those of them whose earlier links do not count: their other end may be another
            process by now, whose end this host has not noticed.
        """
        mine = tuple(one for one in boundaries if self._name in one[:2])
        with self._lock:
            self._anew.update(dict.fromkeys(set(anew).intersection(mine), number))
            for link in [link for link, boundary in self._of.items() if boundary in anew]:
                self._part(link)
                link.refuse("its ends meet anew")
        for boundary in self.link_table.missing(mine):
            if dialler(boundary) == self._name:
                self._dial(boundary, addresses, number)
        with self._lock:
            self._expected, self._number = mine, number
            self._numbers.append(number)
            self._until_s = time.monotonic() + self._patience_s
            early, self._early = self._early, {}
            for boundary, (meeting, link) in early.items():
                self._place(boundary, meeting, link)
        self._look()

    def check(self) -> None:
        """Reports neighbours that do not connect in time, or are refused; each meeting's once."""
        with self._lock:
            if not self._expected or time.monotonic() <= self._until_s:
                return
            late = {one.peer(self._name) for one in self.link_table.missing(self._expected)}
            self._until_s = math.inf
            refused = f"; {self.refused} refused, the last: {self._reason}" if self.refused else ""
        for peer in sorted(late):
            self._cut(
                peer,
                f"{long_name(peer)} did not connect to {long_name(self._name)} within "
                f"{self._patience_s:g} s (network.join_timeout_s, deadline_s and progress_s)"
                f"{refused}",
                False,
            )

    @property
    def _patience_s(self) -> float:
        """Seconds to wait for links that others open: as long as they may try to connect.

        Less if the run would end before, with this host as the one that makes no progress.
        """
        may_try_s = self._network.join_timeout_s + self._network.deadline_s
        return min(may_try_s, limit_s(self._network, 0.0) / 2)

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

    def _dial(
        self, boundary: Boundary, addresses: Mapping[str, tuple[str, int]], number: int
    ) -> None:
        peer = boundary.peer(self._name)
        try:
            link = self._endpoint.connect(
                *addresses[peer],
                name_of_peer=peer,
                timeout_s=self._dial_s(peer),
                expected=peer,
                retry=not self._hosts.may_be_lost(peer),
            )
        except ChannelError as error:
            self._cut(peer, f"{long_name(self._name)} cannot reach its neighbour: {error}", False)
            return
        self._take(boundary, link)
        self._begin(link)
        with contextlib.suppress(ChannelError):  # its end is reported
            registry.send(link, messages.Neighbour(boundary, number))

    def _dial_s(self, peer: str) -> float:
        """Returns the seconds within which a neighbour must answer, which listens before it joins.

        Others wait while this host tries to reach one that is gone.
        """
        limit_s = self._network.join_timeout_s
        may_be_lost = self._hosts.may_be_lost(peer)
        return min(limit_s, self._network.deadline_s) if may_be_lost else limit_s

    def on_link(self, link: Link) -> None:
        """Accepts a connection, whose first message names its boundary; on the I/O thread."""
        self._strangers.add(link)
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
        if link not in self._strangers:
            message.release()  # of a link that was ended here, and has not noticed it yet
            return
        try:
            said = registry.decode(message, Sender.NEIGHBOUR, "a neighbour")
        except ProtocolError as error:
            self._refuse(link, str(error))
            return
        assert isinstance(said, messages.Neighbour)  # the one message between neighbours
        boundary = said.boundary
        known = self._name in boundary[:2] and link.peer == boundary.peer(self._name)
        if not known or link.peer not in self._hosts or link.peer == COORDINATOR:
            self._refuse(link, f"{link.peer} asked to be a neighbour for {tuple(boundary)}")
            return
        with self._lock:
            self._place(boundary, said.number, link)
        self._look()

    def _on_neighbour(self, link: Link, boundary: Boundary, message: Message) -> None:
        """Receives what a connected neighbour sends: only tensors."""
        if message.kind == MessageKind.TENSOR:
            reason = self._tensors(boundary.peer(self._name), message, boundary)
        else:
            message.release()
            reason = f"a {message.kind} message, expected tensors"
        if reason is not None:
            self.end(link, reason)

    def _refuse(self, link: Link, reason: str) -> None:
        """Ends the link of an unknown peer; the run goes on."""
        self.refused += 1
        self._reason = one_line(reason, 300)
        self._strangers.discard(link)
        link.refuse(reason)

    def _place(self, boundary: Boundary, number: int, link: Link) -> None:
        """Takes a link that a neighbour opened, keeps it for a later meeting, or refuses it.

        The lock is held.

        Args:
          boundary: What it is for.
          number: The meeting for which it was opened.
          link: The link.
        """
        if number > self._number:  # the neighbour was asked to it before this host is
            before = self._early.pop(boundary, None)
            if before is None or before[1] is not link:
                self._early[boundary] = number, link
            if before is not None:
                reason = f"{link.peer} asked twice to be a neighbour for {tuple(boundary)}"
                self._refuse(before[1], reason)
            return
        missing = self.link_table.missing(self._expected)
        if boundary in missing and number >= self._anew.get(boundary, 0):
            self._strangers.discard(link)
            self._take(boundary, link)
            return
        self._refuse(
            link,
            f"{long_name(self._name)} does not expect {link.peer} for {tuple(boundary)}: do all "
            "hosts belong to this run?",
        )

    def _take(self, boundary: Boundary, link: Link) -> None:
        """Makes a link that of a boundary, in place of an earlier one."""
        with self._lock:
            for earlier in [one for one, of in self._of.items() if of == boundary]:
                self._part(earlier)  # it has ended, and its end is about to be told
            self._of[link] = boundary
            link.admit(_NOTHING)
            self._shape(boundary, link)
            self.link_table.add(boundary, link)

    def _look(self) -> None:
        """Calls ``met``, once for each meeting, when no link is missing."""
        with self._telling:  # two threads come here, and answers have an order
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

    def has(self, link: Link) -> bool:
        """Returns whether a neighbour's link was taken and has not ended."""
        return link in self._of

    def end(self, link: Link, reason: str) -> None:
        """Ends a neighbour's link for what came over it, and reports it; on any thread.

        Args:
          link: The link.
          reason: What the neighbour sent.
        """
        self._end(link, reason, fault=True)

    def _on_lost(self, link: Link, error: ChannelError) -> None:
        """Reports a link that ended, regularly or not; runs on the I/O thread."""
        with self._lock:
            self._strangers.discard(link)
            for boundary, (_, early) in list(self._early.items()):
                if early is link:
                    del self._early[boundary]
        if (violation := registry.violation(error)) is None:
            self._end(link, str(error), fault=False)
        else:
            self._end(link, f"what breaks the channel's protocol: {violation}", fault=True)

    def _end(self, link: Link, reason: str, *, fault: bool) -> None:
        """Ends a neighbour's link and reports it; not if this host is leaving.

        The one way in which a link ends on this side, whatever the cause. The neighbour may have
        ended, or be about to: the coordinator knows which reports are of no importance.
        """
        with self._lock:
            boundary = self._of.get(link)
            if boundary is None:
                return  # ended before, or opened anew
            self._part(link)
        link.refuse(reason)
        if not self._parting:
            self._cut(boundary.peer(self._name), reason, fault)

    def _part(self, link: Link) -> None:
        """Takes a link out of all tables; the lock is held."""
        self.link_table.end(self._of.pop(link))
        for line, links in list(self._lines.items()):
            if link in links:
                links.remove(link)
            if not links:
                del self._lines[line]
