"""The coordinator's view of a run's devices and compute nodes: who has joined, what they report."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

from comms import ChannelError, Endpoint, Link, Message, MessageKind, PeerClosed
from comms.arrays import Array
from pipar_jax.config import Config
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import JoinError, PeerError, ProtocolError, RunError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import ControlMessage, Form, Sender, kind_of
from pipar_jax.roles import admission
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.admission import Identity
from pipar_jax.roles.holdings import SURVEYED
from pipar_jax.roles.patience import Moving, Patience, pulse_s
from pipar_jax.roles.population import Population, Presence
from pipar_jax.roles.refusals import Refusals
from pipar_jax.roles.replies import TAKES_LONG, Owed, Reply, answers
from pipar_jax.runtime import finite
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR, is_node, long_name
from stages import Model

#: Seconds between two checks of the clock and of the stop request while waiting.
LOOK_S = 0.1
#: Seconds within which the mail about a link is read after a send has found it ended.
LAST_WORDS_S = 1.0
#: Seconds within which a new link must ask to join.
JOIN_S = 30.0
#: Limits of a host's unread messages and bytes; above the first limit, messages that only report
#: progress are discarded.
MANY, MOST_WAITING, MOST_WAITING_BYTES = 64, 4096, 64 << 20
_PASSING = {kind_of(one) for one in (messages.Progress, messages.Pulse)}

M = TypeVar("M", bound=ControlMessage)


class Incoming(enum.Enum):
    """Kinds of unread mail of the coordinator's thread, with the content of each."""

    REPLY = "mail of the host in this process"
    FAILED = "the exception that ended the host in this process, or the channel"
    MESSAGE = "a message of a link"
    WRONG = "why a link was ended: what its peer sent, in words"
    LOST = "why a link has ended by itself"


class Mail(NamedTuple, Generic[M]):
    """A message of a host.

    Attributes:
      source: The host's name.
      said: The message.
      states: States of units that came with it, if from the host in this process.
      time_s: When it was sent in this process or arrived, on the monotonic clock.
      message: The message as received over the link, if from a device or node.
    """

    source: str
    said: M
    states: States
    time_s: float
    message: Message | None = None


@dataclasses.dataclass
class Member:
    """A device or node that takes part in the run.

    Attributes:
      link: Its link.
      identity: Its reported identity.
      owed: The replies that it owes.
      steps: For each device whose last stage it runs, the last reported step of the round.
      broken: Its reports of non-finite values in the round: kind, device, step.
    """

    link: Link
    identity: Identity
    owed: Owed = dataclasses.field(default_factory=Owed)
    steps: dict[int, int] = dataclasses.field(default_factory=dict)
    broken: set[tuple[str, int | None, int]] = dataclasses.field(default_factory=set)


class _Waiting:
    """Unread mail of a link, and its deadline to join."""

    def __init__(self) -> None:
        self.messages = self.nbytes = 0
        self.until_s = time.monotonic() + JOIN_S
        self.ended = False


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
      seats: For each device of a round its name in the plan: its place in the cohort.
      population: The devices that have registered, present or not.
      lost_hosts: Names of the members that the run has lost, in order.
      joined: Called with the name of a member that has joined; on the owner's thread.
      lost: Called with the name of a lost member and the reason; on the owner's thread.
      broken: Called with a report of non-finite values for which a device may be dropped.
      listeners: Receive mail of a kind at once, instead of ``collect``; on the owner's thread.
      acceptance: Which tensors may arrive; without it none.
      patience: The progress deadline.
      actions: Returns the number of completed actions on the host in this process.

    Args:
      config: Resolved configuration.
      model: The whole model.
      endpoint: Where devices connect.
      tensors: Receives the tensors that arrive from devices; runs on the I/O thread.
      wake: Called when a link has credit again; runs on the I/O thread.
      tell: Receives events.
      stop: Ends waiting when set.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        endpoint: Endpoint,
        *,
        tensors: Callable[[Message], None],
        wake: Callable[[], None],
        tell: OnEvent,
        stop: threading.Event,
    ) -> None:
        self._config, self._model, self._endpoint = config, model, endpoint
        self._tensors, self._wake, self._tell, self._stop = tensors, wake, tell, stop
        self._inbox: queue.SimpleQueue[tuple[Incoming, Link | None, Any]] = queue.SimpleQueue()
        self._links: dict[Link, _Waiting] = {}
        self._names: dict[Link, str] = {}
        self._early: list[Mail[ControlMessage]] = []
        self._refusals = Refusals(tell)
        self._moving: dict[str, Moving] = {}
        self.lost_hosts: list[str] = []
        self._away_since_s: dict[str, float] = {}  # of lost compute nodes
        self._pulse_s, self._pulsed_s, self._pulses = pulse_s(config.network), time.monotonic(), 0
        self.listeners: dict[type, Callable[[Mail[Any]], None]] = {}
        self.by_name: dict[str, Member] = {}
        self.seats: dict[str, str] = {}
        self.population = Population()
        self.joined: Callable[[str], None] = lambda name: None
        self.lost: Callable[[str, PeerError], None] = lambda name, error: None
        self.broken: Callable[[messages.NonFinite, str], None] = lambda said, source: None
        self._round = 0
        self.acceptance: Acceptance | None = None
        self.patience = Patience(config.network)
        self.hosts = hosts_of(config)
        self.actions: Callable[[], int] = lambda: 0

    # --- from other threads -------------------------------------------------------------------

    def on_link(self, link: Link) -> None:
        """Registers a new connection; runs on the I/O thread."""
        # A copy: the owner's thread removes links meanwhile.
        strangers = [one for one in list(self._links) if one not in self._names]
        if len(strangers) >= 64 + 2 * (self._config.devices.total + self._config.nodes.count):
            self._end(strangers[0], "too many links have not joined")
            self._links.pop(strangers[0], None)
        self._links[link] = _Waiting()
        link.start(
            lambda message: self._route(link, message),
            self._wake,
            lambda error: self._inbox.put((Incoming.LOST, link, error)),
        )

    def local_reply(self, said: ControlMessage, states: States) -> None:
        """Queues a reply of the host in this process; runs on its threads."""
        self._inbox.put((Incoming.REPLY, None, Mail(COORDINATOR, said, states, time.monotonic())))

    def local_failure(self, error: BaseException) -> None:
        """Queues the failure of the host in this process; runs on its threads."""
        self._inbox.put((Incoming.FAILED, None, error))

    def ask(self, name: str, command: ControlMessage) -> None:
        """Sends a command to a member whose loss is reported elsewhere; any thread may call it."""
        member = self.by_name[name]
        member.owed.add(answers(command))
        self._try(member.link, command)

    # --- what the coordinator's thread calls --------------------------------------------------

    def admit(self) -> None:
        """Waits until every compute node and the number of devices to begin with have joined.

        With ``cohort.min_devices`` of them it begins when none has joined for ``cohort.wait_s``.

        Raises:
          JoinError: Too few have joined within ``network.join_timeout_s``.
        """
        nodes, devices = self.hosts.nodes, self.hosts.expected
        least = self._config.cohort.min_devices or len(devices)
        began = changed = time.monotonic()
        told: list[str] = []
        limit_s = self._config.network.join_timeout_s
        while missing := [name for name in (*nodes, *devices) if name not in self.by_name]:
            if missing != told:
                told, changed = missing, time.monotonic()
                self._tell({"event": "waiting", "missing": missing})
            # Whoever comes in addition counts as well.
            here = sum(not is_node(name) for name in self.by_name)
            enough = here >= least and all(name in self.by_name for name in nodes)
            wait_s = self._config.cohort.wait_s
            left_s = changed + wait_s if enough else began + limit_s
            left_s -= time.monotonic()
            if left_s <= 0 and enough:
                return
            if left_s <= 0:
                most = 20
                rest = f" and {len(missing) - most} more" if len(missing) > most else ""
                raise JoinError(
                    f"{', '.join(missing[:most])}{rest} of {len(nodes) + len(devices)} hosts did "
                    f"not join within {limit_s:g} s, and {least} devices are needed: start them, "
                    "lower cohort.min_devices, or raise network.join_timeout_s"
                )
            self._take(min(left_s, LOOK_S))

    def collect(self, kind: type[M], sources: Sequence[str]) -> dict[str, Mail[M]]:
        """Waits until every source has sent a message of a kind, or is lost.

        Mail of other kinds is kept for a later call; progress is reported at once.

        Args:
          kind: Class of the message.
          sources: Names of hosts.

        Returns:
          Their messages, in the order of the sources; none of hosts that the run has lost.

        Raises:
          PeerError: A host was lost, failed, broke the protocol, or makes no progress, and the
            run cannot go on without it.
        """
        found: dict[str, Mail[M]] = {}
        self.patience.begin()
        while True:
            found |= self.said(kind, [name for name in sources if name not in found])
            missing = [name for name in self._there(sources) if name not in found]
            if not missing:
                return {name: found[name] for name in sources if name in found}
            self.wait(missing, kind_of(kind).name)

    def said(self, kind: type[M], sources: Collection[str]) -> dict[str, Mail[M]]:
        """Returns messages of a kind already received from some hosts, without waiting."""
        found: dict[str, Mail[M]] = {}
        for mail in [one for one in self._early if isinstance(one.said, kind)]:
            if mail.source in sources and mail.source not in found:
                self._early.remove(mail)
                found[mail.source] = cast(Mail[M], mail)
        return found

    def owes(self, name: str, kind: type) -> bool:
        """Returns whether a host has still to answer with something of a kind."""
        return name in self.by_name and self.by_name[name].owed.owes((kind,))

    def settle(self, name: str, *kinds: type) -> None:
        """Cancels a host's owed replies of some kinds; replies already received are discarded."""
        if name in self.by_name:
            self.by_name[name].owed.settle(kinds)
        self._early = [
            mail for mail in self._early
            if mail.source != name or not isinstance(mail.said, kinds)
        ]  # fmt: skip

    def drop(self, *places: int) -> None:
        """Rejects further tensors of some places in this attempt at a round."""
        assert self.acceptance is not None
        for place in places:
            self.acceptance.drop(place)

    def wait(self, missing: Sequence[str], what: str) -> None:
        """Waits briefly for mail, and checks that hosts make progress.

        Args:
          missing: The hosts that are waited for.
          what: The kind of message that is expected of them.

        Raises:
          PeerError: See ``collect``.
        """
        self._take(LOOK_S)
        try:
            self.patience.check(self._there(missing), what)
        except PeerError as error:
            late = [name for name in self._there(missing) if self._tolerates(name)]
            if not late:
                raise
            for name in late:
                self.lose(name, error)

    def _there(self, names: Sequence[str]) -> list[str]:
        """Returns the hosts that are not lost."""
        return [name for name in names if name == COORDINATOR or name in self.by_name]

    def poll(self) -> None:
        """Handles all waiting mail without waiting for more.

        Raises:
          PeerError: A device was lost or failed.
          RunError: The run was told to stop.
        """
        self._take(0.0)

    def tell(self, event: JsonObject) -> None:
        """Reports an event."""
        self._tell(event)

    def send(self, name: str, command: ControlMessage, *replies: Reply) -> None:
        """Sends a command to a member; does nothing if the run has lost it.

        Args:
          name: The member's name.
          command: A message of ``protocol``.
          replies: Its replies, where they depend on the plan.

        Raises:
          PeerError: The member is lost, and the run cannot go on without it.
        """
        if (member := self.by_name.get(name)) is None:
            return  # its loss has been reported
        member.owed.add(replies or answers(command))
        try:
            registry.send(member.link, command)
        except ChannelError as error:
            self._note_gone(name, error)

    def send_bundle(
        self,
        name: str,
        command: ControlMessage,
        tensors: Mapping[str, Array],
        *replies: Reply,
        codec: str = "raw",
    ) -> None:
        """Sends a command with named tensors to a member; does nothing if the run has lost it.

        Raises:
          PeerError: The member is lost, and the run cannot go on without it.
        """
        if (member := self.by_name.get(name)) is None:
            return
        member.owed.add(replies or answers(command))
        try:
            registry.send_bundle(member.link, command, tensors, codec=codec)
        except ChannelError as error:
            self._note_gone(name, error)

    def broadcast(self, command: ControlMessage) -> None:
        """Sends a command to every member.

        Raises:
          PeerError: A member is lost, and the run cannot go on without it.
        """
        for name in list(self.by_name):
            self.send(name, command)

    def working(self, what: str) -> None:
        """Tells every member that this thread is busy, so that its silence is not an error."""
        for member in list(self.by_name.values()):
            self._try(member.link, messages.Working(what, 0, 0))

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
        self._end(self.by_name[name].link, reason or str(error))
        if not self._tolerates(name):
            raise error
        member = self.by_name.pop(name)
        self._links.pop(member.link, None)
        self._names.pop(member.link, None)
        self._early = [mail for mail in self._early if mail.source != name]
        self._moving.pop(name, None)
        self.patience.forget(name)
        index, now_s = member.identity.index, time.monotonic()
        presence = Presence.LEFT if left else Presence.LOST
        kind = "node" if is_node(name) else "device"
        self.lost_hosts.append(name)
        if is_node(name):
            self._away_since_s[name] = now_s
        else:
            self.population.go(index, presence, now_s)
        self._tell({"event": f"{kind}_{presence.value}", kind: index, "reason": str(error)})
        self.lost(name, error)

    def _tolerates(self, name: str) -> bool:
        """Returns whether the run can go on without a member."""
        return self.hosts.may_be_lost(name)

    def abort(self, reason: str, *, again: bool = False) -> None:
        """Tells every reachable device that the run has ended.

        Args:
          reason: Why.
          again: Whether this process is expected to be restarted and to resume the run.
        """
        for member in self.by_name.values():
            self._try(member.link, messages.Abort(reason, again))
        for member in self.by_name.values():
            try:
                member.link.drain(0.5)
            except ChannelError:
                continue

    def close(self) -> None:
        """Reports the total of refusals."""
        self._refusals.close()

    # --- mail ---------------------------------------------------------------------------------

    def _route(self, link: Link, message: Message) -> None:
        """Routes arriving messages; runs on the I/O thread."""
        waiting = self._links.get(link)
        if waiting is None or waiting.ended:
            message.release()
            return
        name = self._names.get(link)
        reason = self._objection(waiting, name, message)
        if reason is not None:
            message.release()
            if name is not None and self._is_past(message):
                return
            self._end(link, reason)
            self._inbox.put((Incoming.WRONG, link, reason))
        elif message.kind == MessageKind.TENSOR:
            self._tensors(message)
        elif waiting.messages < MANY or registry.peek(message) not in _PASSING:
            waiting.messages += 1
            waiting.nbytes += message.nbytes
            self._inbox.put((Incoming.MESSAGE, link, message))

    def _is_past(self, message: Message) -> bool:
        """Returns whether it is a tensor of work that was abandoned while it was in transit."""
        if message.kind != MessageKind.TENSOR or message.tag is None or self.acceptance is None:
            return False
        return self.acceptance.is_past(message.tag)

    def open(self, index: int, spans: Sequence[Span], attempt: int, samples: Sequence[int]) -> None:
        """Accepts from members the tensors and progress of an attempt at a round."""
        assert self.acceptance is not None
        self._round = index
        self.acceptance.open(spans, attempt, samples)
        for member in self.by_name.values():
            member.steps.clear()
            member.broken.clear()

    def _objection(self, waiting: _Waiting, name: str | None, message: Message) -> str | None:
        """Returns why a message is rejected unread, or None; runs on the I/O thread."""
        if name is None:
            asked = message.kind == MessageKind.CONTROL and not waiting.messages
            return None if asked else f"{_what(message)} before it was admitted, expected a join"
        if message.kind == MessageKind.TENSOR:
            if self.acceptance is None:
                return f"{_what(message)} before there is a plan"
            return self.acceptance.objection(self.seats.get(name, name), message)
        if waiting.messages >= MOST_WAITING or waiting.nbytes > MOST_WAITING_BYTES:
            return f"{waiting.messages} messages of {waiting.nbytes} bytes that are still unread"
        known = registry.peek(message)
        if message.kind != MessageKind.BUNDLE or known is None or known.form is Form.CONTROL:
            return None
        # Checked before it is read: bundles are large.
        asked = self.by_name[name].owed.expects(known.made)
        return None if asked else f"{known.name!r}, which was not requested"

    def _end(self, link: Link, reason: str) -> None:
        """Ends a link and discards its unread mail; any thread may call it."""
        waiting = self._links.get(link)
        if waiting is not None:
            waiting.ended = True
        link.refuse(reason)

    def _try(self, link: Link, message: ControlMessage) -> None:
        """Sends a message over a link that may have ended."""
        try:
            registry.send(link, message)
        except ChannelError:
            return  # its loss is reported where it is waited for

    def _take(self, timeout_s: float) -> None:
        """Handles an item of mail, if any arrives in time."""
        if self._stop.is_set():
            raise RunError("the run was told to stop")
        self._beat()
        try:
            what, link, item = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        if what is Incoming.FAILED:
            if isinstance(item, ChannelError):
                self._wait_for_last_words()
                raise PeerError(f"a device was lost: {item}") from item
            raise item
        if what is Incoming.REPLY:
            self._sort(item)
            return
        assert link is not None
        name = self._names.get(link)
        if what is Incoming.LOST:
            known = self._links.pop(link, None) is not None
            if name is not None:
                lost = registry.end_of(item, long_name(name), f"{long_name(name)} was lost")
                self.lose(name, lost)
            elif known and not isinstance(item, PeerClosed):
                self._refusals.add(None, link.address, str(item))
        elif what is Incoming.WRONG:
            self._links.pop(link, None)
            if name is not None:
                self.lose(name, ProtocolError(f"{long_name(name)} sent {item}"), item)
            else:
                self._refusals.add(None, link.address, f"it sent {item}")
        elif name is None:
            if link in self._links:  # otherwise it was lost before this was read
                self._admit(link, item)
        else:
            self._read(name, link, item)

    def _read(self, name: str, link: Link, message: Message) -> None:
        """Reads a member's message."""
        if (waiting := self._links.get(link)) is not None:
            waiting.messages -= 1
            waiting.nbytes -= message.nbytes
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

    def _note_gone(self, name: str, error: ChannelError) -> None:
        """Loses a member after a failed send, with its own reason if it sent a last message.

        A send can notice the end of a link before the mail about it was read.
        """
        self._wait_for_last_words(name)
        if name in self.by_name:
            gone = PeerError(f"{long_name(name)} was lost: {error}")
            gone.__cause__ = error
            self.lose(name, gone)

    def _wait_for_last_words(self, name: str | None = None) -> None:
        """Reads mail briefly, until the loss of a member has been reported.

        Raises:
          PeerError: The run cannot go on without the member whose loss the mail reports.
        """
        deadline = time.monotonic() + LAST_WORDS_S
        while (left := deadline - time.monotonic()) > 0 and (name is None or name in self.by_name):
            self._take(min(left, LOOK_S))

    def _sort(self, mail: Mail[ControlMessage]) -> None:
        said = mail.said
        if isinstance(said, messages.Failed):
            self.lose(mail.source, PeerError(f"{long_name(mail.source)} failed: {said.error}"))
        elif isinstance(said, messages.Leave):
            self.lose(
                mail.source, PeerError(f"{long_name(mail.source)} left: {said.reason}"), left=True
            )
        elif isinstance(said, messages.Pulse):
            self.patience.pulse(mail.source, said.actions)
        elif isinstance(said, messages.Working):
            # Nothing that is asked during a round takes so long: there the clock runs.
            if mail.source == COORDINATOR or self.by_name[mail.source].owed.owes(TAKES_LONG):
                self.patience.working(mail.source, said.what)
            self.tell_working(mail.source, said.what, said.done, said.of)
        elif isinstance(said, messages.Progress):
            self._note_progress(mail.source, said)
        elif isinstance(said, messages.NonFinite):
            self._note_broken(mail.source, said)
        elif (listener := self.listeners.get(type(said))) is not None:
            listener(mail)
        else:
            self.patience.answered(mail.source)
            if isinstance(said, messages.Bye) and mail.message is not None:
                del self._names[mail.message.link]  # its end is not a loss
            self._early.append(mail)

    def tell_working(self, host: str, what: str, done: int, of: int) -> None:
        """Reports a host's work and how much of it is done."""
        self._tell({"event": "working", "host": host, "what": what, "done": done, "of": of})

    def _note_progress(self, source: str, said: messages.Progress) -> None:
        """Reports a completed step; the steps of a device must rise."""
        if source != COORDINATOR:
            if self._is_given_up(said.device, said.round):
                return
            seat = self.seats.get(source, source)
            steps, plan = self.by_name[source].steps, self.acceptance
            own = plan is not None and plan.tells_of(seat, said.device, said.step)
            own &= said.metrics.keys() == set(self._model.task.streamed)
            if not own or said.step <= steps.get(said.device, -1):
                self.blame(
                    source,
                    f"'progress' of device {said.device}, step {said.step}, which is not its own, "
                    "was reported before or has other metrics",
                )
                return
            steps[said.device] = said.step
        self._tell({"event": "progress", **dataclasses.asdict(said)})

    def _is_given_up(self, place: int | None, round_: int) -> bool:
        """Returns whether a report is of a round that is over, or of a dropped place."""
        if place is None or self.acceptance is None:
            return round_ < self._round
        return round_ < self._round or self.acceptance.is_dropped(place)

    def _note_broken(self, source: str, said: messages.NonFinite) -> None:
        """Reports non-finite values on a host, once for each device, step and kind."""
        if source != COORDINATOR:
            if self._is_given_up(said.device, said.round):
                return
            seat = self.seats.get(source, source)
            told, key = self.by_name[source].broken, (said.what, said.device, said.step)
            plan = self.acceptance
            own = plan is not None and plan.trains(seat, said.device, said.step)
            of_loss = said.what == "loss"
            own &= of_loss != bool(said.units) and not (of_loss and said.device is None)
            own &= set(said.units) <= set(self._model.unit_names)
            if not own or key in told:
                self.blame(source, f"'nonfinite' of device {said.device}, step {said.step}, "
                           "which is not its own or was reported before")  # fmt: skip
                return
            told.add(key)
        self.end_broken(said, source)

    def end_broken(self, found: messages.NonFinite, source: str = COORDINATOR) -> None:
        """Reports non-finite values.

        Raises:
          RunError: They end the run (``run.nonfinite=end``; with ``drop``, where they do not belong
            to a single device).
        """
        self._tell(finite.event(found))
        wanted = self._config.run.nonfinite
        if wanted == "end" or (wanted == "drop" and found.device is None):
            raise RunError(finite.line(found))
        if wanted == "drop":
            self.broken(found, source)

    def _beat(self) -> None:
        """Periodically sends members a pulse, and checks which members make progress."""
        now = time.monotonic()
        if now - self._pulsed_s < self._pulse_s:
            return
        self._pulsed_s = now
        self._pulses += 1
        self.patience.pulse(COORDINATOR, self.actions())
        for name, member in list(self.by_name.items()):
            self._try(member.link, messages.Pulse(self._pulses))
            if name not in self._moving:
                self._moving[name] = Moving(member.link)
            elif self._moving[name].look():
                self.patience.progress(name)
        for link, waiting in list(self._links.items()):
            late = link not in self._names and not waiting.ended and now > waiting.until_s
            if late:
                self._refuse(link, None, f"it did not ask to join within {JOIN_S:g} s")

    # --- joining ------------------------------------------------------------------------------

    def _admit(self, link: Link, message: Message) -> None:
        """Admits a device or node, or reports to it and to the user why not."""
        asked, reason = admission.read(message, self._config, self._model)
        name = getattr(asked, "name", None)
        if reason is None and name != link.peer:  # whose certificate and token were checked
            reason = f"it joins as {name!r}, but its link is that of {link.peer!r}"
        taken = reason is None and name in self.by_name
        if taken:  # or it has returned before its loss was noticed
            reason = f"{long_name(str(name))} has joined already: start it with another index"
        if reason is not None or asked is None:
            self._refuse(link, name, reason or "it did not ask to join", again=taken)
            return
        who = admission.identity(asked)
        waiting = self._links[link]
        waiting.messages, waiting.nbytes, waiting.until_s = 0, 0, float("inf")
        link.admit(SURVEYED)
        self.by_name[who.name] = Member(link, who)
        self._names[link] = who.name
        if is_node(who.name):
            self._try(link, messages.ModelFacts(self._model.signature))
            joined: JsonObject = {"event": "node_joined", "node": who.index}
            if (since_s := self._away_since_s.pop(who.name, None)) is not None:
                joined |= {"event": "node_returned", "away_s": time.monotonic() - since_s}
            self._tell(joined)
            self.joined(who.name)
            return
        link.set_shape(self.hosts[who.name].down)
        away_s = self.population.join(who, time.monotonic())
        joined = {"event": "device_joined", "device": who.index, "samples": who.samples}
        if away_s is not None:
            joined |= {"event": "device_returned", "away_s": away_s}
        self._tell(joined)
        self.joined(who.name)

    def _refuse(self, link: Link, name: str | None, reason: str, *, again: bool = False) -> None:
        """Reports to an unknown peer and to the user why it is refused, and ends its link."""
        self._refusals.add(name, link.address, reason)
        self._try(link, messages.Refused(reason, again))
        if (waiting := self._links.pop(link, None)) is not None:
            waiting.ended = True
        link.close(reason)


def _what(message: Message) -> str:
    """Returns a short description of a message."""
    if message.kind == MessageKind.TENSOR:
        return f"a tensor ({message.tag})"
    return f"a {message.kind} message"
