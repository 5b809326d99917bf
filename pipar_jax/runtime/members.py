"""Devices and compute nodes of a run as the coordinator knows them: who joined, what they say."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

import comms
from comms import ChannelError, Endpoint, Link, Message
from pipar_jax import config as configuration
from pipar_jax.config import Config
from pipar_jax.errors import JoinError, PeerError, RunError
from pipar_jax.plan import COORDINATOR, device_name, is_node, long_name
from pipar_jax.runtime import identity
from pipar_jax.runtime.identity import Identity
from stages import Model

#: How often a waiting coordinator looks at the clock and whether it was told to stop.
LOOK_S = 0.1
#: How long the mail about a link that a send found gone may take to be read.
LAST_WORDS_S = 1.0


class Mail(NamedTuple):
    """Something a host said.

    Attributes:
      source: The host's name.
      body: What it said.
      arrays: Arrays that came with it, from the host in this process.
      time_s: When it was said here or had arrived, on the monotonic clock.
      message: The message, from a device.
    """

    source: str
    body: dict[str, Any]
    arrays: dict[str, Any]
    time_s: float
    message: Message | None = None


@dataclasses.dataclass
class Member:
    """A device that takes part.

    Attributes:
      link: Its link.
      identity: What it said of itself.
    """

    link: Link
    identity: Identity


class Members:
    """Admits devices and nodes and collects what hosts say, that of this process included.

    Args:
      config: Resolved configuration.
      model: The whole model.
      endpoint: Where devices connect.
      tensors: Takes the tensors that arrive from devices; runs on the I/O thread.
      wake: Called when a link has credit again; runs on the I/O thread.
      tell: Takes events.
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
        tell: Callable[[dict[str, Any]], None],
        stop: threading.Event,
    ) -> None:
        """See the class."""
        self._config, self._model, self._endpoint = config, model, endpoint
        self._tensors, self._wake, self._tell, self._stop = tensors, wake, tell, stop
        self._inbox: queue.SimpleQueue[tuple[str, Link | None, Any]] = queue.SimpleQueue()
        self._names: dict[Link, str] = {}
        self._early: list[Mail] = []
        #: Takes mail of a kind as it comes, instead of ``collect``; runs on the owner's thread.
        self.listeners: dict[str, Callable[[Mail], None]] = {}
        self.by_name: dict[str, Member] = {}

    def on_link(self, link: Link) -> None:
        """Takes a new connection; runs on the I/O thread."""
        link.start(
            lambda message: self._route(link, message),
            self._wake,
            lambda error: self._inbox.put(("lost", link, error)),
        )

    def local_reply(self, body: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Takes a reply of the host in this process; runs on its threads."""
        self._inbox.put(("mail", None, Mail(COORDINATOR, body, arrays, time.monotonic())))

    def local_failure(self, error: BaseException) -> None:
        """Takes the failure of the host in this process; runs on its threads."""
        self._inbox.put(("failed", None, error))

    def admit(self) -> None:
        """Waits until every device and every compute node has joined.

        Raises:
          JoinError: Some have not within ``network.join_timeout_s``.
        """
        wanted = [
            *configuration.nodes(self._config),
            *(device_name(i) for i in range(self._config.devices.count)),
        ]
        deadline = time.monotonic() + self._config.network.join_timeout_s
        told: list[str] = []
        while missing := [name for name in wanted if name not in self.by_name]:
            if missing != told:
                told = missing
                self._tell({"event": "waiting", "missing": missing})
            left = deadline - time.monotonic()
            if left <= 0:
                raise JoinError(
                    f"{', '.join(missing)} of {len(wanted)} hosts did not join within "
                    f"{self._config.network.join_timeout_s:g} s: start them, or raise "
                    "network.join_timeout_s"
                )
            self._take(min(left, LOOK_S))

    def collect(self, kind: str, sources: Sequence[str]) -> dict[str, Mail]:
        """Waits until every source has said something of a kind.

        What arrives meanwhile of other kinds is kept for a later call; progress is told at once.

        Raises:
          PeerError: A device was lost or failed.
        """
        found: dict[str, Mail] = {}
        told = self.said(kind)
        while len(found) < len(sources):
            mail = next(told)
            if mail.source in sources:
                found[mail.source] = mail
        return {name: found[name] for name in sources}

    def said(self, *kinds: str) -> Iterator[Mail]:
        """Yields what hosts say of some kinds, as it comes, without end.

        Raises:
          PeerError: A device was lost or failed.
        """
        while True:
            for i, mail in enumerate(self._early):
                if mail.body["type"] in kinds:
                    yield self._early.pop(i)
                    break
            else:
                self._take(LOOK_S)

    def look(self) -> None:
        """Handles what mail there is without waiting for any.

        Raises:
          PeerError: A device was lost or failed.
          RunError: The run was told to stop.
        """
        self._take(0.0)

    def tell(self, event: dict[str, Any]) -> None:
        """Tells an event."""
        self._tell(event)

    def send(self, name: str, body: dict[str, Any]) -> None:
        """Sends a control message to a device.

        Raises:
          PeerError: The device is lost.
        """
        try:
            self.by_name[name].link.send_control(body)
        except ChannelError as error:
            self._mourn(error)

    def send_bundle(
        self,
        name: str,
        kind: str,
        tensors: Mapping[str, np.ndarray[Any, Any]],
        body: dict[str, Any],
        codec: str = "raw",
    ) -> None:
        """Sends named tensors to a device.

        Raises:
          PeerError: The device is lost.
        """
        try:
            self.by_name[name].link.send_bundle(kind, tensors, body, codec=codec)
        except ChannelError as error:
            self._mourn(error)

    def broadcast(self, body: dict[str, Any]) -> None:
        """Sends a control message to every device.

        Raises:
          PeerError: A device is lost.
        """
        for name in self.by_name:
            self.send(name, body)

    def abort(self, reason: str) -> None:
        """Tells every device that the run has ended, as far as they can still be told."""
        for member in self.by_name.values():
            try:
                member.link.send_control({"type": "abort", "reason": reason})
            except ChannelError:
                continue  # it is the lost one, or lost as well
        for member in self.by_name.values():
            try:
                member.link.drain(0.5)
            except ChannelError:
                continue

    def _route(self, link: Link, message: Message) -> None:
        """Sorts what arrives; runs on the I/O thread."""
        if message.kind == "tensor":
            self._tensors(message)
        else:
            self._inbox.put(("message", link, message))

    def _take(self, timeout_s: float) -> None:
        """Handles one item of mail, if any comes in time."""
        if self._stop.is_set():
            raise RunError("the run was told to stop")
        try:
            what, link, item = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        if what == "failed":
            if isinstance(item, ChannelError):
                self._mourn(item)
            raise item
        if what == "mail":
            self._sort(item)
            return
        assert link is not None
        name = self._names.get(link)
        if what == "lost":
            if name is not None:
                raise PeerError(f"{long_name(name)} was lost: {item}")
        elif name is None:
            self._admit(link, item.body)
        else:
            self._sort(Mail(name, item.body, {}, item.received_s, item))

    def _mourn(self, error: ChannelError) -> NoReturn:
        """Raises PeerError for a link that is gone, with the device's own words if it sent any.

        A send can notice the end of a link before the mail about it was read.
        """
        deadline = time.monotonic() + LAST_WORDS_S
        while (left := deadline - time.monotonic()) > 0:
            self._take(min(left, LOOK_S))
        raise PeerError(f"a device was lost: {error}") from error

    def _sort(self, mail: Mail) -> None:
        kind = mail.body.get("type")
        if kind == "failed":
            raise PeerError(f"{long_name(mail.source)} failed: {mail.body['error']}")
        if kind == "progress":
            self._tell({**mail.body, "event": "progress"})
            return
        if kind in self.listeners:
            self.listeners[kind](mail)
            return
        if kind == "bye" and mail.message is not None:
            del self._names[mail.message.link]  # its end is no loss any more
        self._early.append(mail)

    def _admit(self, link: Link, body: dict[str, Any]) -> None:
        """Takes a device in, or tells it and the user why not."""
        reason = identity.objection(body, self._config, self._model)
        name = body.get("name")
        if reason is None and name in self.by_name:
            reason = f"{long_name(body['name'])} has joined already: start it with another index"
        if reason is not None:
            self._tell({"event": "refused", "host": name, "reason": reason})
            with contextlib.suppress(ChannelError):  # it has gone by itself
                link.send_control({"type": "refused", "reason": reason})
            return
        who = identity.identity(body)
        link.admit()
        self.by_name[who.name] = Member(link, who)
        self._names[link] = who.name
        if is_node(who.name):
            link.send_control(
                {"type": "model", "input_shape": list(self._model.input_shape),
                 "classes": self._model.classes}
            )  # fmt: skip
            self._tell({"event": "node_joined", "node": who.index})
            return
        _, down = comms.parse_link(configuration.device(self._config, who.index).link)
        link.set_shape(down)
        self._tell({"event": "device_joined", "device": who.index, "samples": who.samples})
