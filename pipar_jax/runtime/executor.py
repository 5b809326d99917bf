"""Performs a host's actions: finds inputs, dispatches compiled functions, hands results on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike

from comms import CodecError, Message, Role, Tag
from pipar_jax.errors import RunError
from pipar_jax.runtime.completion import Work
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.runtime.memory import Ledger, array_bytes
from pipar_jax.runtime.metrics import Meter, totals_of
from pipar_jax.runtime.ragged import filler
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.sample_store import Batches, MicroBatchSlice, SampleStore
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.runtime.tensor_sender import TensorSender
from pipar_jax.runtime.transfer import OutgoingTensor, open_parcel
from pipar_jax.schedule.actions import (
    ALL,
    BACKWARD,
    FORWARD,
    LOSS,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    UPDATE,
    Action,
)
from pipar_jax.schedule.host_program import HostProgram, Operation
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.trace import Timed
from pipar_jax.training.replica import Replica
from stages import MicroBatchContext, Model
from stages.release import CLIPPED
from stages.stage_programs import Metrics
from stages.tasks.task import LOSS as LOSS_NAME
from stages.trees import PyTree


class UnreadableError(Exception):
    """A tensor that was taken from a link cannot be decoded.

    Attributes:
      link: Its link.
      reason: What its sender sent, in words.
    """

    def __init__(self, message: Message, why: str) -> None:
        self.link, self.reason = message.link, f"a tensor ({message.tag}): {why}"
        super().__init__(self.reason)


class Executor:
    """Performs the actions of a host.

    Owned by the host's dispatch thread, except for callbacks that run on completion.

    Args:
      program: The host's program under the run's plan.
      replicas: The weights here by (device, stage); (ALL, stage) where devices share a copy.
      link_table: The host's links.
      model: The whole model.
      batches: The device's data, if this host is a device.
      meter: Receives loss and metrics.
      record: Receives timed sends and receives.
      ledger: Counts the bytes held between actions, without weights.
      duration_s: Least seconds of (action, samples) on this host; 0 for its real duration.
      seed: Root seed of the run.
      dtype: The dtype that samples and scalars are computed in.
      lengths: Is told to what the device's own mini-batches are padded.
      computed_size: Returns in what size a micro-batch of some samples is computed.
      releases: What a device of a private run may send.
      holds_back: Whether nothing is sent that follows from a loss that is not finite.
    """

    def __init__(
        self,
        program: HostProgram,
        replicas: Mapping[tuple[int, int], Replica],
        link_table: LinkTable,
        *,
        model: Model,
        batches: Batches | None,
        meter: Meter,
        record: Callable[[Timed], None],
        ledger: Ledger,
        duration_s: Callable[[Action, int], float],
        seed: int,
        dtype: DTypeLike,
        lengths: StepLengths,
        computed_size: Callable[[int], int],
        releases: Releases | None = None,
        holds_back: bool = False,
    ) -> None:
        self._host, self._program = program.host, program
        self._holds_back = holds_back
        self._replicas, self._meter, self._record = replicas, meter, record
        self._ledger, self._releases, self._computed_size = ledger, releases, computed_size
        self._duration_s, self._seed, self._dtype = duration_s, np.uint32(seed), np.dtype(dtype)
        self._schedule: RoundSchedule | None = None
        self._cohort: tuple[int, ...] = ()
        self._arrived: dict[Action, Message] = {}
        self._samples = SampleStore(program, model, batches, ledger, dtype, lengths, computed_size)
        self._values: dict[Action, jax.Array] = {}
        self._residuals: dict[tuple[int, int, int, int], tuple[PyTree, int]] = {}
        self._sender = TensorSender(link_table, record, ledger)
        self._dispatched_s = 0.0
        self._perform = {FORWARD: self._forward, LOSS: self._last, BACKWARD: self._backward,
                         UPDATE: self._update}  # fmt: skip

    def start(self, schedule: RoundSchedule, attempt: int, cohort: tuple[int, ...]) -> None:
        """Begins a round.

        Args:
          schedule: The round.
          attempt: Number of the attempt, which is in the tensors' headers.
          cohort: The device in each place: draws depend on the device and not on its place.
        """
        self._schedule, self._cohort = schedule, cohort
        self._sender.attempt = self._samples.attempt = attempt

    def forget(self, place: int) -> None:
        """Releases everything held for a place, or with ``ALL`` for all places."""

        def gone(of: int) -> bool:
            return place in (ALL, of)

        for action in [one for one in self._arrived if gone(one.device)]:
            message = self._arrived.pop(action)
            self._ledger.drop(message.nbytes)
            message.release()
        for action in [one for one in self._values if gone(one.device)]:
            self._ledger.drop(self._values.pop(action).nbytes)
        for key in [one for one in self._residuals if gone(one[1])]:
            self._ledger.drop(self._residuals.pop(key)[1])
        self._samples.forget(place)
        self._sender.forget(place)

    @property
    def holds(self) -> int:
        """Number of held tensors, residuals, side inputs and targets of micro-batches."""
        tables = (self._arrived, self._samples, self._values, self._residuals, self._sender)
        return sum(len(table) for table in tables)

    @property
    def schedule(self) -> RoundSchedule:
        """The round under way."""
        assert self._schedule is not None
        return self._schedule

    def replica(self, device: int, stage: int) -> Replica:
        """Returns the weights that a device's stage uses on this host."""
        found = self._replicas.get((device, stage))
        return self._replicas[ALL, stage] if found is None else found

    def perform(self, action: Action) -> Work:
        """Dispatches an action's computation and returns at once.

        Raises:
          UnreadableError: Its input cannot be decoded; nothing was dispatched.
        """
        # Before the call: a small computation may run inside it.
        self._dispatched_s = time.monotonic()
        return self._perform[action.kind](action)

    def receive(self, message: Message) -> Action | None:
        """Stores an arrived tensor.

        Returns:
          The receive that is now complete, or None while its activation, or a target or side input
          that comes beside it, is missing.

        Raises:
          RunError: The tensor does not belong to this host's schedule.
        """
        tag = message.tag
        assert tag is not None
        self._check(message, tag)
        kind = RECEIVE_BACKWARD if tag.role == Role.COTANGENT else RECEIVE_FORWARD
        action = Action(tag.stage, kind, tag.device, tag.step, tag.micro_batch)
        if tag.role in (Role.LABEL, Role.SIDE):
            self._samples.receive(message, tag)
        else:
            self._arrived[action] = message
            self._ledger.hold(message.nbytes)
            self._record(
                Timed(action, message.first_byte_s, message.received_s, message.nbytes, tag.samples)
            )
        if kind == RECEIVE_FORWARD:
            complete = action in self._arrived and self._samples.is_complete(action)
            return action if complete else None
        return action

    def part(self, action: Action) -> MicroBatchSlice:
        """Returns the position of an action's micro-batch in its mini-batch."""
        sizes = self.schedule.sizes(action.device, action.step)
        m = action.micro_batch
        return MicroBatchSlice(sum(sizes[:m]), sizes[m], len(sizes), sum(sizes))

    # --- the four computations ---------------------------------------------------------------

    def _forward(self, action: Action) -> Work:
        part = self.part(action)
        operation = self._operation(action)
        x, release = self._input(action, operation, part)
        replica = self.replica(action.device, action.stage)
        sides = self._samples.sides(action, part, replica.stage.sides)
        y, residuals = replica.forward(x, self._draw(action, part), sides)
        kept_bytes = array_bytes(residuals)
        self._residuals[_key(action)] = residuals, kept_bytes
        # Now owned by the backward: the input, if kept (else it is released), and the result.
        x_bytes = x.nbytes
        if any(one is x for one in residuals.borrowed):
            self._ledger.drop(x_bytes)
            x_bytes = 0
        y_bytes = 0 if residuals.output is not None else y.nbytes
        self._ledger.hold(kept_bytes + y_bytes)
        if operation.target is None:
            self._values[action] = y
            self._ledger.hold(y.nbytes - y_bytes)

            def passed() -> None:
                release()
                self._ledger.drop(x_bytes)

            return self._work(action, y, part.samples, passed)
        boundary = operation.target
        parcel = OutgoingTensor(y, operation.codec, part.samples)
        beside = self._samples.outgoing(action, part)
        self._samples.drop(action)

        def then() -> None:
            release()
            self._ledger.drop(x_bytes)
            self._sender.send_up(action, boundary, part, parcel, beside, y_bytes)

        return self._work(action, parcel.ready, part.samples, then)

    def _last(self, action: Action) -> Work:
        part = self.part(action)
        operation = self._operation(action)
        x, release = self._input(action, operation, part)
        replica = self.replica(action.device, action.stage)
        sides = self._samples.sides(action, part, replica.stage.sides)
        targets = self._samples.targets(action, part)
        self._samples.drop(action)
        metrics, cotangent = replica.loss(x, targets, self._draw(action, part), sides, part.samples)
        x_bytes = x.nbytes
        parcel = self._keep_cotangent(action, operation, cotangent)

        def then() -> None:
            release()
            self._ledger.drop(x_bytes)
            if self._holds_back:
                self._measure(action, replica, metrics, part.samples)
            if parcel is not None:
                self._send_down(action, operation, part, parcel)
            if not self._holds_back:  # others wait for the cotangent, and nobody for the figures
                self._measure(action, replica, metrics, part.samples)

        probe = metrics[LOSS_NAME] if parcel is None else parcel.ready
        return self._work(action, probe, part.samples, then)

    def _backward(self, action: Action) -> Work:
        part = self.part(action)
        operation = self._operation(action)
        cotangent, release = self._taken(action, operation)
        replica = self.replica(action.device, action.stage)
        residuals, over_bytes = self._residuals.pop(_key(action))
        given = replica.backward(residuals, cotangent)
        if self._releases is not None and replica.stage.release is not None:
            self._releases.watch(replica.stage, given, part.samples)
        over_bytes += cotangent.nbytes
        parcel = self._keep_cotangent(action, operation, given if action.stage else None)

        def then() -> None:
            release()
            self._ledger.drop(over_bytes)
            if parcel is not None:
                self._send_down(action, operation, part, parcel)

        return self._work(action, given if parcel is None else parcel.ready, part.samples, then)

    def _update(self, action: Action) -> Work:
        replica = self.replica(action.device, action.stage)
        noise = None
        if self._releases is not None:
            noise = self._releases.gradient_noise(action, replica, self._update_samples(action))
        probe = replica.update(self._gradient_scale(action), noise)
        replica.step = action.step + 1
        self._samples.step_over(action.device, action.step - 1)
        devices = self._program.plan.devices
        last = action.stage == devices[max(action.device, 0)].stages - 1
        served = range(len(devices)) if action.device == ALL else (action.device,)

        def then() -> None:
            if last:
                for device in served:
                    self._meter.step_over(device, action.step)

        return self._work(action, probe, 0, then)

    # --- inputs ------------------------------------------------------------------------------

    def _operation(self, action: Action) -> Operation:
        """Returns an action's operation in the plan."""
        return self._program.operation(action.device, action.stage, action.kind)

    def _input(
        self, action: Action, operation: Operation, part: MicroBatchSlice
    ) -> tuple[jax.Array, Callable[[], None]]:
        """Returns a stage's input and a callback for when it has been consumed."""
        if action.stage == 0:
            x = self._samples.x(action, part)
            self._ledger.hold(x.nbytes)
            return x, _nothing
        return self._taken(action, operation)

    def _taken(self, action: Action, operation: Operation) -> tuple[jax.Array, Callable[[], None]]:
        """Returns the result of another computation, here or on another host."""
        if operation.output_of is not None:
            stage, kind = operation.output_of
            return self._values.pop(action._replace(stage=stage, kind=kind)), _nothing
        return self._open(action._replace(kind=operation.received))

    def _open(self, received: Action) -> tuple[jax.Array, Callable[[], None]]:
        """Returns an arrived tensor and a callback for when it has been consumed.

        Raises:
          UnreadableError: It cannot be decoded; it is held until its place is forgotten.
        """
        message = self._arrived[received]
        samples = self.part(received).samples
        zeros = received.kind is RECEIVE_BACKWARD
        fill = filler(samples, self._computed_size(samples), zeros=zeros)
        try:
            array = open_parcel(message, fill)
        except CodecError as error:
            raise UnreadableError(message, str(error)) from error
        del self._arrived[received]
        self._ledger.hold(array.nbytes - message.nbytes)
        return array, message.release

    def _draw(self, action: Action, part: MicroBatchSlice) -> MicroBatchContext:
        """Returns the scalars of a micro-batch, so that draws depend neither on cuts nor on N."""
        draw = MicroBatchContext(
            inverse_batch=self._dtype.type(1.0 / self._loss_samples(action.step, part)),
            seed=self._seed,
            device=np.uint32(self._cohort[action.device]),
            step=np.uint32(action.step),
            position=np.uint32(part.before),
        )
        if self._releases is None:
            return draw
        stage = self.replica(action.device, action.stage).stage
        return self._releases.draw(draw, action, stage, part.samples)

    def _update_samples(self, action: Action) -> int:
        """Returns the number of samples in the mean whose gradient an update takes."""
        if self._program.plan.sums_gradients:
            return self.schedule.batch_of_all(action.step)
        return sum(self.schedule.sizes(action.device, action.step))

    def _loss_samples(self, step: int, part: MicroBatchSlice) -> int:
        """Returns the number of samples in a loss's mean: all devices' if gradients are summed.

        Where devices share weights the sum of their gradients then is that of the union of their
        mini-batches, and no cotangent has to be scaled on its way.
        """
        if not self._program.plan.sums_gradients:
            return part.batch_samples
        return self.schedule.batch_of_all(step)

    def _gradient_scale(self, action: Action) -> float:
        """Returns the factor that makes a gradient that of its mini-batch; see ``_loss_samples``.

        A stage of the device's own steps by its own mini-batch; averaged by samples, these steps
        are the union's too.
        """
        if not self._program.plan.sums_gradients or action.device == ALL:
            return 1.0
        own = sum(self.schedule.sizes(action.device, action.step))
        return self.schedule.batch_of_all(action.step) / own

    def _check(self, message: Message, tag: Tag) -> None:
        """Raises RunError unless this round can use the tensor."""
        sizes = self.schedule.sizes(tag.device, tag.step)
        m = tag.micro_batch
        if m >= len(sizes) or sizes[m] != tag.samples:
            raise RunError(
                f"{message.link.peer} sent micro-batch {m} of device {tag.device}, step "
                f"{tag.step}, with {tag.samples} samples, but {self._host} expects micro-batches "
                f"of {list(sizes)}: do both hosts run the same version?"
            )

    # --- results -----------------------------------------------------------------------------

    def _keep_cotangent(
        self, action: Action, operation: Operation, cotangent: jax.Array | None
    ) -> OutgoingTensor | None:
        """Keeps a cotangent for the stage below on this host, or returns the parcel to send."""
        if cotangent is None:
            return None
        self._ledger.hold(cotangent.nbytes)
        if operation.target is None:
            self._values[action] = cotangent
            return None
        return OutgoingTensor(cotangent, operation.codec, self.part(action).samples)

    def _measure(self, action: Action, replica: Replica, metrics: Metrics, samples: int) -> None:
        """Takes what a last stage has measured; a private device's figures stay there."""
        if self._releases is None:
            self._meter.add(action.device, action.step, totals_of(metrics, samples))
        elif replica.stage.release is not None:
            self._releases.watch(replica.stage, metrics[CLIPPED], samples)

    def _send_down(
        self, action: Action, operation: Operation, part: MicroBatchSlice, parcel: OutgoingTensor
    ) -> None:
        """Sends a cotangent, unless it follows from a loss that is not finite and is held back.

        Without it no other host can take the step, nor this one the next: it is the latest from
        which all can go back.
        """
        if self._holds_back and self._meter.is_broken(action.device):
            self._ledger.drop(parcel.array_bytes)
            return
        self._sender.send_down(action, operation, part, parcel)

    def _work(self, action: Action, probe: PyTree, samples: int, then: Callable[[], None]) -> Work:
        """Wraps a dispatched computation for the completion thread."""
        duration_s = self._duration_s(action, samples)
        return Work(action, probe, self._dispatched_s, samples, duration_s, then)


def _key(action: Action) -> tuple[int, int, int, int]:
    """Returns the key of a micro-batch at a stage."""
    return action.stage, action.device, action.step, action.micro_batch


def _nothing() -> None:
    """Releases an input that needs no release."""
