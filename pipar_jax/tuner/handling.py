"""What a run adds to each computation of a host: threads that wake up, a message in and one out.

It is the same whatever is computed, and what small micro-batches pay for. The real host with a real
link over loopback rehearses the last stage of a tiny model, in the process that will train; what
its peer's thread does there does not count.
"""

from __future__ import annotations

import queue
import time
from typing import Any

import numpy as np

import stages
from comms import Endpoint, Link, Message, Role, Tag
from pipar_jax import optimizer
from pipar_jax.config import Config, resolve
from pipar_jax.errors import RunError
from pipar_jax.methods import plan_for
from pipar_jax.plan import COORDINATOR, device_name
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.replica import Replica
from pipar_jax.runtime.warmup import run_all
from pipar_jax.schedule import Span

#: Micro-batches of the rehearsal, of which the first warm up, and how many are under way at a time.
ITEMS, WARM, UNDER_WAY = 80, 20, 3
_INPUT_SHAPE, _CLASSES = (8, 8, 1), 10


def measure_handling_s(timeout_s: float = 60.0) -> float:
    """Returns the processor's seconds that a computation costs this host beside the function.

    Threads may run beside a computation where there are several cores; then it is an upper bound.

    Args:
      timeout_s: How long the rehearsal may take, compiling included.

    Raises:
      ChannelError: This machine's loopback cannot be used.
      RunError: The rehearsal failed.
    """
    config = resolve(Config(method="pipar"))
    config.model.name, config.devices.count, config.run.trace = "mlp", 1, False
    config.data.batch_size = config.pipeline.micro_batches = ITEMS
    model = stages.build("mlp", input_shape=_INPUT_SHAPE, classes=_CLASSES)
    config.pipeline.cut = len(model.units) - 1
    with Endpoint("tuner-server") as server, Endpoint("tuner-device") as device:
        rehearsal = _Rehearsal(config, model)
        try:
            rehearsal.connect(server, device, timeout_s)
            total_s = rehearsal.run(timeout_s)
        finally:
            rehearsal.close()
    return max(0.0, total_s - _alone_s(config, model))


def _alone_s(config: Config, model: stages.Model) -> float:
    """Returns the seconds of the rehearsed function itself."""
    params, state = model.init(0)
    last = stages.split(model, (int(config.pipeline.cut),))[1]
    replica = Replica(
        last, params, state, optimizer.compiled(config.optimizer, steps=1, proximal_mu=0.0)
    )
    times = run_all(model, [replica], (1,), repeats=20)
    return next(seconds for shape, seconds in times.items() if shape.samples)


class _Rehearsal:
    """One step of a server, whose device is synthetic."""

    def __init__(self, config: Config, model: stages.Model) -> None:
        self._config, self._plan = config, plan_for(config, model.unit_names)
        self._cut = model.shapes(1)[int(config.pipeline.cut)]
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        #: The process's seconds without the peer's thread, when each answer arrived.
        self._spent_s: list[float] = []
        self._sent = 0
        self._host = Host(COORDINATOR, model, config, reply=self._reply, failed=self._told.put)

    def connect(self, server: Endpoint, device: Endpoint, timeout_s: float) -> None:
        """Links the host with its peer."""

        def accept(link: Link) -> None:
            link.start(self._host.on_message, self._host.wake, self._told.put)
            self._told.put(link)

        address = server.listen("127.0.0.1", 0, accept)
        self._link = device.connect(*address, name_of_peer="tuner-server", timeout_s=timeout_s)
        self._link.start(self._take, _ignore, self._told.put)
        self._host.wiring.control[device_name(0)] = self._get(timeout_s)

    def run(self, timeout_s: float) -> float:
        """Returns the least seconds of a micro-batch, of the later halves of the step."""
        self._host.prepare(self._plan, (ITEMS,), (1,))
        self._get(timeout_s)
        self._host.release(0, [Span(0, 0, 1)], None, [1.0])
        for _ in range(UNDER_WAY):
            self._send()
        self._get(timeout_s)
        middle = (WARM + ITEMS) // 2
        return min(
            (self._spent_s[stop - 1] - self._spent_s[first]) / (stop - 1 - first)
            for first, stop in ((WARM, middle), (middle, ITEMS))
        )

    def close(self) -> None:
        """Ends the host's threads."""
        self._host.close()

    def _reply(self, body: dict[str, Any], arrays: dict[str, Any]) -> None:
        if body["type"] == "prepared":
            self._told.put(body)

    def _get(self, timeout_s: float) -> Any:
        """Returns what comes next: a link, that the host is prepared, that all was answered.

        Raises:
          RunError: The host or the link failed, or nothing came.
        """
        try:
            found = self._told.get(timeout=timeout_s)
        except queue.Empty:
            raise RunError(
                f"the rehearsal that tells what a message costs this host did not end within "
                f"{timeout_s:g} s: is its processor overloaded?"
            ) from None
        if isinstance(found, BaseException):
            raise RunError(f"the rehearsal that tells what a message costs failed: {found}")
        return found

    def _send(self) -> None:
        """Sends the next micro-batch as a device does: a label, and the activation behind it."""
        if self._sent == ITEMS:
            return
        for role, array in (
            (Role.LABEL, np.zeros(1, np.int32)),
            (Role.ACTIVATION, np.ones((1, *self._cut.shape[1:]), self._cut.dtype)),
        ):
            tag = Tag(
                role=role, device=0, stage=1, step=0, micro_batch=self._sent,
                micro_batches=ITEMS, samples_before=self._sent, samples=1, batch_samples=ITEMS,
            )  # fmt: skip
            self._link.send(tag, array)
        self._sent += 1

    def _take(self, message: Message) -> None:
        """Takes a cotangent; on the peer's I/O thread, whose time does not count."""
        message.release()
        self._spent_s.append(time.process_time() - time.thread_time())
        self._send()
        if len(self._spent_s) == ITEMS:
            self._told.put(None)


def _ignore(*_: object) -> None:
    """Takes what does not matter here."""
