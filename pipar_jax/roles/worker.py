"""A device or compute node as a role: it joins a coordinator and executes its share of the plan."""

from __future__ import annotations

import threading

import comms
from comms import ChannelError, Endpoint, Link, Message, MessageKind
from comms.link.pending_connection import CutShortError
from comms.wire.bounded_json import one_line
from pipar_jax.config import Config
from pipar_jax.data import Loader, Prefetcher
from pipar_jax.errors import JoinError, PeerError, ProtocolError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.messages import JoinDevice, JoinNode
from pipar_jax.protocol.registry import ControlMessage, Sender
from pipar_jax.report.logs import LOG
from pipar_jax.roles.commands import Commands
from pipar_jax.roles.coordinator_mail import CoordinatorMail
from pipar_jax.roles.course import Course
from pipar_jax.roles.federated_evaluation import LocalEvaluation
from pipar_jax.roles.holdings import SURVEYED, Holdings
from pipar_jax.roles.host_replies import HostReplies
from pipar_jax.roles.last_words import LastWords
from pipar_jax.roles.patience import Patience
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.roles.pulses import OwnPulse
from pipar_jax.roles.rights import Rights
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.personal import PersonalWeights
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.setup import build_model, channel_options
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Boundary,
    HostKind,
    long_name,
)
from stages import Model

#: How often a waiting role looks whether it was told to stop.
LOOK_S = 0.1


class Worker:
    """One host's side of a run: its links to the coordinator and to neighbours, and its host.

    Attributes:
      name: The host's name.
      admitted: Whether the coordinator has taken it.
      host: Its host, once the model is known.
      mail: What waits to be read.

    Args:
      config: Resolved configuration.
      name: The host's name.
      model: The whole model; None if the coordinator is to say what the samples look like.
      loader: A device's mini-batches; None on a compute node.
      stop: Ends the role when set.
      releases: What a device of a private run may send.
      tests: Scores weights on the device's own test data; None if it is not to.
      personal: The device's personal weights, if it has any.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        model: Model | None,
        loader: Loader | None,
        stop: threading.Event | None = None,
        releases: Releases | None = None,
        tests: LocalEvaluation | None = None,
        personal: PersonalWeights | None = None,
    ) -> None:
        self._config, self.name, self._model = config, name, model
        self._releases, self._tests, self._personal = releases, tests, personal
        hosts = hosts_of(config)
        self._own = hosts[name]
        self._stop = stop or threading.Event()
        self.admitted = False
        self._long = long_name(name)
        self._link: Link | None = None
        self._prefetcher = None if loader is None else Prefetcher(loader)
        self._endpoint = Endpoint(
            name, options=channel_options(config.network, config.pipeline.window_mb)
        )
        self.host: Host | None = None
        self._rights: Rights | None = None
        self._commands: Commands | None = None
        self._patience = Patience(config.network)
        self._pulse = OwnPulse(config.network, self._patience)
        self._last_words = LastWords(name, private=releases is not None)
        self._course = Course(hosts, name, None if model is None else model.unit_names)
        self.mail = CoordinatorMail(
            name, lambda message: self._on_tensor(COORDINATOR, message, None)
        )
        self._replies = HostReplies(
            name, lambda: self._coordinator, self._course, self._patience,
            codec=config.aggregation.codec, traced=config.run.trace != "none",
        )  # fmt: skip
        self._neighbours = PeerLinks(
            hosts, config.network, name, self._endpoint,
            tensors=self._on_tensor, wake=self._wake, cut=self._note_cut, met=self._note_met,
        )  # fmt: skip
        if model is not None and loader is not None:
            self._start(model)  # a node is told what samples look like

    def listen(self) -> tuple[str, int]:
        """Begins to listen for neighbours; returns the address.

        Raises:
          RunError: The configured address cannot be listened on.
        """
        return self._neighbours.listen()

    def run(self, address: tuple[str, int], join: JoinDevice | JoinNode, timeout_s: float) -> None:
        """Joins, and follows the coordinator's commands until it says that the run is over.

        Args:
          address: The coordinator's host and port.
          join: What it has to know of this host.
          timeout_s: Seconds within which it must be reached.

        Raises:
          PiparError: See ``run_device`` and ``run_node``.
        """
        LOG.info("%s: joins %s:%d", self.name, *address)
        self.connected(self._connect(address, timeout_s))
        try:
            registry.send(self._coordinator, join)
            self.follow()
        except ChannelError as error:  # a send noticed it before the mail about it was read
            lost = self._lost(error)
            self._last_words.failed(lost)
            raise lost from error
        except KeyboardInterrupt:
            self._last_words.interrupted()
            raise
        except Exception as error:
            self._last_words.failed(error)
            raise

    def connected(self, link: Link) -> None:
        """Takes what arrives on the link to the coordinator."""
        self._link = self._last_words.link = link
        link.admit(SURVEYED)
        self._pulse.connected(link)
        self._neighbours.link_table.control[COORDINATOR] = link
        link.start(self.mail.on_message, self._wake, self.mail.put)

    def follow(self) -> None:
        """Does what the coordinator says until the run is over.

        Raises:
          PiparError: See ``run_device`` and ``run_node``.
        """
        self._patience.begin(waiter=self)
        while True:
            item = self._next()
            if isinstance(item, ChannelError):
                raise self._lost(item) from item
            if isinstance(item, BaseException):
                raise item
            said = registry.decode(item, Sender.COORDINATOR, long_name(COORDINATOR))
            self.admitted = self.admitted or not isinstance(said, messages.Refused)
            self._note(said)
            if isinstance(said, messages.Working):
                self._patience.working(COORDINATOR)
                self._patience.check((COORDINATOR,), "a word")  # the next one may be there already
            else:
                self._patience.answered(COORDINATOR)
            if (reason := self._course.objection(said)) is not None:
                raise ProtocolError(
                    f"{long_name(COORDINATOR)} sent {self._long} "
                    f"{registry.kind_of(type(said)).name!r} {reason}"
                )
            if isinstance(said, messages.Finish):
                self._say_goodbye()
                return
            self._patience.pause()  # what this host does is no delay of the coordinator's
            self._do(said, item if item.kind == MessageKind.BUNDLE else None)
            self._patience.resume(computing=True, waiter=self)

    def _do(self, said: ControlMessage, message: Message | None) -> None:
        """Does what a message says that is not the last one."""
        if isinstance(said, messages.Pulse | messages.Working):
            return  # it only says that the coordinator goes on
        if isinstance(said, messages.Refused):
            self._last_words.told_so = True
            refused = JoinError(f"the coordinator refuses {self._long}: {said.reason}")
            refused.again = said.again
            raise refused
        if isinstance(said, messages.Abort):
            self._last_words.told_so = True
            ended = PeerError(f"the coordinator ended the run: {said.reason}")
            ended.again = said.again
            raise ended
        if isinstance(said, messages.ModelFacts):
            self._take_model(said)
        elif self._commands is None:
            raise ProtocolError(f"the server gave {self._long} work before it told of the model")
        else:
            self._commands.do(said, message)

    def _note(self, said: object) -> None:
        """Writes into the log what the coordinator wants; of its pulse and its work, nothing."""
        if not isinstance(said, messages.Pulse | messages.Working):
            number = f" {said.round}" if isinstance(said, messages.Release) else ""
            LOG.info("%s: %s%s", self.name, registry.kind_of(type(said)).name, number)

    def close(self) -> None:
        """Ends all threads of this role."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self.host is not None:
            self.host.close()
        self._endpoint.close()

    def _start(self, model: Model) -> None:
        """Makes the host, once the model is known."""
        self._model = model
        self.host = Host(
            self.name,
            model,
            self._config,
            reply=self._replies.send,
            failed=self.mail.put,
            refuse=self._refuse,
            link_table=self._neighbours.link_table,
            batches=self._prefetcher,
            slowness=self._own.slowdown,
            rematerialise=self._own.rematerialise,
            releases=self._releases,
            personal=self._personal,
        )
        self._replies.recorder = self.host.recorder
        self._rights = Rights(
            model, self.host, Holdings(model, self._config), self._course, self._neighbours,
            batch_size=self._config.data.batch_size, evaluates=self._tests is not None,
            refuse=self._refuse,
        )  # fmt: skip
        self._commands = Commands(
            self._config, self._own, model, self.host, self._rights, self._course,
            self._neighbours, self._replies, self._tests,
            link=lambda: self._coordinator, post=self._endpoint.post, between=self._check_wanted,
        )  # fmt: skip

    @property
    def _coordinator(self) -> Link:
        assert self._link is not None
        return self._link

    def _lost(self, error: ChannelError) -> PeerError:
        """Returns what the end of the coordinator's link means, or that it takes nothing more.

        Raises:
          JoinError: The coordinator's last word was that it refuses this host.
          PeerError: Its last word was why the run is over.
        """
        while (item := self.mail.get(0.0)) is not None:  # a send may notice the end first
            known = registry.peek(item) if isinstance(item, Message) else None
            if known is not None and known.made in (messages.Abort, messages.Refused):
                assert isinstance(item, Message)
                said = registry.decode(item, Sender.COORDINATOR, long_name(COORDINATOR))
                self._do(said, None)
        if self._link is not None and self._link.error is not None:
            lost = registry.end_of(error, "the server", f"{self._long} lost the coordinator")
            lost.again = not isinstance(lost, ProtocolError)
            return lost
        return PeerError(f"{self._long}: {error}")

    # --- mail ---------------------------------------------------------------------------------

    def _connect(self, address: tuple[str, int], timeout_s: float) -> Link:
        own = self._own
        shape = own.up if own.kind is HostKind.DEVICE else comms.LinkShape()
        try:
            return self._endpoint.connect(
                *address,
                name_of_peer=COORDINATOR,
                timeout_s=timeout_s,
                shape=shape.opening,
                expected=COORDINATOR,
            )
        except ChannelError as error:
            unreached = JoinError(f"{self._long} cannot join: {error}")
            # A server that is being started again may cut handshakes short.
            unreached.again = isinstance(error, CutShortError)
            raise unreached from error

    def _next(self) -> Message | BaseException:
        """Waits for mail, looking now and then whether to stop, and who goes on.

        Raises:
          PeerError: It was told to stop, or the coordinator shows no progress.
        """
        while not self._stop.is_set():
            if self.host is not None:
                self._pulse.beat(self._coordinator, self.host.actions)
            if (item := self.mail.get(LOOK_S)) is not None:
                return item
            self._neighbours.check()
            self._patience.check((COORDINATOR,), "a word")
        raise PeerError(f"{self._long} was told to stop")

    def _on_tensor(self, peer: str, message: Message, boundary: Boundary | None) -> str | None:
        """Hands a tensor to the host, or returns why not; runs on the I/O thread."""
        if self._rights is not None:
            return self._rights.on_tensor(peer, message, boundary)
        message.release()
        return f"a tensor ({message.tag}) before there is a plan"

    def _refuse(self, link: Link, reason: str) -> None:
        """Ends a link for what came over it: with the coordinator's this host's part ends, too."""
        if link.peer == COORDINATOR:
            self.mail.refuse(link, reason)
        else:
            self._neighbours.end(link, reason)

    def _wake(self) -> None:
        """Tells the host that a link has credit; runs on the I/O thread."""
        if self.host is not None:
            self.host.wake()

    def _take_model(self, said: messages.ModelFacts) -> None:
        try:
            model = build_model(self._config, said.signature, self._model)
        except Exception as error:
            raise ProtocolError(
                f"{long_name(COORDINATOR)} sent 'model' with samples {said.signature} of "
                f"{said.signature.classes} classes, for which {self._config.model.name} cannot be "
                f"made: {error}"
            ) from error
        if self.host is None:
            self._start(model)
        self._course.knows_model(model.unit_names)

    def _note_met(self, number: int) -> None:
        """Reports that all neighbours are connected; applies the plan's limits to them."""
        if self._rights is not None:
            self._rights.allow_neighbours()
        self._replies.send(messages.Met(number), {})

    def _note_cut(self, peer: str, reason: str, fault: bool) -> None:
        """Reports that there is no link to a neighbour any more; on any thread."""
        try:
            self._replies.send(messages.NeighbourLost(peer, one_line(reason, 300), fault), {})
        except ChannelError:
            return  # the coordinator's link has ended too, which the main thread hears of

    def _check_wanted(self) -> None:
        """Ends a measurement that nobody waits for any more."""
        if self._stop.is_set():
            raise PeerError(f"{self._long} was told to stop")
        if self._link is not None and self._link.error is not None:
            raise self._lost(self._link.error)

    def _say_goodbye(self) -> None:
        """Sends the last that this host says, and waits until it has left."""
        self._neighbours.finish()
        self._replies.say_goodbye()
        self._coordinator.drain(self._config.network.deadline_s)
