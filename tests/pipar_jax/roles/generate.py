"""Values that a field takes, and values that it does not, made from its specification."""

from __future__ import annotations

import random
import string
from typing import Any

from pipar_jax.cost_model.profile import HostProfile
from pipar_jax.protocol import registry
from pipar_jax.protocol.wire_fields import (
    Figure,
    Free,
    Many,
    Maybe,
    OneOf,
    Real,
    Spec,
    Struct,
    Table,
    Text,
    Truth,
    TupleOf,
    Whole,
    struct,
)

#: Texts that a pattern or a list of known names asks for.
WORDS = ("server", "d0", "d1", "n1", "n12", "device", "raw", "int8:64", "127.0.0.1", "bits:4")
#: What no field takes.
NEVER = (float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), b"x", {"no": 1}, [[[]]])


def valid(spec: Spec, rng: random.Random) -> Any:
    """Returns JSON that a field takes, limits included."""
    if isinstance(spec, Maybe):
        return None if rng.random() < 0.3 else valid(spec.of, rng)
    if isinstance(spec, Whole):
        near = min(spec.least + 3, spec.most)
        return rng.choice((spec.least, spec.most, rng.randint(spec.least, near)))
    if isinstance(spec, Real):
        return rng.choice((spec.least, spec.most, min(spec.least + rng.random(), spec.most)))
    if isinstance(spec, Figure):
        return rng.choice((0.5, -1e30, 3, "nan", "inf", "-inf"))
    if isinstance(spec, Truth):
        return rng.random() < 0.5
    if isinstance(spec, OneOf):
        return str(rng.choice(spec.of))
    if isinstance(spec, Text):
        return _text(spec, rng)
    if isinstance(spec, Many):
        count = rng.randint(spec.least, min(spec.least + 2, spec.most))
        return [valid(spec.of, rng) for _ in range(count)]
    if isinstance(spec, TupleOf):
        return [valid(one, rng) for one in spec.of]
    if isinstance(spec, Table):
        names = {_text(spec.key, rng) for _ in range(min(2, spec.most))}
        return {name: valid(spec.of, rng) for name in sorted(names)}
    if isinstance(spec, Free):
        return {"group": {"field": rng.choice((1, 0.5, "text", None, True)), "list": [1, [2]]}}
    assert isinstance(spec, Struct)
    if spec.made is HostProfile:  # whose tables have to fit together
        sizes, units = sorted(rng.sample(range(1, 200), 2)), rng.randint(1, 3)
        table = [[rng.random() for _ in sizes] for _ in range(units)]
        fits = {"sizes": sizes, "forward_s": table, "backward_s": table, "update_s": [0.5] * units}
        rest = {name: valid(one, rng) for name, one in spec.of.items() if name not in fits}
        return {**fits, **rest}
    for _ in range(200):  # where fields have to fit together, until they do
        found = {name: valid(one, rng) for name, one in spec.of.items()}
        try:
            spec.read(found, "")
        except Exception:
            continue
        return found
    raise AssertionError(f"nothing that {spec.made} takes")


def _text(spec: Text, rng: random.Random) -> str:
    made = ["".join(rng.choices(string.ascii_letters, k=min(6, spec.most))), *WORDS]
    rng.shuffle(made)
    for one in made:
        try:
            spec.read(one, "")
        except Exception:
            continue
        return one
    raise AssertionError(f"none of {WORDS} fits {spec}")


def wrong(spec: Spec) -> list[Any]:
    """Returns JSON that a field must refuse: other types, and what is beyond each limit."""
    if isinstance(spec, Maybe):
        return [one for one in wrong(spec.of) if one is not None]
    common: list[Any] = [None, True, "\0", [], {}, *NEVER]
    if isinstance(spec, Whole):
        return [*common, 1.0, "1", spec.least - 1, spec.most + 1]
    if isinstance(spec, Real):
        return [*common, "1", spec.least - 1, spec.most * 2 + 1]
    if isinstance(spec, Figure):
        return [one for one in common if one == one] + ["Infinity", float("nan")]
    if isinstance(spec, Truth):
        return [one for one in common if one is not True] + [0, 1, "true"]
    if isinstance(spec, OneOf):
        return [*common, 1, "none of them"]
    if isinstance(spec, Text):
        found = [one for one in common if one != "\0"] + [1, "x" * (spec.most + 1)]
        return [*found, "?\n "] if spec.pattern else found
    if isinstance(spec, Many):
        rng = random.Random(0)
        bad = [[valid(spec.of, rng)] * spec.least + [one] for one in wrong(spec.of)[:4]]
        found = [one for one in common if one != [] or spec.least] + bad
        if spec.most <= 10_000:
            found.append([valid(spec.of, rng)] * (spec.most + 1))
        return found
    if isinstance(spec, TupleOf):
        rng = random.Random(0)
        good = valid(spec, rng)
        bad = [[*good[:i], wrong(one)[1], *good[i + 1 :]] for i, one in enumerate(spec.of)]
        return [*common, good[:-1], [*good, 1], *bad]
    if isinstance(spec, Table):
        rng = random.Random(0)
        name = _text(spec.key, rng)
        found = [one for one in common if one not in ({}, {"no": 1})]
        return [*found, {name: wrong(spec.of)[1]}, {"x" * (spec.key.most + 1): valid(spec.of, rng)}]
    if isinstance(spec, Free):
        deep: Any = 1
        for _ in range(spec.depth + 1):
            deep = [deep]
        return [deep, {"a": "x" * (spec.text + 1)}, {"a": 10**400}, {"a": float("nan")},
                [1] * (spec.items + 1)]  # fmt: skip
    assert isinstance(spec, Struct)
    good = valid(spec, random.Random(0))
    found = [one for one in common if one != {} or spec.of]
    found.append({**good, "unknown": 1})
    for name, one in spec.of.items():
        found.append({key: value for key, value in good.items() if key != name})
        found += [{**good, name: bad} for bad in wrong(one)[:3]]
    return found


def body(kind: registry.MessageType, rng: random.Random) -> dict[str, Any]:
    """Returns a whole message as JSON."""
    return {"type": kind.name, **valid(struct(kind.made), rng)}


def mutated(value: Any, rng: random.Random) -> Any:
    """Returns JSON with one thing in it changed, left out or added."""
    nasty = (None, True, -1, 0, 2**31, 2**63, 10**400, 0.5, 1e308, "", "d0", "d99", "n1", "\0" * 9,
             "x" * 5000, [], {}, [[]], [0] * 50, float("nan"), float("inf"))  # fmt: skip
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(sorted(value))
        way = rng.random()
        if way < 0.1:
            return {key: one for key, one in value.items() if key != name}
        if way < 0.2:
            return {**value, rng.choice(("x", "type", name + "_")): rng.choice(nasty)}
        return {**value, name: mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        way = rng.random()
        if way < 0.2:
            return value[:place] + value[place + 1 :]
        if way < 0.4:
            return [*value, value[place]]
        return [*value[:place], mutated(value[place], rng), *value[place + 1 :]]
    return rng.choice(nasty)
