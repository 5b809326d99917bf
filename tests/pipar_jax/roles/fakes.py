"""Links, messages and hosts that are none, so that roles can be driven without training."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from comms import LinkStats, PeerClosed, Role, Tag, parse_codec
from comms.link.message import Message, Payload
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.trace import Timed


class Link:
    """A link whose other side is the test.

    Attributes:
      said: What was sent over it.
      ended: Why it was ended here, or None.
    """

    def __init__(self, peer: str) -> None:
        self.peer, self.address, self.offset_s, self.error = peer, "127.0.0.1:1", 0.0, None
        self.said: list[Any] = []
        self.ended: str | None = None

    def start(self, on_message, on_credit, on_lost) -> None:
        self.on_message, self.on_lost = on_message, on_lost

    def send_control(self, body) -> None:
        if self.ended is not None:
            raise PeerClosed(f"{self.peer} is gone")
        self.said.append(body)

    def send_bundle(self, name, tensors, body, on_sent=None, *, codec="raw") -> None:
        self.send_control(body)

    def refuse(self, reason: str) -> None:
        self.ended = reason

    close = refuse

    def admit(self, allowance=None) -> None:
        self.allowance = allowance

    def drain(self, timeout_s: float) -> None:
        """Has nothing that waits."""

    def set_shape(self, shape) -> None:
        """Has no shape."""

    share_shape = set_shape

    def begin_peak(self) -> None:
        """Has no queue."""

    def stats(self):
        return LinkStats(**{one.name: 0 for one in dataclasses.fields(LinkStats)})


class Host:
    """A host that does nothing and believes everything."""

    def __init__(self, *args, reply=None, **kwargs) -> None:
        self.actions, self.reply = 0, reply
        self.recorder = SimpleNamespace(add=self.note, take=lambda: ([], 0.0))
        self.observer = SimpleNamespace(take=lambda: [])
        self.tensors: list[Message] = []
        self.share = SimpleNamespace(lengths=StepLengths(()))

    def note(self, row: Timed) -> None:
        assert isinstance(row, Timed)

    def on_message(self, message: Message) -> None:
        self.tensors.append(message)

    def wake(self) -> None:
        """Has nobody to wake."""

    def _take(self, *args) -> None:
        """Takes any command."""

    prepare = prepare_ahead = pull = push = keep = restore = calibrate = release = commit = _take
    belong_to = _take
    close = wake


def control(link: Link, body: Any) -> Message:
    """A control message that arrived."""
    return Message("control", link, body=body, nbytes=100)


def bundle(link: Link, name: str, body: Any, arrays: dict[str, np.ndarray]) -> Message:
    """A bundle that arrived."""
    payloads = {one: payload(array) for one, array in arrays.items()}
    tag = Tag(role=Role.WEIGHT)
    return Message("bundle", link, tag=tag, name=name, body=body, payloads=payloads, nbytes=100)


def tensor(link: Link, tag: Tag, array: np.ndarray, codec: str = "raw") -> Message:
    """A tensor that arrived."""
    return Message("tensor", link, tag=tag, payloads={"": payload(array, codec)}, nbytes=100)


def payload(array: np.ndarray, codec: str = "raw") -> Payload:
    """A tensor as it crossed a link."""
    array = np.asarray(array, order="C")  # unlike ascontiguousarray, also [ ]
    chosen, parameter = parse_codec(codec)
    data = np.array(chosen.encode(array, parameter), copy=True)
    return Payload(data, chosen, parameter, array.dtype, array.shape)


def spoiled(rng: random.Random, data: np.ndarray, *, fixed: bool) -> np.ndarray:
    """The bytes of a payload, some of them changed, and fewer of them unless the size is fixed."""
    data, way = data.copy(), rng.randrange(4)
    if way == 0:
        data[:] = np.frombuffer(rng.randbytes(data.size), np.uint8)
    elif way == 1 and not fixed:
        data = data[: rng.randrange(data.size + 1)].copy()
    elif way == 2:
        data[rng.randrange(min(8, data.size))] = rng.choice((0, 1, 2, 3, 4, 6, 7, 128, 255))
    else:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(data.size)] ^= np.uint8(1 << rng.randrange(8))
    return data


def any_array(rng: random.Random) -> np.ndarray:
    """An array of some shape and element type."""
    shape = tuple(rng.choice((0, 1, 2, 3, 7, 12)) for _ in range(rng.randrange(4)))
    dtype = rng.choice(
        (np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_, np.complex64,
         ml_dtypes.bfloat16)
    )  # fmt: skip
    made = np.full(shape, rng.choice((0, 1, 9, 200)), np.float64)
    if rng.random() < 0.1 and made.size:
        made.reshape(-1)[0] = np.nan
    with np.errstate(invalid="ignore"):
        return made.astype(dtype)


def any_tag(rng: random.Random, like: Tag | None = None) -> Tag:
    """A tag, or one that differs from another in a field."""
    base = like or Tag(role=rng.choice(list(Role)))
    fields = [one.name for one in dataclasses.fields(Tag) if one.name != "role"]
    changed = {name: rng.choice((0, 1, 2, 3, 7, 99, 2**31 - 1, 2**32 - 1))
               for name in rng.sample(fields, 1 if like else 4)}  # fmt: skip
    return dataclasses.replace(base, **changed)


def any_arrays(rng: random.Random) -> dict[str, np.ndarray]:
    """Named arrays, some with names that weights have."""
    names = ("numbers", "times", "bytes", "0/params/fc1/linear/kernel", "1/state/fc1/x", "a/b/c",
             "part/opt/fc1/00000", "whole/params/out/linear/bias", "", "x" * 300, "/" * 9,
             "-1/params/fc2/linear/kernel", "0/no/such/unit")  # fmt: skip
    return {name: any_array(rng) for name in rng.sample(names, rng.randrange(4))}


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """Some JSON."""
    way = rng.randrange(9 if depth < 4 else 6)
    if way < 6:
        return rng.choice((None, True, 0, -1, 2**63, 10**300, 0.5, float("nan"), "", "d0", "\0"))
    if way == 6:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(("type", "name", "x", "round", "plan")): any_json(rng, depth + 1)
            for _ in range(rng.randrange(4))}  # fmt: skip
