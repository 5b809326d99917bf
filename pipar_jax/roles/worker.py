"""A device or compute node as a role: it joins a coordinator and executes its share of the plan."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import comms
from comms import ChannelError, Endpoint, Link, Message, MessageKind
from comms.link.pending_connection import CutShortError
from pipar_jax import data as datasets
from pipar_jax.config import Config
from pipar_jax.data import Dataset, Loader, Prefetcher
from pipar_jax.data.augmentation import find_augmentation
from pipar_jax.errors import DataError, JoinError, PeerError, PiparError, ProtocolError, RunError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.messages import JoinDevice, JoinNode
from pipar_jax.protocol.registry import ControlMessage, Sender
from pipar_jax.protocol.values import Timing
from pipar_jax.report.logs import LOG
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.admission import device_join, node_join
from pipar_jax.roles.base_files import BaseFile
from pipar_jax.roles.course import Course
from pipar_jax.roles.federated_evaluation import LocalEvaluation, network_states
from pipar_jax.roles.holdings import SURVEYED, Holdings
from pipar_jax.roles.link_stats import DirectTraffic, OwnWaits
from pipar_jax.roles.patience import Moving, Patience, pulse_s
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.roles.rejoin import persist
from pipar_jax.roles.survey import Respondent
from pipar_jax.runtime import exchanges, trace_rows, unit_state
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.setup import build_model, channel_options, fit, set_up_jax, target_rule
from pipar_jax.runtime.state_files import StateTag
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import (
    RECEIVE_CLIENT_MODEL,
    RECEIVE_WEIGHTS,
    SEND_CLIENT_MODEL,
    SEND_WEIGHTS,
    Action,
    ActionKind,
)
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Boundary,
    HostKind,
    Plan,
    device_name,
    host_index,
    long_name,
    node_name,
)
from pipar_jax.schedule.trace import Timed
from stages import Model

#: How often a waiting role looks whether it was told to stop.
LOOK_S = 0.1
#: Control messages and bundles of the coordinator that may wait to be read.
MOST_WAITING, MOST_BUNDLES = 4096, 4
#: Tensors of neighbours that may be ahead of this host.
MOST_AHEAD = 4096


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
    set_up_jax(config.model)
    name = device_name(index)
    rule = target_rule(config, model)
    dataset = (
        datasets.load_device(config, index, rule)
        if data is None
        else datasets.admit_device(data, name, rule, tests=config.run.evaluate_on != "server")
    )
    network = fit(config, model, dataset, name)
    tests = None
    if config.run.evaluate_on != "server":
        tests = LocalEvaluation(network, dataset, config.model.weight_dtype)
    releases = Releases(config, name) if config.privacy.on else None
    keyed = None
    if releases is not None:
        dataset, keyed = releases.protect(dataset)
    loader = Loader(
        dataset.train,
        None,
        config.data.batch_size,
        seed=config.seed,
        device=index,
        augment=find_augmentation(config.data.augment),
        mean=dataset.mean,
        std=dataset.std,
        drop_last=config.data.drop_last,
    )

    if releases is not None:
        releases.expect(loader.samples_per_epoch)
    join = device_join(config, name, loader, network, keyed)

    def take_part(timeout_s: float) -> None:
        worker = Worker(config, name, network, loader, stop, releases, tests)
        try:
            worker.run(address, join, timeout_s)
        except PiparError as error:
            error.taken = worker.admitted
            raise
        finally:
            worker.close()

    try:
        persist(
            take_part,
            join_timeout_s=config.network.join_timeout_s,
            rejoin_s=config.network.rejoin_s,
            stop=stop or threading.Event(),
        )
    finally:
        if releases is not None:
            releases.close()


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
    set_up_jax(config.model)

    def take_part(timeout_s: float) -> None:
        worker = Worker(config, node_name(index), model, None, stop)
        try:
            worker.run(address, node_join(config, worker.name, worker.listen()), timeout_s)
        except PiparError as error:
            error.taken = worker.admitted
            raise
        finally:
            worker.close()

    persist(
        take_part,
        join_timeout_s=config.network.join_timeout_s,
        rejoin_s=config.network.rejoin_s,
        stop=stop or threading.Event(),
    )


class Worker:
    """One host's side of a run: its links to the coordinator and to neighbours, and its host.

    Attributes:
      name: The host's name.
      admitted: Whether the coordinator has taken it.

    Args:
      config: Resolved configuration.
      name: The host's name.
      model: The whole model; None if the coordinator is to say what the samples look like.
      loader: A device's mini-batches; None on a compute node.
      stop: Ends the role when set.
      releases: What a device of a private run may send.
      tests: Scores weights on the device's own test data; None if it is not to.
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
    ) -> None:
        self._config, self.name, self._model = config, name, model
        self._releases, self._tests = releases, tests
        hosts = hosts_of(config)
        self._own = hosts[name]
        self._stop = stop or threading.Event()
        self._inbox: queue.SimpleQueue[Message | BaseException] = queue.SimpleQueue()
        self._step = 0
        self.admitted = self._began = False
        self._seat = name
        self._told_so = False  # whether the coordinator itself has ended this host's part
        self._link: Link | None = None
        self._waits: OwnWaits | None = None
        self._direct: DirectTraffic | None = None
        self._prefetcher = None if loader is None else Prefetcher(loader)
        self._endpoint = Endpoint(
            name, options=channel_options(config.network, config.pipeline.window_mb)
        )
        self._host: Host | None = None
        self._survey: Respondent | None = None
        self._patience = Patience(config.network)
        self._moving: Moving | None = None
        self._pulse_s, self._pulsed_s, self._pulsed = pulse_s(config.network), time.monotonic(), 0
        self._waiting = [0, 0]  # control messages and bundles that nobody has read yet
        self._acceptance: Acceptance | None = None
        # Tensors of a round that this host has not heard of yet; the I/O thread's.
        self._ahead: list[tuple[str, Message, Boundary | None]] = []
        self._holdings: Holdings | None = None
        self._base: BaseFile | None = None
        self._course = Course(hosts, name, None if model is None else model.unit_names)
        self._neighbours = PeerLinks(
            hosts, config.network, name, self._endpoint,
            tensors=self._on_tensor, wake=self._wake, lost=self._inbox.put,
            met=self._note_met,
        )  # fmt: skip
        self._commands: dict[type, Callable[[Any], None]] = {
            messages.Refused: self._end_refused,
            messages.Abort: self._end_aborted,
            messages.Pulse: _ignore,
            messages.Working: _ignore,
            messages.ModelFacts: self._take_model,
            messages.SurveyProfile: lambda said: self._respondent.profile(said, self._coordinator),
            messages.SurveyReference: lambda _: self._respondent.reference(self._coordinator),
            messages.SurveyEcho: lambda _: self._respondent.echo(self._coordinator),
            messages.SurveySend: lambda said: self._respondent.send(said, self._coordinator),
            messages.Meet: self._meet,
            messages.Prepare: self._prepare,
            messages.Calibrate: lambda _: self._running.calibrate(),
            messages.Release: self._release,
            messages.Drop: self._drop,
            messages.Halt: lambda said: self._running.halt(said.without),
            messages.Rewind: lambda said: self._running.rewind(said.step),
            messages.Commit: lambda said: self._running.commit(said.places),
            messages.PullState: self._pull,
            messages.KeepState: lambda said: self._running.keep(StateTag(said.run, said.rounds)),
            messages.RestoreState: lambda said: self._running.restore(
                StateTag(said.run, said.rounds)
            ),
            messages.Look: self._tell_seen,
            messages.CompileAhead: self._compile_ahead,
        }
        self._bundles: dict[type, Callable[[Any, Message], None]] = {
            messages.SurveyBytes: lambda _, message: self._respondent.take(message),
            messages.PushState: self._push,
            messages.Evaluate: self._evaluate,
        }
        if model is not None:
            self._start(model)

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
        self._link = link = self._connect(address, timeout_s)
        link.start(self._on_message, self._wake, self._inbox.put)
        try:
            registry.send(link, join)
            self._follow()
        except ChannelError as error:  # a send noticed it before the mail about it was read
            lost = self._lost(error)
            self._report_failure(lost)
            raise lost from error
        except KeyboardInterrupt:
            self._say_last(messages.Leave(f"{self._long} was interrupted"))
            raise
        except Exception as error:
            self._report_failure(error)
            raise

    def _follow(self) -> None:
        """Does what the coordinator says until the run is over."""
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
                self._patience.working(COORDINATOR, said.what)
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
            if item.kind == MessageKind.BUNDLE:
                self._bundles[type(said)](said, item)
            else:
                self._commands[type(said)](said)

    def _note(self, said: object) -> None:
        """Writes into the log what the coordinator wants; of its pulse and its work, nothing."""
        if not isinstance(said, messages.Pulse | messages.Working):
            number = f" {said.round}" if isinstance(said, messages.Release) else ""
            LOG.info("%s: %s%s", self.name, registry.kind_of(type(said)).name, number)

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
            self.name,
            model,
            self._config,
            reply=self._reply,
            failed=self._inbox.put,
            link_table=self._neighbours.link_table,
            batches=self._prefetcher,
            slowness=self._own.slowdown,
            rematerialise=self._own.rematerialise,
            releases=self._releases,
        )
        self._survey = Respondent(self._config, self._own, model, self._check_wanted)
        self._holdings = Holdings(model, self._config)
        self._base = BaseFile(self._config, self.name, model)

    @property
    def _running(self) -> Host:
        if self._host is None:
            raise ProtocolError(f"the server gave {self._long} work before it told of the model")
        return self._host

    @property
    def _respondent(self) -> Respondent:
        if self._survey is None:
            raise ProtocolError(f"the server asked {self._long} before it told of the model")
        return self._survey

    @property
    def _unit_names(self) -> tuple[str, ...]:
        assert self._model is not None
        return tuple(self._model.unit_names)

    @property
    def _coordinator(self) -> Link:
        assert self._link is not None
        return self._link

    def _lost(self, error: ChannelError) -> PeerError:
        """Returns what the end of a link means, the coordinator's or a neighbour's."""
        if self._link is not None and self._link.error is not None:
            lost = registry.end_of(error, "the server", f"{self._long} lost the coordinator")
            lost.again = not isinstance(lost, ProtocolError)
            return lost
        return PeerError(f"{self._long} lost a neighbour: {error}")

    @property
    def _long(self) -> str:
        return long_name(self.name)

    # --- mail ---------------------------------------------------------------------------------

    def _connect(self, address: tuple[str, int], timeout_s: float) -> Link:
        own = self._own
        shape = own.up if own.kind is HostKind.DEVICE else comms.LinkShape()
        try:
            link = self._endpoint.connect(
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
        link.admit(SURVEYED)
        self._moving = Moving(link)
        self._neighbours.link_table.control[COORDINATOR] = link
        return link

    def _next(self) -> Message | BaseException:
        """Waits for mail, looking now and then whether to stop, and who goes on.

        Raises:
          JoinError: A neighbour did not come.
          PeerError: It was told to stop, or the coordinator shows no progress.
        """
        self._patience.begin()
        while not self._stop.is_set():
            self._pulse()
            try:
                item = self._inbox.get(timeout=LOOK_S)
            except queue.Empty:
                self._neighbours.check()
                self._patience.check((COORDINATOR,), "a word")
                continue
            if isinstance(item, Message):
                self._waiting[item.kind == MessageKind.BUNDLE] -= 1
            return item
        raise PeerError(f"{self._long} was told to stop")

    def _pulse(self) -> None:
        """Periodically reports to the coordinator how many actions are over here, if any."""
        now = time.monotonic()
        if self._host is None or now - self._pulsed_s < self._pulse_s:
            return
        self._pulsed_s = now
        if self._host.actions != self._pulsed:
            self._pulsed = self._host.actions
            registry.send(self._coordinator, messages.Pulse(self._pulsed))
        if self._moving is not None and self._moving.look():
            self._patience.progress(COORDINATOR)

    def _on_message(self, message: Message) -> None:
        """Routes what arrives from the coordinator; runs on the I/O thread."""
        if message.kind != MessageKind.TENSOR:
            large = message.kind == MessageKind.BUNDLE
            self._waiting[large] += 1
            if self._waiting[large] > (MOST_BUNDLES if large else MOST_WAITING):
                message.release()
                message.link.refuse("too much waits to be read")
                self._inbox.put(
                    ProtocolError(f"{long_name(COORDINATOR)} sent {self._long} more than it reads")
                )
                return
            self._inbox.put(message)
        elif (reason := self._on_tensor(COORDINATOR, message, None)) is not None:
            self._inbox.put(ProtocolError(f"{long_name(COORDINATOR)} sent {reason}"))

    def _on_tensor(self, peer: str, message: Message, boundary: Boundary | None) -> str | None:
        """Hands a tensor to the host, or returns why not; runs on the I/O thread."""
        acceptance, tag = self._acceptance, message.tag
        if acceptance is None or self._host is None or tag is None:
            reason: str | None = f"a tensor ({message.tag}) before there is a plan"
        elif (reason := acceptance.objection(peer, message, boundary)) is None:
            self._host.on_message(message)
            return None
        elif acceptance.is_past(tag):
            message.release()
            return None
        elif acceptance.is_ahead(tag) and len(self._ahead) < MOST_AHEAD:
            self._ahead.append((peer, message, boundary))
            return None
        message.release()
        message.link.refuse(reason or "")
        return reason

    def _wake(self) -> None:
        """Tells the host that a link has credit; runs on the I/O thread."""
        if self._host is not None:
            self._host.wake()

    def _report_failure(self, error: Exception) -> None:
        """Tells the coordinator why this host ends, so that it need not guess."""
        reason = str(error)
        if self._releases is not None and not is_public(error):
            reason = (
                f"{self._long} failed, and says why in its own log alone: in a private run errors "
                "about its data, or in its own code, do not leave it"
            )
        self._say_last(messages.Failed(reason))

    def _say_last(self, said: messages.Failed | messages.Leave) -> None:
        """Sends this host's last message, if it still can."""
        if self._told_so or self._link is None:
            return
        try:
            registry.send(self._link, said)
            self._link.drain(1.0)
        except ChannelError:
            return  # the coordinator is gone too; the error itself is raised by the caller

    # --- commands -----------------------------------------------------------------------------

    def _end_refused(self, said: messages.Refused) -> None:
        self._told_so = True
        refused = JoinError(f"the coordinator refuses {self._long}: {said.reason}")
        refused.again = said.again
        raise refused

    def _end_aborted(self, said: messages.Abort) -> None:
        self._told_so = True
        ended = PeerError(f"the coordinator ended the run: {said.reason}")
        ended.again = said.again
        raise ended

    def _take_model(self, said: messages.ModelFacts) -> None:
        try:
            model = build_model(self._config, said.signature, self._model)
        except Exception as error:
            raise ProtocolError(
                f"{long_name(COORDINATOR)} sent 'model' with samples {said.signature} of "
                f"{said.signature.classes} classes, for which {self._config.model.name} cannot be "
                f"made: {error}"
            ) from error
        if self._host is None:
            self._start(model)
        self._course.knows_model(model.unit_names)

    def _meet(self, said: messages.Meet) -> None:
        self._neighbours.connect(said.number, said.boundaries, said.addresses)

    def _prepare(self, said: messages.Prepare) -> None:
        self._waits = OwnWaits(self._coordinator)
        self._direct = DirectTraffic(self.name, self._neighbours.link_table)
        self._accept()
        assert self._base is not None
        self._base.expect(said.base)
        if self._base.is_used:  # which may be large
            self._reply(messages.Working("compiling", 0, 0), {})
        if (reason := self._why_not_base(said.plan)) is not None:
            raise RunError(reason)
        self._running.prepare(said.plan, said.samples, said.steps)

    def _why_not_base(self, plan: Plan) -> str | None:
        """Returns why the weights that this host has read do not suit a plan, or None."""
        assert self._base is not None
        return self._base.why_not(plan, self._course.seat, whole=self._tests is not None)

    def _note_met(self, number: int) -> None:
        """Reports that all neighbours are connected; applies the plan's limits to them."""
        if self._acceptance is not None:
            self._neighbours.allow(self._acceptance.tensor_bytes)
        self._reply(messages.Met(number), {})

    def _accept(self) -> None:
        """Takes from other hosts what the plan in force has for them, from the next step on."""
        course, model = self._course, self._model
        assert course.plan is not None and model is not None
        self._acceptance = Acceptance(
            model, course.plan, course.seat, samples=course.samples,
            batch_size=self._config.data.batch_size,
        )  # fmt: skip
        self._neighbours.allow(self._acceptance.tensor_bytes)
        self._allow()

    def _allow(self) -> None:
        """Lets the coordinator send what this host may get under its plans, and nothing larger."""
        plan, names = self._course.plan, self._unit_names
        assert self._holdings is not None and self._acceptance is not None and plan is not None
        seat = self._course.seat
        bundles = [exchanges.whole(plan, seat, names, optimizers=True)]
        bundles += [exchanges.arriving(plan, one, seat, names) for one in self._course.ahead]
        if self._tests is not None:
            bundles.append(network_states(names))
        tensor_bytes = self._acceptance.tensor_bytes(COORDINATOR)
        self._coordinator.admit(self._holdings.room(bundles, tensor_bytes))

    def _compile_ahead(self, said: messages.CompileAhead) -> None:
        self._allow()
        if (reason := self._why_not_base(said.plan)) is not None:
            self._reply(messages.Compiled(said.number, reason), {})
            return
        self._running.prepare_ahead(said.number, said.plan)

    def _pull(self, said: messages.PullState) -> None:
        self._running.pull({(copy, unit): parts for copy, unit, parts in said.wanted})

    def _release(self, said: messages.Release) -> None:
        if self._seat != self._course.seat:
            self._seat = self._course.seat
            self._accept()
        mine = [span for span in said.spans if device_name(span.device) == self._seat]
        if mine:
            self._step = mine[-1].stop - 1
        if not self._began:
            self._began = True
            self._begin_schedule()
        self._running.release(said)
        self._endpoint.post(lambda: self._open(said))

    def _open(self, said: messages.Release) -> None:
        """Takes a round's tensors, those first that came too early; runs on the I/O thread."""
        assert self._acceptance is not None
        self._acceptance.open(said.spans, said.attempt, said.samples)
        ahead, self._ahead = self._ahead, []
        for peer, message, boundary in ahead:
            if (reason := self._on_tensor(peer, message, boundary)) is not None:
                self._inbox.put(ProtocolError(f"{long_name(peer)} sent {reason}"))

    def _drop(self, said: messages.Drop) -> None:
        assert self._acceptance is not None
        self._acceptance.drop(said.place)
        self._running.drop(said.place, said.step)

    def _begin_schedule(self) -> None:
        """Starts the clock of an emulated link whose rate varies."""
        up = self._own.up
        if self._own.kind is HostKind.DEVICE and up.schedule and self._link is not None:
            self._link.set_shape(up)
        self._neighbours.begin()

    def _tell_seen(self, said: messages.Look) -> None:
        """Answers a look: what computations lasted here, and what the links brought."""
        stats = self._coordinator.stats()
        rows = tuple(self._running.observer.take())
        timed = Timing(stats.timed_in_bytes, stats.timed_in_s)
        direct = self._neighbours.link_table.timed()
        registry.send(self._coordinator, messages.LookSeen(said.look, rows, timed, direct))

    def _check_wanted(self) -> None:
        """Ends a measurement that nobody waits for any more."""
        if self._stop.is_set():
            raise PeerError(f"{self._long} was told to stop")
        if self._link is not None and self._link.error is not None:
            raise self._lost(self._link.error)

    def _push(self, said: messages.PushState, message: Message) -> None:
        plan, names = self._course.plan, self._unit_names
        assert self._holdings is not None and plan is not None
        if said.plan is not None:
            old, new = self._course.plans
            wanted = exchanges.arriving(old, new, self._course.seat, names)
        elif said.step is not None:
            wanted = exchanges.client_model(plan, host_index(self._course.seat), names)
        elif said.round is not None:
            wanted = exchanges.averaged(plan, self._course.seat, names)
        else:
            seat, optimizers = self._course.seat, said.optimizers
            wanted = exchanges.whole(plan, seat, names, optimizers=optimizers)
        states = self._holdings.states(message, wanted, long_name(COORDINATOR))
        if said.plan is not None:
            self._accept()
            # There may be more links.
            self._direct = DirectTraffic(self.name, self._neighbours.link_table)
        elif said.step is not None:
            self._note_arrival(RECEIVE_CLIENT_MODEL, said.step, message)
        elif said.round is not None:
            self._note_arrival(RECEIVE_WEIGHTS, self._step, message)
        self._running.push(said, states)

    def _evaluate(self, said: messages.Evaluate, message: Message) -> None:
        if self._tests is None or self._holdings is None:
            raise ProtocolError(
                f"{long_name(COORDINATOR)} sent {self._long} 'evaluate', but it has no test data "
                "to evaluate (run.evaluate_on)"
            )
        self._reply(messages.Working("evaluating", 0, 0), {})
        wanted = network_states(self._unit_names)
        states = self._holdings.states(message, wanted, long_name(COORDINATOR))
        self._reply(self._tests.answer(said.round, states), {})

    def _note_arrival(self, kind: ActionKind, step: int, message: Message) -> None:
        arrived = Action(0, kind, host_index(self._course.seat), step)
        timed = Timed(arrived, message.first_byte_s, message.received_s, message.nbytes)
        self._running.recorder.add(timed)

    def _say_goodbye(self) -> None:
        """Sends the rest of the trace, the last this device says, and waits until it has left."""
        self._neighbours.finish()
        rows, _ = self._running.recorder.take()
        registry.send_bundle(self._coordinator, messages.Bye(), trace_rows.pack_rows(rows))
        self._coordinator.drain(self._config.network.deadline_s)

    # --- replies; called on the host's threads ------------------------------------------------

    def _reply(self, said: ControlMessage, states: States) -> None:
        link = self._coordinator
        self._course.replied(said)
        if isinstance(said, messages.Stored):
            self._patience.action(said.longest_s)
            rows, busy_s = self._running.recorder.take()
            assert self._waits is not None and self._direct is not None
            waits, direct = self._waits.take(), self._direct.take()
            registry.send(link, dataclasses.replace(said, busy_s=busy_s, link=waits, direct=direct))
            if self._config.run.trace != "none":  # outside the round that it belongs to
                registry.send_bundle(link, messages.TraceRows(), trace_rows.pack_rows(rows))
        elif not states:
            registry.send(link, said)
        else:
            codec, on_sent = "raw", None
            if isinstance(said, messages.Trained):  # what is not averaged must stay as it is
                codec = self._config.aggregation.codec
                on_sent = self._recorded(SEND_WEIGHTS, self._step)
            elif isinstance(said, messages.ClientModel):
                on_sent = self._recorded(SEND_CLIENT_MODEL, said.step)
            arrays = unit_state.pack(states)
            registry.send_bundle(link, said, arrays, on_sent=on_sent, codec=codec)

    def _recorded(self, kind: ActionKind, step: int) -> Callable[[float, float, int], None]:
        """Returns what adds a bundle to the trace once it has left."""
        return functools.partial(self._record, Action(0, kind, host_index(self._course.seat), step))

    def _record(self, action: Action, start_s: float, end_s: float, nbytes: int) -> None:
        self._running.recorder.add(Timed(action, start_s, end_s, nbytes))


def _ignore(_: Any) -> None:
    """Accepts messages that only report that the coordinator goes on."""


def is_public(error: Exception) -> bool:
    """Returns whether an error's text has nothing of a device's data.

    It is not about reading them, and neither a library nor the user's code has written part of it.

    Args:
      error: What ended a device of a private run.
    """
    cause = error.__cause__
    ours = isinstance(error, PiparError) and not isinstance(error, DataError)
    return ours and (cause is None or isinstance(cause, PiparError | ChannelError | OSError))
