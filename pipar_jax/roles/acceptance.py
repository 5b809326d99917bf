"""Which tensors a host accepts: those that its plan expects from a sender, in the plan's order.

Between two hosts the micro-batches of a device's stage arrive in the order of their steps, each
one's targets and side inputs right before its activation; so for every sender, device and stage
there is exactly one tensor that may come next, and checking it costs a few comparisons. It runs on
the I/O thread.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from comms import CodecError, Message, Role, Tag, parse_codec
from comms.arrays import Array, DType
from comms.wire.frame import array_bytes
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.actions import NO_ATTEMPT, Span, batch_samples, micro_batch_sizes
from pipar_jax.schedule.host_program import find_beside
from pipar_jax.schedule.plan import Boundary, Plan, device_name
from stages import Model
from stages.lengths import variants
from stages.signature import TARGET

_BESIDE = (int(Role.LABEL), int(Role.SIDE))
_ACTIVATION, _COTANGENT = int(Role.ACTIVATION), int(Role.COTANGENT)


#: Shape of one sample for each length of the model's samples, the longest last.
Features: TypeAlias = tuple[tuple[int, ...], ...]


class _Beside(NamedTuple):
    """A target or side input that comes before an activation.

    Attributes:
      role: LABEL or SIDE.
      entry: Index of its name among the model's targets or side inputs.
      name: Its name.
      features: Shape of one sample, for each length of the model's samples.
      dtype: Its dtype.
    """

    role: Role
    entry: int
    name: str
    features: Features
    dtype: DType

    def __str__(self) -> str:
        """Returns its name for messages."""
        return f"{'target' if self.role == Role.LABEL else 'side input'} {self.name}"


class _Stream:
    """The tensors from one side to one stage of one device, and the position of the next."""

    __slots__ = (
        "beside", "boundary", "codec", "dtype", "features", "micro_batch", "parameter", "passed",
        "step",
    )  # fmt: skip

    def __init__(
        self,
        boundary: Boundary,
        features: Features,
        dtype: DType,
        codec: str,
        beside: Sequence[_Beside],
    ) -> None:
        self.boundary, self.features, self.dtype, self.beside = boundary, features, dtype, beside
        self.codec, self.parameter = parse_codec(codec)
        self.step, self.micro_batch, self.passed = 0, 0, 0

    def anew(self, step: int) -> _Stream:
        """Returns the same stream before the first tensor of a step."""
        made: _Stream = copy.copy(self)
        made.step, made.micro_batch, made.passed = step, 0, 0
        return made

    def due(self) -> _Beside | None:
        """Returns the target or side input that comes next, or None: the tensor itself does."""
        return self.beside[self.passed] if self.passed < len(self.beside) else None

    def nbytes(self, samples: int) -> int:
        """Returns the most bytes of a tensor, before or after its codec."""
        shape = (samples, *self.features[-1])
        coded = self.codec.encoded_bytes(self.dtype, shape, self.parameter)
        beside = [samples * array_bytes(one.dtype, one.features[-1]) for one in self.beside]
        return max(coded, array_bytes(self.dtype, shape), *beside, 0)


class Acceptance:
    """The tensors that one host may be sent under one plan.

    Nothing may come before ``open``. What belongs to an attempt at a round before the one that is
    open, or to a place that was dropped from it, was on its way when that was decided: it
    ``is_past``. A neighbour may know of the next attempt before this host does: what it sends
    ``is_ahead``, and has to wait for ``open``.

    Args:
      model: The whole model.
      plan: The plan.
      host: The host's name.
      samples: Samples of each device's epoch.
      batch_size: Samples of a full mini-batch.
      lengths: To what the host's mini-batches are padded, which is narrowed by what arrives.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        host: str,
        *,
        samples: Sequence[int],
        batch_size: int,
        lengths: StepLengths,
    ) -> None:
        self._all_lengths, self._lengths = model.lengths, lengths
        self._classes, self._rule, self._plan = model.classes, model.task.targets, plan
        self._stop = dict.fromkeys(range(len(plan.devices)), 0)
        self._attempt, self._dropped = NO_ATTEMPT, frozenset[int]()
        self._samples, self._batch_size = samples, batch_size
        self._micro_batches = [one.micro_batches for one in plan.devices]
        self._places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._streams: dict[tuple[int, int, int], _Stream] = {}
        shapes = [form.shapes(1) for form in variants(model)]
        for device, one in enumerate(plan.devices):
            chain = [plan.host(device, stage) for stage in range(one.stages)]
            for below, cut in enumerate(one.cuts):
                if chain[below] == chain[below + 1] or host not in chain[below : below + 2]:
                    continue
                boundary = plan.boundary(device, below)
                features = tuple(tuple(form[cut].shape[1:]) for form in shapes)
                like = features, np.dtype(shapes[-1][cut].dtype)
                codecs = one.codecs[below]
                if chain[below + 1] == host:
                    self._streams[_ACTIVATION, device, below + 1] = _Stream(
                        boundary, *like, codecs.activation, _beside(model, plan, device, below)
                    )
                else:
                    self._streams[_COTANGENT, device, below] = _Stream(
                        boundary, *like, codecs.cotangent, ()
                    )
        self._host = host

    def open(self, spans: Sequence[Span], attempt: int, samples: Sequence[int]) -> None:
        """Accepts the tensors of an attempt at a round, and none of a later attempt.

        On the I/O thread, or before any host of the round knows of the attempt.

        Args:
          spans: The round's spans.
          attempt: Number of the attempt.
          samples: Samples of an epoch of each place's device.
        """
        self._samples = samples
        first: dict[int, int] = {}
        stop = dict.fromkeys(range(len(self._plan.devices)), 0)
        for span in spans:
            first.setdefault(span.device, span.first)
            stop[span.device] = max(stop[span.device], span.stop)
        self._streams = {
            key: stream.anew(first.get(key[1], 0)) for key, stream in self._streams.items()
        }
        self._stop, self._dropped, self._attempt = stop, frozenset(), attempt

    def drop(self, place: int) -> None:
        """Rejects further tensors of a place in this attempt; any thread may call it."""
        self._dropped |= {place}

    def is_dropped(self, place: int) -> bool:
        """Returns whether a place was dropped from the attempt that is open."""
        return place in self._dropped

    def is_past(self, tag: Tag) -> bool:
        """Returns whether a tensor belongs to abandoned work, which is not an error."""
        if tag.role == Role.WEIGHT:
            return False
        return tag.attempt < self._attempt or (
            tag.attempt == self._attempt and tag.device in self._dropped
        )

    def is_ahead(self, tag: Tag) -> bool:
        """Returns whether a tensor belongs to an attempt not yet known to this host."""
        return tag.attempt > self._attempt

    def tells_of(self, host: str, device: int, step: int) -> bool:
        """Returns whether a device's step ends on a host and may already be complete."""
        if device not in self._stop or step >= self._stop[device]:
            return False
        return self._plan.host(device, self._plan.devices[device].stages - 1) == host

    def trains(self, host: str, device: int | None, step: int) -> bool:
        """Returns whether a host runs a device's stage (None: any) in a step that may be over."""
        devices = self._stop if device is None else {device} & self._stop.keys()
        return any(
            step < self._stop[one] and self._plan.host(one, stage) == host
            for one in devices
            for stage in range(self._plan.devices[one].stages)
        )

    def tensor_bytes(self, peer: str) -> int:
        """Returns the most bytes of a tensor that a peer may send."""
        return max(
            (
                stream.nbytes(self._most_samples(device))
                for (_, device, _), stream in self._streams.items()
                if stream.boundary.peer(self._host) == peer
            ),
            default=0,
        )

    def objection(
        self, peer: str, message: Message, boundary: Boundary | None = None
    ) -> str | None:
        """Records an arrived tensor; returns what is wrong with it, or None.

        Args:
          peer: Who sent it.
          message: The tensor.
          boundary: The boundary that its link is reserved for, if any.
        """
        tag = message.tag
        assert tag is not None
        role = int(tag.role)
        if tag.attempt != self._attempt or tag.device in self._dropped:
            return f"a tensor ({tag}) of attempt {tag.attempt}, expected {self._attempt}"
        key = (_ACTIVATION if role in _BESIDE else role), tag.device, tag.stage
        stream = self._streams.get(key)
        if stream is None or stream.boundary.peer(self._host) != peer:
            return f"a tensor ({tag}) that the plan does not assign to it"
        if boundary is not None and stream.boundary != boundary:
            return f"a tensor ({tag}) over the link for {tuple(boundary)}"
        expected = self._next(stream, tag.device)
        if expected is None:
            return f"a tensor ({tag}) before its step was released"
        due = stream.due()
        if (role, tag.entry) != ((key[0], 0) if due is None else (due.role, due.entry)):
            what = "activation" if due is None else due
            return f"a tensor ({tag}), expected the {what} of micro-batch {stream.micro_batch}"
        if (tag.step, tag.micro_batch, tag.micro_batches, tag.samples_before, tag.samples,
                tag.batch_samples) != expected:  # fmt: skip
            step, micro, parts, before, samples, batch = expected
            return (
                f"a tensor ({tag}), expected step {step}, micro-batch {micro} of {parts}, with "
                f"{samples} samples behind {before} of {batch}"
            )
        reason = self._odd_payload(stream, message, tag, due)
        if reason is None:
            self._advance(stream, expected, due)
        return reason

    def _next(self, stream: _Stream, device: int) -> tuple[int, int, int, int, int, int] | None:
        """Returns the header fields of a stream's next tensor, or None if there is none yet."""
        if stream.step >= self._stop[device]:
            return None
        batch = batch_samples(self._samples[device], self._batch_size, stream.step)
        key = device, batch
        places = self._places.get(key)
        if places is None:
            sizes = micro_batch_sizes(batch, self._micro_batches[device])
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            places = self._places[key] = list(zip(starts, sizes, strict=True))
        before, samples = places[stream.micro_batch]
        return stream.step, stream.micro_batch, len(places), before, samples, batch

    def _advance(
        self, stream: _Stream, now: tuple[int, int, int, int, int, int], due: _Beside | None
    ) -> None:
        if due is not None:
            stream.passed += 1
            return
        stream.passed = 0
        stream.micro_batch += 1
        if stream.micro_batch == now[2]:
            stream.step, stream.micro_batch = stream.step + 1, 0

    def _odd_payload(
        self, stream: _Stream, message: Message, tag: Tag, due: _Beside | None
    ) -> str | None:
        """Returns what is wrong with a tensor's payload, or None."""
        payload = message.payload
        features, dtype = (stream.features, stream.dtype) if due is None else due[3:]
        possible = self._possible(features, payload.shape, tag)
        odd = not possible or payload.dtype != dtype
        if odd or (due is not None and payload.codec.name != "raw"):
            raw = "" if due is None else " in raw"
            return _odd(tag, payload, f"{dtype}{self._expected(features, tag)}{raw}")
        other = payload.codec is not stream.codec or payload.parameter != stream.parameter
        if due is None and other:
            return _odd(tag, payload, f"codec {stream.codec.name}:{stream.parameter}")
        try:
            payload.check()  # it is decoded where nobody knows any more who sent it
        except CodecError as error:
            return f"a tensor ({tag}): {error}"
        if due is not None:
            if due.dtype.kind not in "bi" and not np.isfinite(payload.array).all():
                return f"a tensor ({tag}) with a number that is not finite"
            if (reason := self._odd_target(payload.array, tag, due)) is not None:
                return reason
        self._lengths.note(tag.attempt, tag.device, tag.step, possible)
        return None

    def _possible(self, features: Features, shape: tuple[int, ...], tag: Tag) -> tuple[int, ...]:
        """Returns the lengths of its step's samples of which a tensor may be; none: it is odd.

        All tensors of a step are of the same: of that of its first, or of the host's own samples.
        A cotangent is never the first.

        Args:
          features: What it may be for each length.
          shape: What it is.
          tag: What it belongs to.
        """
        lengths = self._all_lengths or (0,)
        known = (
            self._lengths.possible(tag.attempt, tag.device, tag.step)
            if self._all_lengths
            else lengths
        )
        if known is None:
            known = () if tag.role == Role.COTANGENT else lengths
        return tuple(
            length
            for length, one in zip(lengths, features, strict=True)
            if length in known and shape == (tag.samples, *one)
        )

    def _expected(self, features: Features, tag: Tag) -> str:
        """Returns the shapes that a tensor may have, as text."""
        known = self._lengths.possible(tag.attempt, tag.device, tag.step) or self._all_lengths
        shapes = {
            str([tag.samples, *one]): None
            for length, one in zip(self._all_lengths or (0,), features, strict=True)
            if not known or length in known
        }
        return " or ".join(shapes)

    def _odd_target(self, array: Array, tag: Tag, due: _Beside) -> str | None:
        """Returns what is wrong with targets according to the task, or None."""
        if due.role != Role.LABEL or due.name != TARGET:
            return None
        reason = self._rule.objection(array, self._classes)
        return None if reason is None else f"targets ({tag}): {reason}"

    def _most_samples(self, device: int) -> int:
        batch = min(self._samples[device], self._batch_size)
        return max(micro_batch_sizes(batch, self._micro_batches[device]))


def _beside(model: Model, plan: Plan, device: int, below: int) -> tuple[_Beside, ...]:
    """Returns what comes before each activation over a boundary, in order."""
    crossing = find_beside(plan, device, below, [unit.sides for unit in model.units])
    forms = variants(model)
    targets = [
        {TARGET: form.target_shapes(2)} if form.targets is None else form.targets for form in forms
    ]
    first = 1 if model.targets is None else 0
    found = []
    for role, known, names, skipped in (
        (Role.LABEL, targets, sorted(targets[-1]) if crossing.targets else (), first),
        (Role.SIDE, [form.sides for form in forms], crossing.sides, 0),
    ):
        order = sorted(known[-1])
        for name in names:
            features = tuple(tuple(form[name].shape[skipped:]) for form in known)
            dtype = np.dtype(known[-1][name].dtype)
            found.append(_Beside(role, order.index(name), name, features, dtype))
    return tuple(found)


def _odd(tag: Tag, payload: Any, expected: str) -> str:
    return (
        f"a tensor ({tag}) as {payload.dtype}{list(payload.shape)} in "
        f"{payload.codec.name}:{payload.parameter}, expected {expected}"
    )


def own_spans(spans: Sequence[Span], host: str) -> list[Span]:
    """Returns a device's spans of a round."""
    return [span for span in spans if device_name(span.device) == host]
