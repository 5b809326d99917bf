"""A worker's neighbours in the chains: who opens which link, and how it is recognised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import comms
from comms import ChannelError, Endpoint, Link, LinkShape, Message, PeerClosed
from pipar_jax import config as configuration
from pipar_jax.config import Config
from pipar_jax.errors import JoinError, PeerError, RunError
from pipar_jax.plan import COORDINATOR, Boundary, is_node, long_name
from pipar_jax.runtime.wiring import Wiring, dialler


class Neighbours:
    """Opens and takes the direct links of one host.

    Args:
      config: Resolved configuration.
      name: The host's name.
      endpoint: Where its links live.
      tensors: Takes the tensors that arrive; runs on the I/O thread.
      wake: Called when a link has credit again; runs on the I/O thread.
      lost: Takes the error of a link that ended before the run did; runs on the I/O thread.
      met: Called once every link that ``meet`` asked for is there; on any thread.

    Attributes:
      wiring: The links.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        endpoint: Endpoint,
        *,
        tensors: Callable[[Message], None],
        wake: Callable[[], None],
        lost: Callable[[BaseException], None],
        met: Callable[[], None],
    ) -> None:
        """See the class."""
        self._config, self._name, self._endpoint = config, name, endpoint
        self._tensors, self._wake, self._lost, self._met = tensors, wake, lost, met
        self.wiring = Wiring(name)
        self._lock = threading.Lock()
        self._expected: tuple[Boundary, ...] = ()
        self._early: list[tuple[Boundary, Link]] = []
        # Links that share an emulated line, by the device whose radio it is, or by their boundary.
        self._lines: dict[str | Boundary, list[Link]] = {}
        self._began_s: float | None = None
        self._parting = False

    def listen(self) -> tuple[str, int]:
        """Begins to listen where the configuration says; returns host and port.

        Raises:
          RunError: The address cannot be listened on.
        """
        own = configuration.node(self._config, int(self._name[1:]))
        try:
            hosts = self._config.devices.count + self._config.nodes.count
            return self._endpoint.listen(
                own.host, own.port, self._on_link, expected_peers=2 * hosts
            )
        except ChannelError as error:
            raise RunError(
                f"{long_name(self._name)} cannot listen on {own.host}:{own.port}: {error}"
            ) from error

    def meet(
        self, boundaries: tuple[Boundary, ...], addresses: Mapping[str, tuple[str, int]]
    ) -> None:
        """Opens this host's links and waits for those that others open; ``met`` follows.

        A later plan may need more: links that are there already stay as they are.

        Args:
          boundaries: All of a plan's boundaries that need a link of their own.
          addresses: Host and port of every node.

        Raises:
          JoinError: A neighbour cannot be reached.
        """
        mine = tuple(one for one in boundaries if self._name in one[:2])
        if not mine:
            self._met()
            return
        for boundary in self.wiring.missing(mine):
            if dialler(boundary) == self._name:
                self._dial(boundary, addresses)
        with self._lock:
            self._expected = mine
            early, self._early = self._early, []
        for boundary, link in early:
            self._take(boundary, link)
        self._look()

    def begin(self) -> None:
        """Lets the rates of emulated links change from now on, where they do."""
        with self._lock:
            self._began_s = time.monotonic()
            for line, links in self._lines.items():
                if line != self._name and not self._shape_of(line).schedule:
                    continue
                if line != self._name:
                    links[0].set_shape(self._shape_of(line))
                for link in links:
                    self._share(line, link)

    def part(self) -> None:
        """Notes that the run is over, so that the end of a link is no loss any more."""
        self._parting = True

    def _dial(self, boundary: Boundary, addresses: Mapping[str, tuple[str, int]]) -> None:
        peer = boundary.upper if boundary.lower == self._name else boundary.lower
        try:
            link = self._endpoint.connect(
                *addresses[peer],
                name_of_peer=peer,
                timeout_s=self._config.network.join_timeout_s,
                expected=peer,
            )
            self._shape(boundary, link)
            self._begin(link, peer)
            link.send_control({"type": "neighbour", "boundary": list(boundary)})
        except ChannelError as error:
            raise JoinError(
                f"{long_name(self._name)} cannot reach its neighbour {peer}: {error}"
            ) from error
        self.wiring.add(boundary, link)

    def _on_link(self, link: Link) -> None:
        """Takes a connection whose first message will say what it is for; on the I/O thread."""
        self._begin(link, "a neighbour")

    def _begin(self, link: Link, peer: str) -> None:
        link.start(
            lambda message: self._on_message(link, message),
            self._wake,
            lambda error: self._on_lost(peer, error),
        )

    def _on_message(self, link: Link, message: Message) -> None:
        """Routes what arrives from neighbours; runs on the I/O thread."""
        if message.kind == "tensor":
            self._tensors(message)
            return
        try:
            lower, upper, below = message.body["boundary"]
            boundary = Boundary(str(lower), str(upper), int(below))
        except (KeyError, TypeError, ValueError):
            self._lost(
                PeerError(f"{link.peer} sent {message.body!r}, expected a neighbour's hello")
            )
            return
        with self._lock:
            if not self._expected:  # it met the others before this host was asked to
                self._early.append((boundary, link))
                return
        self._take(boundary, link)
        self._look()

    def _take(self, boundary: Boundary, link: Link) -> None:
        """Takes a link that a neighbour opened, if it is one that is expected."""
        missing = self.wiring.missing(self._expected)
        if boundary not in missing or link.peer not in boundary[:2]:
            self._lost(
                PeerError(
                    f"{long_name(self._name)} was not to meet {link.peer} for {tuple(boundary)}: "
                    "do all hosts belong to this run?"
                )
            )
            return
        link.admit()
        self._shape(boundary, link)
        self.wiring.add(boundary, link)

    def _look(self) -> None:
        """Tells once when nothing is missing any more."""
        with self._lock:
            if not self._expected or self.wiring.missing(self._expected):
                return
            self._expected = ()
        self._met()

    def _shape(self, boundary: Boundary, link: Link) -> None:
        """Shapes what this host sends over a link: a device's links share its one radio."""
        line = next((one for one in boundary[:2] if not is_node(one)), boundary)
        with self._lock:
            links = self._lines.setdefault(line, [])
            links.append(link)
            if line != self._name and len(links) == 1:
                shape = self._shape_of(line)
                began_s = self._began_s
                link.set_shape(
                    shape.opening if began_s is None else shape.after(time.monotonic() - began_s)
                )
            else:
                self._share(line, link)

    def _share(self, line: str | Boundary, link: Link) -> None:
        """Puts a link on the line of another one: a device's first is that to the coordinator."""
        first = self.wiring.control[COORDINATOR] if line == self._name else self._lines[line][0]
        if link is not first:
            link.share_shape(first)

    def _shape_of(self, line: str | Boundary) -> LinkShape:
        """Returns the shape of what this node sends to a device, or over a boundary of nodes."""
        if isinstance(line, Boundary):
            lower = configuration.node(self._config, int(line.lower[1:]))
            up, down = comms.parse_link(lower.link)
            return up if line.lower == self._name else down
        _, down = comms.parse_link(configuration.device(self._config, int(line[1:])).link)
        return down

    def _on_lost(self, peer: str, error: ChannelError) -> None:
        """Tells of a link that ended; runs on the I/O thread."""
        # Who says goodbye has finished, or has told the coordinator why not.
        if not (self._parting or isinstance(error, PeerClosed)):
            self._lost(PeerError(f"{long_name(self._name)} lost {peer}: {error}"))
