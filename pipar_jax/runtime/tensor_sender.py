"""What a host sends of its computations: headers, queues of links, and the trace of what left."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from comms import PeerLost, Role, Tag
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.runtime.memory import Ledger
from pipar_jax.runtime.sample_store import BesideTensor, MicroBatchSlice
from pipar_jax.runtime.transfer import OutgoingTensor
from pipar_jax.schedule.actions import ALL, SEND_BACKWARD, SEND_FORWARD, Action
from pipar_jax.schedule.host_program import Operation
from pipar_jax.schedule.plan import Boundary
from pipar_jax.schedule.trace import Timed


class TensorSender:
    """Sends activations and cotangents to the hosts of neighbouring stages.

    Tensors are sent from the completion thread, and leave on the I/O thread.

    Attributes:
      attempt: Number of the attempt at a round, which is in the tensors' headers.

    Args:
      link_table: The host's links.
      record: Receives timed sends.
      ledger: Counts the bytes held until tensors have left.
    """

    def __init__(
        self, link_table: LinkTable, record: Callable[[Timed], None], ledger: Ledger
    ) -> None:
        self.attempt = 0
        self._link_table, self._record, self._ledger = link_table, record, ledger
        # Bytes of unsent tensors, by the send: a lost link does not report them as sent.
        self._leaving: dict[Action, int] = {}

    def __len__(self) -> int:
        """Returns the number of tensors that have not left."""
        return len(self._leaving)

    def forget(self, place: int) -> None:
        """Releases what is held for a place's unsent tensors, or with ``ALL`` for all places."""
        for action in [sent for sent in list(self._leaving) if place in (ALL, sent.device)]:
            self._ledger.drop(self._leaving.pop(action, 0))

    def send_up(
        self,
        action: Action,
        boundary: Boundary,
        part: MicroBatchSlice,
        parcel: OutgoingTensor,
        beside: Sequence[BesideTensor],
        over_bytes: int,
    ) -> None:
        """Sends an activation, behind targets and side inputs, to the host of the next stage.

        Args:
          action: The forward.
          boundary: The boundary that it crosses.
          part: The micro-batch.
          parcel: The activation.
          beside: The targets and side inputs.
          over_bytes: Bytes of memory that are released once it has left.
        """
        above = action.stage + 1
        tag = self._tag(Role.ACTIVATION, action, above, part)
        link = self._link_table.link_for(boundary)
        for role, entry, array in beside:
            with contextlib.suppress(PeerLost):  # see _send
                link.send(
                    dataclasses.replace(tag, role=role, entry=entry), np.ascontiguousarray(array)
                )
        self._send(boundary, tag, action._replace(kind=SEND_FORWARD), parcel, over_bytes)

    def send_down(
        self, action: Action, operation: Operation, part: MicroBatchSlice, parcel: OutgoingTensor
    ) -> None:
        """Sends a cotangent to the host of the stage below.

        Args:
          action: The backward.
          operation: The backward in the plan, with the boundary that its result crosses.
          part: The micro-batch.
          parcel: The cotangent.
        """
        tag = self._tag(Role.COTANGENT, action, action.stage - 1, part)
        assert operation.target is not None
        sent = action._replace(kind=SEND_BACKWARD)
        self._send(operation.target, tag, sent, parcel, parcel.array_bytes)

    def _send(
        self, boundary: Boundary, tag: Tag, sent: Action, parcel: OutgoingTensor, over_bytes: int
    ) -> None:
        """Queues a tensor on the link to its stage's host and records when it left.

        Args:
          boundary: The boundary that it crosses.
          tag: The contents of its header.
          sent: The action's name in the trace.
          parcel: The tensor.
          over_bytes: Bytes of memory that are released once it has left.
        """

        def left(start_s: float, end_s: float, nbytes: int) -> None:
            self._record(Timed(sent, start_s, end_s, nbytes, tag.samples))
            self._ledger.drop(self._leaving.pop(sent, 0))

        self._leaving[sent] = over_bytes
        link = self._link_table.link_for(boundary)
        # A link's end is reported where links are watched, and the coordinator then decides
        # who goes on: until then this host continues with what it has.
        with contextlib.suppress(PeerLost):
            link.send(tag, parcel.contents(), codec=parcel.codec, on_sent=left)

    def _tag(self, role: Role, action: Action, stage: int, part: MicroBatchSlice) -> Tag:
        """Returns the header of an action's tensor."""
        return Tag(
            role=role,
            device=action.device,
            stage=stage,
            step=action.step,
            micro_batch=action.micro_batch,
            micro_batches=part.parts,
            samples_before=part.before,
            samples=part.samples,
            batch_samples=part.batch_samples,
            attempt=self.attempt,
        )
