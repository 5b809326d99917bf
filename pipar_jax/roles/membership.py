"""The coordinator's view of a run's devices and compute nodes: who has joined, what they report."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from comms import ChannelError, Link, Message, MessageKind
from pipar_jax.config import Config
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.errors import PeerError, ProtocolError, RunError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import ControlMessage, Sender, Tensors, kind_of
from pipar_jax.roles import waits
from pipar_jax.roles.broken_links import BrokenLinks
from pipar_jax.roles.joining import Joining
from pipar_jax.roles.mail import EarlyMail, Incoming, M, Mail, Member, Roll, try_send
from pipar_jax.roles.member_links import MemberLinks
from pipar_jax.roles.patience import Patience
from pipar_jax.roles.population import Presence
from pipar_jax.roles.pulses import Pulses
from pipar_jax.roles.replies import TAKES_LONG, Reply, answers
from pipar_jax.roles.silence import Silence, silent_s
from pipar_jax.roles.step_reports import StepReports
from pipar_jax.roles.waits import Expired, FailedSends, Wait
from pipar_jax.schedule.plan import COORDINATOR, is_node, long_name
from stages import Model


class Membership:
    """Admits devices and nodes and collects hosts' messages, including those of this process.

    Messages are checked in three steps: a new link is only allowed to ask to join; a member may
    only send what it was asked for (``replies``), in the form that ``protocol`` defines; and its
    contents must fit the plan, which the caller that asked for them checks. An unknown peer that
    breaks a rule is refused and counted, and the run goes on. A member's connection ends. If the
    run may lose the member (``cohort.*``, ``nodes.replicate_every``) this is an event, and it may
    rejoin under its name at any time; otherwise the run ends with an error that names it.

    Attributes:
      by_name: The present members.
      links: Their links, with the rights that the plan gives them.
      reports: Checks and tells what they report of their steps.
      population: The devices that have registered, present or not.
      lost_hosts: Names of the members that the run has lost, in order.
      joined: Called with the name of a member that has joined; on the owner's thread.
      lost: Called with the name of a lost member; on the owner's thread.
      listeners: Receive mail of a kind at once, instead of ``collect``; on the owner's thread.
      early: Answers that have been read and that nobody has collected.
      broken_links: Links between members that have ended.
      patience: The progress deadline.
      tell: Receives events.
      hosts: The hosts of the run.
      actions: Returns the number of completed actions on the host in this process.

    Args:
      config: Resolved configuration.
      model: The whole model.
      tensors: Receives the tensors that arrive from devices; runs on the I/O thread.
      wake: Called when a link has credit again; runs on the I/O thread.
      tell: Receives events.
      stop: Ends waiting when set.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        *,
        tensors: Callable[[Message], None],
        wake: Callable[[], None],
        tell: OnEvent,
        stop: threading.Event,
    ) -> None:
        self.tell, self._stop = tell, stop
        self.hosts = hosts_of(config)
        self.by_name: dict[str, Member] = {}
        most_strangers = 64 + 2 * (config.devices.total + config.nodes.count)
        self.links = MemberLinks(self.by_name, most_strangers, tensors=tensors, wake=wake)
        self.reports = StepReports(
            model, config.run.nonfinite, self.by_name, self.links, tell=tell, blame=self.blame
        )
        self._joining = Joining(config, model, self.hosts, self.by_name, self.links, tell)
        self.population = self._joining.population
        self.early = EarlyMail()
        self.patience = Patience(config.network)
        self._pulses = Pulses(config.network, self.patience)
        self.broken_links = BrokenLinks(config.network.deadline_s / 2)
        self._failed_sends = FailedSends()
        self._silent_s = silent_s(config.cohort, config.network)
        self.lost_hosts: list[str] = []
        self.listeners: dict[type, Callable[[Mail[Any]], None]] = {}
        self.joined: Callable[[str], None] = lambda name: None
        self.lost: Callable[[str], None] = lambda name: None
        self.actions: Callable[[], int] = lambda: 0

    def ask(self, name: str, command: ControlMessage) -> None:
        """Sends a command to a member whose loss is reported elsewhere; any thread may call it."""
        member = self.by_name[name]
        member.owed.add(answers(command))
        try_send(member.link, command)

    # --- what the coordinator's thread calls --------------------------------------------------

    def collect(self, kind: type[M], sources: Sequence[str]) -> dict[str, Mail[M]]:
        """Waits until every source has sent a message of a kind, or is lost.

        Mail of other kinds is kept for a later call; progress is reported at once.

        Args:
          kind: Class of the message.
          sources: Names of hosts.

        Returns:
          Their messages, in the order of the sources; none of hosts that are lost or not asked.

        Raises:
          PeerError: A host was lost, failed, broke the protocol, or makes no progress, and the
            run cannot go on without it.
        """
        found: dict[str, Mail[M]] = {}
        wait = self.waiting(kind_of(kind).name)
        silence = Silence(0.0 if kind in TAKES_LONG else self._silent_s)
        while True:
            found |= self.early.take(kind, [name for name in sources if name not in found])
            missing = [name for name in sources if name not in found and self.owes(name, kind)]
            if not missing:
                return {name: found[name] for name in sources if name in found}
            wait.look(missing)
            for name, error in silence.over(self.by_name, missing, time.monotonic()):
                self.lose(name, error)

    def owes(self, name: str, kind: type) -> bool:
        """Returns whether a host has still to answer; one that joined later was not asked."""
        asked = name in self.by_name and self.by_name[name].owed.owes((kind,))
        return asked or name == COORDINATOR  # which is asked without a link

    def roll(self, names: Iterable[str]) -> Roll:
        """Returns some hosts as the members that they are at this moment, those that are there."""
        return Roll(self.by_name, names)

    def settle(self, name: str, *kinds: type) -> None:
        """Cancels a host's owed replies of some kinds; replies already received are discarded."""
        if name in self.by_name:
            self.by_name[name].owed.settle(kinds)
        self.early.discard(name, kinds)

    def waiting(
        self, what: str, *, computing: bool = False, expired: Expired | None = None
    ) -> Wait:
        """Begins a wait, which handles mail and checks that hosts make progress.

        Args:
          what: The kind of message that is expected.
          computing: Whether the hosts compute meanwhile: actions that are over are progress then.
          expired: What is done with hosts that are late; None: they are lost.
        """
        return Wait(
            self.patience, self.by_name, poll=self.poll, may_be_lost=self.hosts.may_be_lost,
            lose=self.lose, what=what, computing=computing, expired=expired,
        )  # fmt: skip

    def send(self, name: str, command: ControlMessage, *replies: Reply) -> None:
        """Sends a command to a member; does nothing if the run has lost it.

        If its link has ended, its loss is reported when mail is read next, and not here.

        Args:
          name: The member's name.
          command: A message of ``protocol``.
          replies: Its replies, where they depend on the plan.
        """
        if (member := self.by_name.get(name)) is None:
            return  # its loss has been reported
        self._owe(name, replies or answers(command))
        try:
            registry.send(member.link, command)
        except ChannelError as error:
            self._failed_sends.add(name, member, error)

    def send_bundle(
        self,
        name: str,
        command: ControlMessage,
        tensors: Tensors,
        *replies: Reply,
    ) -> None:
        """Sends a command with named tensors to a member; see ``send``."""
        if (member := self.by_name.get(name)) is None:
            return
        self._owe(name, replies or answers(command))
        try:
            registry.send_bundle(member.link, command, tensors)
        except ChannelError as error:
            self._failed_sends.add(name, member, error)

    def _owe(self, name: str, replies: Sequence[Reply]) -> None:
        """Notes what a member owes from now on, if anything is added."""
        if replies:
            self.by_name[name].owed.add(replies)
            self.patience.asked(name)

    def broadcast(self, command: ControlMessage) -> None:
        """Sends a command to every member; see ``send``."""
        for name in list(self.by_name):
            self.send(name, command)

    def working(self, what: str) -> None:
        """Tells every member that this thread is busy, so that its silence is not an error."""
        for member in list(self.by_name.values()):
            try_send(member.link, messages.Working(what, 0, 0))

    def blame(self, name: str, reason: str) -> None:
        """Ends the connection of a member that sent an invalid message.

        Raises:
          ProtocolError: The run cannot go on without it; names the member and its message.
        """
        self.lose(name, ProtocolError(f"{long_name(name)} sent {reason}"), reason)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Ends the connection of a member whose bundle proves to be invalid.

        Raises:
          ProtocolError: In any such case; the run may go on without a device that is lost by it.
        """
        try:
            yield
        except ProtocolError as error:
            if name in self.by_name:
                self.lose(name, error)
            raise

    def lose(self, name: str, error: PeerError, reason: str = "", *, left: bool = False) -> None:
        """Ends the connection of a member and removes it from the run.

        Args:
          name: The member's name.
          error: The cause, which ends the run if it cannot go on without the member.
          reason: The reason sent over its link; the error's text unless given.
          left: Whether it left of its own accord.

        Raises:
          PeerError: The run cannot go on without it: the error given.
        """
        if name not in self.by_name:
            return  # its loss has been reported
        self.links.end(self.by_name[name].link, reason or str(error))
        if not self.hosts.may_be_lost(name):
            raise error
        member = self.by_name.pop(name)
        self.links.drop(member.link)
        self.links.forget(member.link)
        self.early.discard(name)
        self._pulses.forget(name)
        self.broken_links.forget(name)
        self._failed_sends.forget(name)
        index = member.identity.index
        presence = Presence.LEFT if left else Presence.LOST
        kind = "node" if is_node(name) else "device"
        self.lost_hosts.append(name)
        if is_node(name):
            self._joining.note_node_lost(name)
        else:
            self.population.go(index, presence, time.monotonic())
        self.tell({"event": f"{kind}_{presence.value}", kind: index, "reason": str(error)})
        self.lost(name)

    def close(self) -> None:
        """Reports the total of refusals."""
        self._joining.refusals.close()

    # --- mail ---------------------------------------------------------------------------------

    def poll(self, timeout_s: float = 0.0) -> None:
        """Handles an item of mail, if any arrives in time.

        Raises:
          PeerError: A device was lost or failed.
          RunError: The run was told to stop.
        """
        if self._stop.is_set():
            raise RunError("the run was told to stop")
        if self._pulses.are_due():
            self._pulses.send(self.by_name, self.actions())
            self._joining.refuse_late()
        try:
            what, link, item = self.links.mail.get(timeout=timeout_s)
        except queue.Empty:
            # Only now, since what has arrived says more of a host's end, or of another's.
            for gone, error in [
                *self.broken_links.due(self.by_name), *self._failed_sends.due()
            ]:  # fmt: skip
                self.lose(gone, error)
            return
        if what is Incoming.FAILED:
            if isinstance(item, ChannelError):
                self._read_last_words()
                raise PeerError(f"a device was lost: {item}") from item
            raise item
        if what is Incoming.REPLY:
            self._sort(item)
            return
        assert link is not None
        name = self.links.name_of(link)
        if name is None:
            self._take_stranger(what, link, item)
        elif what is Incoming.MESSAGE:
            self._read(name, link, item)
        elif what is Incoming.WRONG:
            self.lose(name, ProtocolError(f"{long_name(name)} sent {item}"), item)
        else:
            self.lose(name, registry.end_of(item, long_name(name), f"{long_name(name)} was lost"))

    def _take_stranger(self, what: Incoming, link: Link, item: Any) -> None:
        """Admits a stranger, or has it refused."""
        member = self._joining.take(what, link, item)
        if member is not None:
            name = member.identity.name
            self.by_name[name] = member  # first: from now on the I/O thread asks what it owes
            self.patience.progress(name)
            self._joining.introduce(member)
            self.joined(name)

    def _read(self, name: str, link: Link, message: Message) -> None:
        """Reads a member's message."""
        self.links.note_read(link, message)
        try:
            said = registry.decode(message, Sender.HOST, long_name(name))
        except ProtocolError as error:
            self.lose(name, error)
            return
        owed = self.by_name[name].owed
        reason = owed.objection(said, bundle=message.kind == MessageKind.BUNDLE)
        if reason is not None:
            self.blame(name, reason)
            return
        self._sort(Mail(name, said, {}, message.received_s, message))

    def _read_last_words(self) -> None:
        """Reads mail briefly, in case it says more of an end than the send that has noticed it.

        Raises:
          PeerError: A host was lost, and the run cannot go on without it.
        """
        deadline = time.monotonic() + waits.LAST_WORDS_S
        while (left := deadline - time.monotonic()) > 0:
            self.poll(min(left, waits.LOOK_S))

    def _sort(self, mail: Mail[ControlMessage]) -> None:
        said = mail.said
        if isinstance(said, messages.Failed):
            self.lose(mail.source, PeerError(f"{long_name(mail.source)} failed: {said.error}"))
        elif isinstance(said, messages.Leave):
            self.lose(
                mail.source, PeerError(f"{long_name(mail.source)} left: {said.reason}"), left=True
            )
        elif isinstance(said, messages.NeighbourLost):
            if (odd := self.broken_links.add(mail.source, said, self.by_name)) is not None:
                self.blame(mail.source, odd)
        elif isinstance(said, messages.Pulse):
            self.patience.pulse(mail.source, said.actions)
        elif isinstance(said, messages.Working):
            # Nothing that is asked during a round takes so long: there the clock runs.
            if mail.source == COORDINATOR or self.by_name[mail.source].owed.owes(TAKES_LONG):
                self.patience.working(mail.source)
            self.reports.tell_working(mail.source, said.what, said.done, said.of)
        elif isinstance(said, messages.Progress):
            self.reports.note_progress(mail.source, said)
        elif isinstance(said, messages.NonFinite):
            self.reports.note_broken(mail.source, said)
        elif (listener := self.listeners.get(type(said))) is not None:
            listener(mail)
        else:
            self.patience.answered(mail.source)
            if isinstance(said, messages.Bye) and mail.message is not None:
                self.links.forget(mail.message.link)  # its end is not a loss
            self.early.add(mail)
