"""A device as a role: it joins a coordinator, holds its data, executes its share of the plan."""

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
from pipar_jax.plan import COORDINATOR, Plan, device_name
from pipar_jax.runtime import bundle
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.identity import join_message
from pipar_jax.runtime.setup import build_model, channel_options, set_precision
from pipar_jax.runtime.survey import Respondent
from pipar_jax.runtime.traffic import Waits
from pipar_jax.schedule import HAND_ON, RECEIVE_PART, RECEIVE_WEIGHTS, SEND_WEIGHTS, Action, Span
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
      DataError: The device's data cannot be read.
      JoinError: The coordinator cannot be reached or refuses this device.
      PeerError: The coordinator was lost or ended the run because of another host.
      RunError: This device failed.
    """
    set_precision(config)
    dataset = datasets.load_device(config, index) if data is None else data
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
    worker = Worker(
        config,
        index,
        model or build_model(config, dataset.input_shape, dataset.classes),
        loader,
        stop,
    )
    try:
        worker.run(address)
    finally:
        worker.close()


class Worker:
    """One device's side of a run: its link to the coordinator and its host.

    Args:
      config: Resolved configuration.
      index: The device's index.
      model: The whole model.
      loader: The device's mini-batches.
      stop: Ends the role when set.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        model: Model,
        loader: Loader,
        stop: threading.Event | None = None,
    ) -> None:
        """See the class."""
        self._config, self._index, self._model, self._loader = config, index, model, loader
        self._stop = stop or threading.Event()
        self._inbox: queue.SimpleQueue[Message | BaseException] = queue.SimpleQueue()
        self._step = 0
        self._link: Link | None = None
        self._waits: Waits | None = None
        self._prefetcher = Prefetcher(loader)
        self._endpoint = Endpoint(device_name(index), options=channel_options(config))
        own = configuration.device(config, index)
        self._host = Host(
            device_name(index),
            model,
            config,
            reply=self._reply,
            failed=self._inbox.put,
            batches=self._prefetcher,
            slowdown=own.slowdown,
            rematerialise=own.rematerialise,
        )
        self._commands: dict[str, Callable[[dict[str, Any]], None]] = {
            "plan": self._prepare,
            "calibrate": lambda _: self._host.calibrate(),
            "release": self._release,
            "survey": self._answer,
        }
        self._survey = Respondent(config, index, model, self._check_wanted)

    def run(self, address: tuple[str, int]) -> None:
        """Joins, and follows the coordinator's commands until it says that the run is over.

        Raises:
          PiparError: See ``run_device``.
        """
        self._link = link = self._connect(address)
        self._host.links[COORDINATOR] = link
        link.start(self._on_message, self._host.wake, self._inbox.put)
        try:
            link.send_control(join_message(self._config, self._index, self._loader, self._model))
            self._follow()
        except (JoinError, PeerError):
            raise  # the coordinator knows
        except ChannelError as error:  # a send noticed it before the mail about it was read
            raise self._lost(error) from error
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

    def _lost(self, error: ChannelError) -> PeerError:
        return PeerError(f"device {self._index} lost the coordinator: {error}")

    def close(self) -> None:
        """Ends all threads of this role."""
        self._prefetcher.close()
        self._host.close()
        self._endpoint.close()

    # --- mail ---------------------------------------------------------------------------------

    def _connect(self, address: tuple[str, int]) -> Link:
        up, _ = comms.parse_link(configuration.device(self._config, self._index).link)
        try:
            return self._endpoint.connect(
                *address,
                name_of_peer=COORDINATOR,
                timeout_s=self._config.network.join_timeout_s,
                shape=up,
            )
        except ChannelError as error:
            raise JoinError(f"device {self._index} cannot join: {error}") from error

    def _next(self) -> Message | BaseException:
        """Waits for mail, looking now and then whether to stop."""
        while not self._stop.is_set():
            try:
                return self._inbox.get(timeout=LOOK_S)
            except queue.Empty:
                continue
        raise PeerError(f"device {self._index} was told to stop")

    def _on_message(self, message: Message) -> None:
        """Routes what arrives; runs on the I/O thread."""
        if message.kind == "tensor":
            self._host.on_message(message)
        else:
            self._inbox.put(message)

    def _confess(self, error: Exception) -> None:
        """Tells the coordinator why this device ends, so that it need not guess."""
        assert self._link is not None
        try:
            self._link.send_control({"type": "failed", "error": str(error)})
            self._link.drain(1.0)
        except ChannelError:
            return  # the coordinator is gone too; the error itself is raised by the caller

    # --- commands -----------------------------------------------------------------------------

    def _obey(self, body: dict[str, Any]) -> None:
        kind = body.get("type")
        if kind == "refused":
            raise JoinError(f"the coordinator refuses device {self._index}: {body['reason']}")
        if kind == "abort":
            raise PeerError(f"the coordinator ended the run: {body['reason']}")
        if kind not in self._commands:
            raise RunError(f"the coordinator sent an unknown command {kind!r}")
        self._commands[kind](body)

    def _prepare(self, body: dict[str, Any]) -> None:
        assert self._link is not None
        self._waits = Waits(self._link)
        self._host.prepare(Plan.from_dict(body["plan"]), body["samples"], body["steps"])

    def _release(self, body: dict[str, Any]) -> None:
        spans = [Span(*span) for span in body["spans"]]
        mine = [span for span in spans if span.device == self._index]
        if mine:
            self._step = mine[-1].stop - 1
        self._host.release(body["round"], spans, body["holder"], body["demand"])

    def _answer(self, body: dict[str, Any]) -> None:
        assert self._link is not None
        self._survey.obey(body, self._link)

    def _check_wanted(self) -> None:
        """Ends a measurement that nobody waits for any more."""
        if self._stop.is_set():
            raise PeerError(f"device {self._index} was told to stop")
        if self._link is not None and self._link.error is not None:
            raise PeerError(f"device {self._index} lost the coordinator: {self._link.error}")

    def _take_bundle(self, message: Message) -> None:
        if message.body["type"] == "surveyed":
            self._survey.take(message)
            return
        groups = bundle.unpack(message.tensors, COORDINATOR)
        kind = message.body["type"]
        step = message.body["step"] if kind == "part" else self._step
        arrived = Action(0, RECEIVE_PART if kind == "part" else RECEIVE_WEIGHTS, self._index, step)
        self._host.recorder.add(
            Timed(arrived, message.first_byte_s, message.received_s, message.nbytes)
        )
        if kind == "part":
            self._host.take_part(groups["part"], step)
        else:
            whole = groups["whole"]
            self._host.store(whole["params"], whole.get("state", {}))

    def _say_goodbye(self) -> None:
        """Sends the rest of the trace, the last this device says, and waits until it has left."""
        assert self._link is not None
        rows, _ = self._host.recorder.take()
        self._link.send_bundle("bye", bundle.pack_rows(rows), {"type": "bye"})
        self._link.drain(self._config.network.deadline_s)

    # --- replies; called on the host's threads ------------------------------------------------

    def _reply(self, body: dict[str, Any], arrays: dict[str, Any]) -> None:
        assert self._link is not None
        if body["type"] == "stored":
            rows, busy_s = self._host.recorder.take()
            assert self._waits is not None
            told = {"busy_s": busy_s, "link": self._waits.take()}
            self._link.send_control({**body, **told})
            if self._config.run.trace:  # outside the round that it belongs to
                self._link.send_bundle("trace", bundle.pack_rows(rows), {"type": "trace"})
        elif arrays:
            averaged = body["type"] == "trained"  # what is handed on must stay as it is
            kind = SEND_WEIGHTS if averaged else HAND_ON
            sent = Action(0, kind, self._index, self._step)
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
        self._host.recorder.add(Timed(action, start_s, end_s, nbytes))
