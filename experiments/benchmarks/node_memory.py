"""The peak memory of one compute node of a chain, with synthetic neighbours.

The node is the real host with real links over loopback; its neighbours send synthetic tensors of
all devices at once: all micro-batches go forward before the first cotangent arrives, as far as the
plan allows. A node that serves sixteen devices thus does not need sixteen processes.
"""

from __future__ import annotations

import dataclasses
import gc
import queue
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from comms import Endpoint, Link, Message, Role, Tag
from pipar_jax import config as configuration
from pipar_jax.config import Config
from pipar_jax.errors import PlanError, RunError
from pipar_jax.launch.pinning import run_pinned
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages
from pipar_jax.schedule.actions import Span, micro_batch_sizes
from pipar_jax.schedule.plan import Boundary, Plan
from stages.signature import Signature

T = TypeVar("T")

#: Time limit of a node for one micro-batch, without compilation.
_PATIENCE_S = 120.0
#: Maximum delay of its accounting after the last tensor has left.
_SETTLE_S = 40.0


class Driven(NamedTuple):
    """The memory of a node in bytes.

    Attributes:
      arrays: Peak of its arrays according to the host's accounting.
      temporary: Largest temporary of its functions.
      resident: Peak of the process's resident memory.
      booked: Accounted bytes after all forwards, before the first cotangent.
      live: Bytes of all live arrays of jax in the process at that time.
      predicted: Peak of arrays predicted from shapes.
    """

    arrays: int
    temporary: int
    resident: int
    booked: int
    live: int
    predicted: int


def drive_alone(
    config: Config,
    plans: Sequence[Plan],
    node: str,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    cores: Sequence[int] = (),
) -> list[Driven]:
    """Drives a node through one step of each plan, in its own process.

    Args:
      config: Resolved configuration: model, mini-batch, optimiser.
      plans: The plans; the node's units are compiled once if they are the same in all.
      node: Name of the node, which has a middle part of the chain.
      input_shape: Shape of one sample.
      classes: Number of classes.
      cores: Cores to run on; none for any.

    Returns:
      Its memory for each plan.

    Raises:
      RunError: The node failed, or did not answer.
    """
    values = run_pinned(
        _drive_all,
        configuration.to_dict(config),
        [plan.to_dict() for plan in plans],
        node,
        tuple(input_shape),
        classes,
        cores=cores,
        variables={"JAX_PLATFORMS": "cpu"},
    )
    return [Driven(*one) for one in values]


def _drive_all(
    values: dict[str, Any],
    plans: list[dict[str, Any]],
    node: str,
    input_shape: tuple[int, ...],
    classes: int,
) -> list[tuple[int, ...]]:
    """Runs in the pinned process, which has not loaded jax before."""
    from pipar_jax.runtime.setup import build_model, set_up_jax

    config = configuration.from_dict(values)
    set_up_jax(config.model)
    model = build_model(config, Signature.labelled(input_shape, classes))
    found = []
    for plan in map(Plan.from_dict, plans):
        found.append(tuple(_drive(config, plan, node, model)))
        gc.collect()  # release its arrays before the next one's
    return found


def _drive(config: Config, plan: Plan, node: str, model: Any) -> Driven:
    """Drives a node through one step of one plan."""
    from pipar_jax.runtime.setup import channel_options

    options = channel_options(config.network, config.pipeline.window_mb)
    with Endpoint(node, options=options) as own, Endpoint("others", options=options) as others:
        drive = _Drive(config, plan, node, model)
        try:
            drive.connect(own, others)
            return drive.run()
        finally:
            drive.close()


class _Drive:
    """One step of one plan on one host, which its neighbours' side drives."""

    def __init__(self, config: Config, plan: Plan, node: str, model: Any) -> None:
        from pipar_jax.runtime.host import Host

        self._config, self._plan, self._node, self._model = config, plan, node, model
        self._stage = plan.devices[0].hosts.index(node)
        if not 0 < self._stage < plan.devices[0].stages - 1:
            raise PlanError(
                f"{node} is not in the middle of the chain {plan}: choose a middle node"
            )
        self._samples = (config.data.batch_size,) * len(plan.devices)
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._forwarded: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._links: dict[Boundary, Link] = {}
        self._host = Host(
            node, model, config,
            reply=lambda message, arrays: self._replies.put(message), failed=self._fail,
            rematerialise=hosts_of(config)[node].rematerialise,
        )  # fmt: skip

    def connect(self, own: Endpoint, others: Endpoint) -> None:
        """Opens a link for each of the host's boundaries, and keeps the other ends."""
        arrived: queue.SimpleQueue[Link] = queue.SimpleQueue()
        address = own.listen("127.0.0.1", 0, arrived.put)
        for boundary in self._plan.boundaries():
            if self._node in boundary[:2]:
                link = others.connect(*address, name_of_peer=self._node, timeout_s=_PATIENCE_S)
                link.start(self._take, _nothing, self._fail)
                self._links[boundary] = link
                theirs = arrived.get(timeout=_PATIENCE_S)
                theirs.admit()
                theirs.start(self._host.on_message, self._host.wake, self._fail)
                self._host.link_table.add(boundary, theirs)

    def run(self) -> Driven:
        """Drives the host through a step."""
        from pipar_jax.runtime import memory

        need = memory.predict(self._model, self._plan, self._node, self._config, self._samples)
        self._host.prepare(self._plan, self._samples, [1] * len(self._samples))
        self._await(messages.Prepared, None)
        spans = [Span(device, 0, 1) for device in range(len(self._samples))]
        count = len(self._samples)
        self._host.release(
            messages.Release(
                0, 0, tuple(spans), tuple(range(count)), tuple(self._samples), None, (1.0,) * count
            )
        )
        parts = [
            Tag(
                role=Role.ACTIVATION, device=device, stage=self._stage, micro_batch=micro,
                micro_batches=len(sizes), samples_before=sum(sizes[:micro]), samples=size,
                batch_samples=sum(sizes),
            )
            for device, one in enumerate(self._plan.devices)
            for sizes in [micro_batch_sizes(self._samples[device], one.micro_batches)]
            for micro, size in enumerate(sizes)
        ]  # fmt: skip
        for tag in parts:
            self._send(tag)
        capped = self._plan.in_flight if self._plan.sums_gradients else 0
        inside = [self._get(self._forwarded) for _ in parts[: capped or None]]
        booked, live = self._settle(inputs_wait=bool(capped))
        for _ in parts[len(inside) :]:  # one has to leave before the next may enter
            self._send(inside.pop(0))
            inside.append(self._get(self._forwarded))
        for tag in inside:
            self._send(tag)
        self._await(messages.Trained, _PATIENCE_S)
        self._host.commit(range(count))
        used = self._await(messages.Stored, _PATIENCE_S).memory
        return Driven(used.arrays, used.temporary, used.resident, booked, live, need.arrays)

    def close(self) -> None:
        """Ends the host's threads."""
        self._host.close()

    def _send(self, tag: Tag) -> None:
        """Sends ones of the right shape, in place of a neighbour."""
        down = tag.role == Role.COTANGENT
        below = self._stage if down else self._stage - 1
        shape = self._model.shapes(tag.samples)[self._plan.devices[tag.device].cuts[below]]
        peer = self._plan.host(tag.device, self._stage + (1 if down else -1))
        link = next(
            link for one, link in self._links.items() if one.below == below and peer in one[:2]
        )
        link.send(tag, np.ones(shape.shape, shape.dtype))

    def _take(self, message: Message) -> None:
        """Receives a result on the I/O thread; cotangents answer those of forwards later."""
        tag = message.tag
        message.release()
        if tag is not None and tag.role == Role.ACTIVATION:
            self._forwarded.put(dataclasses.replace(tag, role=Role.COTANGENT, stage=self._stage))

    def _settle(self, *, inputs_wait: bool) -> tuple[int, int]:
        """Returns accounted and live bytes, once tensors that have left are released.

        Threads that end may keep the host of the previous plan, with its arrays, a little longer.

        Args:
          inputs_wait: Whether a limit makes inputs wait, whose buffers are accounted for, but are
            not yet arrays.
        """
        import jax

        until = time.monotonic() + _SETTLE_S
        while True:
            gc.collect()
            booked = self._host.held_bytes
            # Without a name for the list, which would keep all that lived a moment ago alive.
            live = sum(array.nbytes for array in jax.live_arrays())  # type: ignore[no-untyped-call]
            if booked == live or (inputs_wait and booked > live) or time.monotonic() > until:
                return booked, live
            time.sleep(0.05)

    def _await(self, kind: type[T], timeout_s: float | None) -> T:
        """Returns the host's next reply of a kind."""
        while not isinstance(reply := self._get(self._replies, timeout_s), kind):
            continue
        return reply

    def _get(self, mail: queue.SimpleQueue[Any], timeout_s: float | None = _PATIENCE_S) -> Any:
        """Returns the next item, or raises it if it is an error."""
        try:
            item = mail.get(timeout=timeout_s)
        except queue.Empty:
            raise RunError(f"{self._node} did not answer within {_PATIENCE_S:g} s") from None
        if isinstance(item, BaseException):
            raise item
        return item

    def _fail(self, error: BaseException) -> None:
        """Receives the error that ended the host or a link."""
        self._replies.put(error)
        self._forwarded.put(error)


def _nothing() -> None:
    """Ignores returned credit, since senders here wait on their own."""
