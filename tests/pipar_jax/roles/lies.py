"""Lies: each number in a message, however deep, replaced by others that its field takes.

``Members`` tell them to whoever asks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from pipar_jax.errors import PeerError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import registry
from pipar_jax.protocol.registry import KINDS, Sender
from pipar_jax.protocol.wire_fields import (
    Figure,
    Free,
    Many,
    Maybe,
    Real,
    Spec,
    Struct,
    Table,
    TupleOf,
    Whole,
    struct,
)
from pipar_jax.roles.mail import Mail

#: A place in JSON: names of fields and positions in lists.
Path = tuple[str | int, ...]
#: In a path: all positions of a list, or names of a table.
EVERY = "*"
#: The least positive number.
TINY = math.ulp(0.0)


def members_kinds() -> list[type]:
    """Returns the messages that a device or node may send to the coordinator."""
    return [kind.made for kind in KINDS.values() if kind.sender in (Sender.HOST, Sender.BOTH)]


def numbers(spec: Spec, path: Path = ()) -> Iterator[tuple[Path, Spec]]:
    """Yields the places of all numbers that a field may have, with their specifications."""
    if isinstance(spec, Maybe):
        yield from numbers(spec.of, path)
    elif isinstance(spec, Struct):
        for name, one in spec.of.items():
            yield from numbers(one, (*path, name))
    elif isinstance(spec, TupleOf):
        for index, one in enumerate(spec.of):
            yield from numbers(one, (*path, index))
    elif isinstance(spec, Many | Table):
        yield from numbers(spec.of, (*path, EVERY))
    elif isinstance(spec, Whole | Real | Figure | Free):
        yield path, spec


def values(spec: Spec) -> list[Any]:
    """Returns JSON that a number's field takes: its limits, zero, and what upsets sums."""
    if isinstance(spec, Whole):
        some = (spec.least, -1, 0, 1, spec.most)
        return [one for one in dict.fromkeys(some) if spec.least <= one <= spec.most]
    if isinstance(spec, Real):
        some_real = (spec.least, 0.0, TINY, spec.most)
        return [one for one in dict.fromkeys(some_real) if spec.least <= one <= spec.most]
    if isinstance(spec, Figure):
        return ["nan", "inf", "-inf", 0.0, -1.0, TINY, 1e308, -1e308]
    assert isinstance(spec, Free)
    return [0, -1, 2**63 - 1, TINY, 1e308]


def all_lies(kind: type) -> list[tuple[Path, Any]]:
    """Returns the places of a message's numbers, each with every value."""
    return [(path, value) for path, spec in numbers(struct(kind)) for value in values(spec)]


def told(said: Any, path: Path, value: Any) -> Any:
    """Returns a message with a lie, as it is decoded; None where it lacks the place, or is refused.

    Of a list or a table the first is lied about.
    """
    body = copy.deepcopy(registry.encode(said))
    body.pop("type")
    at, keys = body, list(path)
    while keys:
        key = keys.pop(0)
        if key == EVERY:
            key = next(iter(range(len(at)) if isinstance(at, list) else at), None)
        if at is None or key is None:
            return None
        if keys:
            at = at[key]
        else:
            at[key] = value
    try:
        return struct(type(said)).read(body, "")
    except registry.Mismatch:  # the field takes it, and what it belongs to does not
        return None


def leaves(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yields the places of the numbers in any JSON."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from leaves(one, (*path, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


class Members:
    """Members that answer at once what a test has them say, and may all be lost.

    Attributes:
      says: What each says, by its name and the kind of its answer.
      gone: Those that are lost, and why.
    """

    def __init__(self, config, says, *, ready=()):
        self.hosts, self.says, self.gone = hosts_of(config), says, {}
        self.by_name = dict.fromkeys((*self.hosts.nodes, *self.hosts.devices))
        self.reports = SimpleNamespace(tell_working=lambda *_: None)
        self.population = SimpleNamespace(
            present=lambda: [one for one in self.hosts.devices if one in self.by_name],
            ready=lambda: [one for one in ready if one in self.by_name],
        )
        self.listeners, self.events, self._now_s = {}, [], 0.0

    def collect(self, kind, names):
        there = [name for name in names if name in self.by_name]
        return {name: Mail(name, self._said(name, kind), {}, 0.0, self._bytes()) for name in there}

    def _said(self, name, kind):
        return self.says[name].get(kind) or kind()

    def _bytes(self):
        """A bundle of no bytes, each a second after the one before."""
        self._now_s += 1.0
        return SimpleNamespace(tensors={}, received_s=self._now_s, release=self.nothing)

    def lose(self, name, error, reason=""):
        self.gone[name] = error
        del self.by_name[name]

    def blame(self, name, reason):
        self.lose(name, PeerError(reason), reason)

    def tell(self, event):
        self.events.append(event)

    def nothing(self, *_):
        """Sends nothing, since answers are known."""

    send = send_bundle = ask = working = poll = nothing
