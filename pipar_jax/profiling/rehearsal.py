"""Measures the overhead of a run per computation: wake-ups of threads, two messages.

The overhead does not depend on the computation and dominates small micro-batches; in addition bytes
are copied from and to sockets. The real host with a real link over loopback runs the last stage of
a tiny model, with few and with many samples, in the process that will train; the time of the peer's
thread is not included.
"""

from __future__ import annotations

import functools
import itertools
import queue
import time
from typing import Any

import numpy as np

import stages
from comms import Endpoint, Link, Message, Role, Tag
from pipar_jax.config import Config, OptimizerConfig
from pipar_jax.cost_model.profile import RuntimeOverhead
from pipar_jax.errors import RunError
from pipar_jax.methods.registry import plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR, device_name
from pipar_jax.training import optimizer
from pipar_jax.training.compile import run_all
from pipar_jax.training.replica import Replica

#: Micro-batches of the rehearsal, of which the first warm up, and the number in flight.
ITEMS, WARM, UNDER_WAY = 120, 20, 3
#: Micro-batches per measurement; the shortest measurement counts.
STRETCH = 20
#: Messages sent back to back to measure the cost of one on a link.
MESSAGES = 64
#: Samples of a micro-batch: so few that bytes are negligible, and so many that they dominate.
FEW, MANY = 1, 2048
_INPUT_SHAPE, _CLASSES = (8, 8, 1), 10


def measure_handling(timeout_s: float = 60.0) -> RuntimeOverhead:
    """Rehearses a run on this host.

    With several cores threads may run in parallel to a computation; the result is an upper bound
    then.

    Args:
      timeout_s: Time limit of each rehearsal, including compilation.

    Raises:
      ChannelError: This machine's loopback cannot be used.
      RunError: A rehearsal failed.
    """
    model = _network()
    few_s, many_s = (_rehearse(model, samples, timeout_s) for samples in (FEW, MANY))
    cut = model.shapes(MANY - FEW)[len(model.units) - 1]
    nbytes = 2 * int(np.prod(cut.shape)) * cut.dtype.itemsize  # an activation and its cotangent
    return RuntimeOverhead(few_s, max(0.0, many_s - few_s) / nbytes)


@functools.cache
def _network() -> stages.Model:
    """Returns the rehearsed network: hosts of one process compile it once."""
    return stages.build("mlp", input_shape=_INPUT_SHAPE, classes=_CLASSES)


def measure_message_s(timeout_s: float = 10.0) -> float:
    """Returns the seconds for which a message occupies a link in addition to its bytes.

    Raises:
      ChannelError: This machine's loopback cannot be used.
    """
    arrived: list[float] = []
    array = np.zeros(64, np.float32)

    def take(message: Message) -> None:
        arrived.append(message.received_s)
        message.release()

    def accept(link: Link) -> None:
        link.admit()
        link.start(take, _ignore, _ignore)

    with Endpoint("tuner-server") as server, Endpoint("tuner-device") as device:
        host, port = server.listen("127.0.0.1", 0, accept)
        link = device.connect(host, port, name_of_peer="tuner-server", timeout_s=timeout_s)
        link.start(_ignore, _ignore, _ignore)
        for step in range(MESSAGES):
            link.send(Tag(role=Role.ACTIVATION, step=step), array)
        link.drain(timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while len(arrived) < MESSAGES and time.monotonic() < deadline_s:
            time.sleep(0.002)
    return (max(arrived) - min(arrived)) / max(len(arrived) - 1, 1)


def _rehearse(model: stages.Model, samples: int, timeout_s: float) -> float:
    """Returns the overhead per computation in seconds, for a micro-batch."""
    config = resolve(Config(method="pipar"))
    config.model.name, config.devices.count, config.run.trace = "mlp", 1, "none"
    config.data.batch_size, config.pipeline.micro_batches = ITEMS * samples, ITEMS
    config.pipeline.cut = len(model.units) - 1
    with Endpoint("tuner-server") as server, Endpoint("tuner-device") as device:
        rehearsal = _Rehearsal(config, model, samples)
        try:
            rehearsal.connect(server, device, timeout_s)
            total_s = rehearsal.run(timeout_s)
        finally:
            rehearsal.close()
    return max(0.0, total_s - _alone_s(int(config.pipeline.cut), config.optimizer, model, samples))


def _alone_s(cut: int, config: OptimizerConfig, model: stages.Model, samples: int) -> float:
    """Returns the seconds of the function itself."""
    params, state = model.init(0)
    last = stages.split(model, (cut,))[1]
    replica = Replica(
        last, params, state, optimizer.compiled(config, steps=optimizer.MANY_STEPS, proximal_mu=0.0)
    )
    times = run_all(model, [replica], (samples,), repeats=20)
    return next(seconds for shape, seconds in times.items() if shape.samples)


class _Rehearsal:
    """One step of a server, whose device is synthetic."""

    def __init__(self, config: Config, model: stages.Model, samples: int) -> None:
        self._plan, self._samples = plan_for(config, model.unit_names), samples
        self._cut = model.shapes(samples)[int(config.pipeline.cut)]
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        #: Process time without the peer's thread at the arrival of each answer.
        self._spent_s: list[float] = []
        self._host = Host(COORDINATOR, model, config, reply=self._reply, failed=self._told.put)

    def connect(self, server: Endpoint, device: Endpoint, timeout_s: float) -> None:
        """Links the host with its peer."""

        def accept(link: Link) -> None:
            link.admit()
            link.start(self._host.on_message, self._host.wake, self._told.put)
            self._told.put(link)

        address = server.listen("127.0.0.1", 0, accept)
        self._link = device.connect(*address, name_of_peer="tuner-server", timeout_s=timeout_s)
        self._link.start(self._take, _ignore, self._told.put)
        self._host.link_table.control[device_name(0)] = self._get(timeout_s)

    def run(self, timeout_s: float) -> float:
        """Returns the seconds per micro-batch in the shortest measurement."""
        self._host.prepare(self._plan, (ITEMS * self._samples,), (1,))
        self._get(timeout_s)
        samples = (ITEMS * self._samples,)
        self._host.release(messages.Release(0, 0, (Span(0, 0, 1),), (0,), samples, None, (1.0,)))
        for micro_batch in range(UNDER_WAY):
            self._send(micro_batch)
        self._get(timeout_s)
        marks = self._spent_s[WARM - 1 :: STRETCH]
        return min(after - before for before, after in itertools.pairwise(marks)) / STRETCH

    def close(self) -> None:
        """Ends the host's threads."""
        self._host.close()

    def _reply(self, message: ControlMessage, states: States) -> None:
        if isinstance(message, messages.Prepared):
            self._told.put(message)

    def _get(self, timeout_s: float) -> Any:
        """Returns the next report: a link, that the host is prepared, or that all is answered.

        Raises:
          RunError: The host or the link failed, or the time limit was exceeded.
        """
        try:
            found = self._told.get(timeout=timeout_s)
        except queue.Empty:
            raise RunError(
                "the rehearsal that measures the overhead of messages did not end within "
                f"{timeout_s:g} s: is the processor overloaded?"
            ) from None
        if isinstance(found, BaseException):
            raise RunError(f"the rehearsal that measures the overhead of messages failed: {found}")
        return found

    def _send(self, micro_batch: int) -> None:
        """Sends a micro-batch as a device does: labels, then the activation."""
        count = self._samples
        for role, array in (
            (Role.LABEL, np.zeros(count, np.int32)),
            (Role.ACTIVATION, np.ones(self._cut.shape, self._cut.dtype)),
        ):
            tag = Tag(
                role=role, device=0, stage=1, step=0, micro_batch=micro_batch, micro_batches=ITEMS,
                samples_before=micro_batch * count, samples=count, batch_samples=ITEMS * count,
            )  # fmt: skip
            self._link.send(tag, array)

    def _take(self, message: Message) -> None:
        """Receives a cotangent on the peer's I/O thread, whose time is not included."""
        message.release()
        self._spent_s.append(time.process_time() - time.thread_time())
        answered = len(self._spent_s)
        # The first are sent by another thread, perhaps concurrently: no shared counter.
        if answered + UNDER_WAY <= ITEMS:
            self._send(answered + UNDER_WAY - 1)
        if answered == ITEMS:
            self._told.put(None)


def _ignore(*_: object) -> None:
    """Ignores an event."""
