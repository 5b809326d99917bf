"""A device or compute node as a role: it joins a coordinator and executes its share of the plan."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from typing import Any

import comms
from comms import ChannelError, Endpoint, Link, Message
from pipar_jax import config as configuration
from pipar_jax import data as datasets
from pipar_jax.config import Config
from pipar_jax.data import Dataset, Loader, Prefetcher
from pipar_jax.errors import JoinError, PeerError, RunError
from pipar_jax.plan import COORDINATOR, Boundary, Plan, device_name, long_name, node_name
from pipar_jax.runtime import bundle
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.identity import device_facts, join_message, node_facts
from pipar_jax.runtime.neighbours import Neighbours
from pipar_jax.runtime.setup import build_model, channel_options, set_precision
from pipar_jax.runtime.survey import Respondent
from pipar_jax.runtime.traffic import DirectTraffic, Waits
from pipar_jax.schedule import HAND_ON, RECEIVE_PART, RECEIVE_WEIGHTS, SEND_WEIGHTS, Action, Span
from pipar_jax.slowness import slowness_of
from pipar_jax.trace import Timed
from stages import Model

#: How often a waiting role looks whether it was told to stop.
LOOK_S = 0.1


def run_device(
    config: Config,
    index: int,
    address: tuple[str, int],
    *,
    model: Model | None = None,
    data: Dataset | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Takes part in a run as a device, until the coordinator ends it.

    Args:
      config: Resolved configuration.
      index: The device's index.
      address: The coordinator's host and port.
      model: The model, if not the configured one.
      data: The device's samples (its training split), if not the configured ones.
      stop: Ends the role when set.

    Raises:
      DataError: The device's data cannot be read, are wrong, or do not fit the model.
      JoinError: The coordinator cannot be reached or refuses this device.
      PeerError: The coordinator was lost or ended the run because of another host.
      RunError: This device failed.
    """
    set_precision(config)
    name = device_name(index)
    dataset = (
        datasets.load_device(config, index) if data is None else datasets.admit(data, "train", name)
    )
    network = model or build_model(config, dataset.input_shape, dataset.classes)
    datasets.check_fits(dataset, network.classes, network.input_shape, name)
    loader = Loader(
        dataset.train,
        None,
        config.data.batch_size,
        seed=config.seed,
        device=index,
        augment=config.data.augment,
        mean=dataset.mean,
        std=dataset.std,
        drop_last=config.data.drop_last,
    )
    worker = Worker(config, name, network, loader, stop)
    try:
        worker.run(address, device_facts(loader, network))
    finally:
        worker.close()


def run_node(
    config: Config,
    index: int,
    address: tuple[str, int],
    *,
    model: Model | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Takes part in a run as a compute node, until the coordinator ends it.

    A node has no data; it learns from the coordinator what the samples look like. It listens at
    ``nodes.host`` for its neighbours in the chains.

    Args:
      config: Resolved configuration.
      index: The node's index, from 1.
      address: The coordinator's host and port.
      model: The model, if not the configured one.
      stop: Ends the role when set.

    Raises:
      JoinError: The coordinator or a neighbour cannot be reached or refuses this node.
      PeerError: The coordinator or a neighbour was lost, or the run ended because of another host.
      RunError: This node failed, cannot listen, or the plan needs more memory than it may take.
    """
    set_precision(config)
    worker = Worker(config, node_name(index), model, None, stop)
    try:
        worker.run(address, node_facts(worker.listen()))
    finally:
        worker.close()


class Worker:
    """One host's side of a run: its links to the coordinator and to neighbours, and its host.

    Args:
      config: Resolved configuration.
      name: The host's name.
      model: The whole model; None if the coordinator is to say what the samples look like.
      loader: A device's mini-batches; None on a compute node.
      stop: Ends the role when set.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        model: Model | None,
        loader: Loader | None,
        stop: threading.Event | None = None,
    ) -> None:
        """See the class."""
        self._config, self._name, self._model = config, name, model
        self._own = configuration.host(config, name)
        self._stop = stop or threading.Event()
        self._inbox: queue.SimpleQueue[Message | BaseException] = queue.SimpleQueue()
        self._step = 0
        self._told_so = False  # whether the coordinator itself has ended this host's part
        self._link: Link | None = None
        self._waits: Waits | None = None
        self._direct: DirectTraffic | None = None
        self._prefetcher = None if loader is None else Prefetcher(loader)
        self._endpoint = Endpoint(name, options=channel_options(config))
        self._host: Host | None = None
        self._survey: Respondent | None = None
        self._neighbours = Neighbours(
            config, name, self._endpoint,
            tensors=self._on_tensor, wake=self._wake, lost=self._inbox.put,
            met=lambda: self._reply({"type": "met"}, {}),
        )  # fmt: skip
        self._commands: dict[str, Callable[[dict[str, Any]], None]] = {
            "model": self._take_model,
            "meet": self._meet,
            "plan": self._prepare,
            "calibrate": lambda _: self._running.calibrate(),
            "release": self._release,
            "survey": self._answer,
            "fetch": self._fetch,
            "look": self._tell_seen,
            "ahead": lambda b: self._running.prepare_ahead(b["number"], Plan.from_dict(b["plan"])),
            "give": lambda b: self._running.give(Plan.from_dict(b["plan"])),
        }
        if model is not None:
            self._start(model)

    def listen(self) -> tuple[str, int]:
        """Begins to listen for neighbours; returns the address.

        Raises:
          RunError: The configured address cannot be listened on.
        """
        return self._neighbours.listen()

    def run(self, address: tuple[str, int], facts: dict[str, Any]) -> None:
        """Joins, and follows the coordinator's commands until it says that the run is over.

        Args:
          address: The coordinator's host and port.
          facts: What it has to know of this host.

        Raises:
          PiparError: See ``run_device`` and ``run_node``.
        """
        self._link = link = self._connect(address)
        link.start(self._on_message, self._wake, self._inbox.put)
        try:
            link.send_control(join_message(self._config, self._name, facts))
            self._follow()
        except ChannelError as error:  # a send noticed it before the mail about it was read
            lost = self._lost(error)
            self._confess(lost)
            raise lost from error
        except Exception as error:
            self._confess(error)
            raise

    def _follow(self) -> None:
        """Does what the coordinator says until the run is over."""
        while True:
            item = self._next()
            if isinstance(item, ChannelError):
                raise self._lost(item) from item
            if isinstance(item, BaseException):
                raise item
            if item.kind == "bundle":
                self._take_bundle(item)
            elif item.body.get("type") == "finish":
                self._say_goodbye()
                return
            else:
                self._obey(item.body)

    def close(self) -> None:
        """Ends all threads of this role."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._host is not None:
            self._host.close()
        self._endpoint.close()

    def _start(self, model: Model) -> None:
        """Makes the host, once the model is known."""
        self._model = model
        self._host = Host(
            self._name,
            model,
            self._config,
            reply=self._reply,
            failed=self._inbox.put,
            wiring=self._neighbours.wiring,
            batches=self._prefetcher,
            slowness=slowness_of(self._own),
            rematerialise=self._own.rematerialise,
        )
        self._survey = Respondent(self._config, self._name, model, self._check_wanted)

    @property
    def _running(self) -> Host:
        if self._host is None:
            raise RunError(f"{self._name} was given work before it was told of the model")
        return self._host

    def _lost(self, error: ChannelError) -> PeerError:
        """Returns what the end of a link means, the coordinator's or a neighbour's."""
        if self._link is not None and self._link.error is not None:
            return PeerError(f"{self._long} lost the coordinator: {error}")
        return PeerError(f"{self._long} lost a neighbour: {error}")

    @property
    def _long(self) -> str:
        return long_name(self._name)

    # --- mail ---------------------------------------------------------------------------------

    def _connect(self, address: tuple[str, int]) -> Link:
        shape = comms.LinkShape()
        if isinstance(self._own, configuration.DeviceConfig):
            shape, _ = comms.parse_link(self._own.link)
        try:
            link = self._endpoint.connect(
                *address,
                name_of_peer=COORDINATOR,
                timeout_s=self._config.network.join_timeout_s,
                shape=shape.opening,
                expected=COORDINATOR,
            )
        except ChannelError as error:
            raise JoinError(f"{self._long} cannot join: {error}") from error
        self._neighbours.wiring.control[COORDINATOR] = link
        return link

    def _next(self) -> Message | BaseException:
        """Waits for mail, looking now and then whether to stop."""
        while not self._stop.is_set():
            try:
                return self._inbox.get(timeout=LOOK_S)
            except queue.Empty:
                continue
        raise PeerError(f"{self._long} was told to stop")

    def _on_message(self, message: Message) -> None:
        """Routes what arrives from the coordinator; runs on the I/O thread."""
        if message.kind == "tensor":
            self._on_tensor(message)
        else:
            self._inbox.put(message)

    def _on_tensor(self, message: Message) -> None:
        """Hands a tensor to the host; runs on the I/O thread."""
        self._running.on_message(message)

    def _wake(self) -> None:
        """Tells the host that a link has credit; runs on the I/O thread."""
        if self._host is not None:
            self._host.wake()

    def _confess(self, error: Exception) -> None:
        """Tells the coordinator why this host ends, so that it need not guess."""
        assert self._link is not None
        if self._told_so:
            return
        try:
            self._link.send_control({"type": "failed", "error": str(error)})
            self._link.drain(1.0)
        except ChannelError:
            return  # the coordinator is gone too; the error itself is raised by the caller

    # --- commands -----------------------------------------------------------------------------

    def _obey(self, body: dict[str, Any]) -> None:
        kind = body.get("type")
        if kind == "refused":
            self._told_so = True
            raise JoinError(f"the coordinator refuses {self._long}: {body['reason']}")
        if kind == "abort":
            self._told_so = True
            raise PeerError(f"the coordinator ended the run: {body['reason']}")
        if kind not in self._commands:
            raise RunError(f"the coordinator sent an unknown command {kind!r}")
        self._commands[kind](body)

    def _take_model(self, body: dict[str, Any]) -> None:
        if self._host is None:
            self._start(build_model(self._config, body["input_shape"], body["classes"]))

    def _meet(self, body: dict[str, Any]) -> None:
        boundaries = tuple(Boundary(*one) for one in body["boundaries"])
        self._neighbours.meet(boundaries, body["addresses"])

    def _fetch(self, _: dict[str, Any]) -> None:
        assert self._link is not None
        params, state = self._running.shared_variables()
        tensors = bundle.pack({"part": {"params": params, "state": state}})
        self._link.send_bundle("fetched", tensors, {"type": "fetched"})

    def _prepare(self, body: dict[str, Any]) -> None:
        assert self._link is not None
        self._waits = Waits(self._link)
        self._direct = DirectTraffic(self._name, self._neighbours.wiring)
        self._running.prepare(Plan.from_dict(body["plan"]), body["samples"], body["steps"])

    def _release(self, body: dict[str, Any]) -> None:
        spans = [Span(*span) for span in body["spans"]]
        mine = [span for span in spans if device_name(span.device) == self._name]
        if mine:
            self._step = mine[-1].stop - 1
        if body["round"] == 0:
            self._begin_schedule()
        self._running.release(body["round"], spans, body["holder"], body["demand"])

    def _begin_schedule(self) -> None:
        """Lets the rates of an emulated link change from now on, if they do."""
        if isinstance(self._own, configuration.DeviceConfig):
            up, _ = comms.parse_link(self._own.link)
            if up.schedule and self._link is not None:
                self._link.set_shape(up)
        self._neighbours.begin()

    def _tell_seen(self, body: dict[str, Any]) -> None:
        """Answers a look: what computations lasted here, and what the links brought."""
        assert self._link is not None
        stats = self._link.stats()
        self._link.send_control(
            {"type": "seen", "look": body["look"],
             "rows": [list(row) for row in self._running.observer.take()],
             "timed": [stats.timed_in_bytes, stats.timed_in_s],
             "direct": self._neighbours.wiring.timed()}
        )  # fmt: skip

    def _answer(self, body: dict[str, Any]) -> None:
        assert self._link is not None and self._survey is not None
        self._survey.obey(body, self._link)

    def _check_wanted(self) -> None:
        """Ends a measurement that nobody waits for any more."""
        if self._stop.is_set():
            raise PeerError(f"{self._long} was told to stop")
        if self._link is not None and self._link.error is not None:
            raise self._lost(self._link.error)

    def _take_bundle(self, message: Message) -> None:
        if message.body["type"] == "surveyed":
            assert self._survey is not None
            self._survey.take(message)
            return
        host = self._running
        groups = bundle.unpack(message.tensors, COORDINATOR)
        kind = message.body["type"]
        if kind == "adopt":
            self._direct = DirectTraffic(self._name, self._neighbours.wiring)  # there may be more
            host.adopt(Plan.from_dict(message.body["plan"]), groups)
            return
        step = message.body["step"] if kind == "part" else self._step
        received = RECEIVE_PART if kind == "part" else RECEIVE_WEIGHTS
        arrived = Action(0, received, int(self._name[1:]), step)
        host.recorder.add(Timed(arrived, message.first_byte_s, message.received_s, message.nbytes))
        if kind == "part":
            host.take_part(bundle.part_of(groups, "part"), step)
        else:
            whole = bundle.part_of(groups, "whole")
            host.store(whole["params"], whole["state"])

    def _say_goodbye(self) -> None:
        """Sends the rest of the trace, the last this device says, and waits until it has left."""
        assert self._link is not None
        self._neighbours.part()
        rows, _ = self._running.recorder.take()
        self._link.send_bundle("bye", bundle.pack_rows(rows), {"type": "bye"})
        self._link.drain(self._config.network.deadline_s)

    # --- replies; called on the host's threads ------------------------------------------------

    def _reply(self, body: dict[str, Any], arrays: dict[str, Any]) -> None:
        assert self._link is not None
        if body["type"] == "stored":
            rows, busy_s = self._running.recorder.take()
            assert self._waits is not None and self._direct is not None
            told = {"busy_s": busy_s, "link": self._waits.take(), "direct": self._direct.take()}
            self._link.send_control({**body, **told})
            if self._config.run.trace != "none":  # outside the round that it belongs to
                self._link.send_bundle("trace", bundle.pack_rows(rows), {"type": "trace"})
        elif arrays and body["type"] == "given":
            self._link.send_bundle("given", bundle.pack(arrays), body)
        elif arrays:
            averaged = body["type"] == "trained"  # what is handed on must stay as it is
            kind = SEND_WEIGHTS if averaged else HAND_ON
            sent = Action(0, kind, int(self._name[1:]), body.get("step", self._step))
            self._link.send_bundle(
                body["type"],
                bundle.pack(arrays),
                body,
                on_sent=functools.partial(self._record, sent),
                codec=self._config.aggregation.codec if averaged else "raw",
            )
        else:
            self._link.send_control(body)

    def _record(self, action: Action, start_s: float, end_s: float, nbytes: int) -> None:
        self._running.recorder.add(Timed(action, start_s, end_s, nbytes))
