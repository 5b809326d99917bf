"""Specifications of message fields: type, range, length and depth.

A field of a message is annotated with one, ``round: Annotated[int, Whole()]``, and the
specification decodes and validates received values, encodes sent ones, and tells tests what to
generate. Messages are JSON, which is fully validated: a bool is not a number, numbers are finite
and in range, lists and texts are bounded, and fields are neither missing nor unknown.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from comms.wire.bounded_json import one_line
from pipar_jax.disk.json_text import Json, JsonObject

#: Default upper bound of whole numbers.
MOST_WHOLE = 2**31 - 1
#: Number of characters of a peer's value in an error.
SHOWN = 80


class Mismatch(Exception):
    """A value is not valid for its field.

    Attributes:
      path: The field, such as ``.plan.devices[0].cuts``.
      expected: Description of valid values.
      actual: The actual value.
    """

    def __init__(self, path: str, expected: str, actual: str) -> None:
        super().__init__(f"{path.lstrip('.')}: expected {expected}, got {actual}")
        self.path, self.expected, self.actual = path.lstrip("."), expected, actual


def shown(value: object) -> str:
    """Returns a peer's value for an error: one short printable line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str | bytes | list | tuple | dict) and len(value) > SHOWN:
        head = value[:SHOWN] if isinstance(value, str) else None
        kind = type(value).__name__
        return f"{head!r}… ({len(value)} long)" if head is not None else f"a {kind} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


class Spec:
    """The specification of a value."""

    def read(self, value: Json, path: str) -> Any:
        """Decodes a JSON value.

        Raises:
          Mismatch: The value is not valid.
        """
        raise NotImplementedError

    def write(self, value: Any) -> Json:
        """Encodes a value as JSON."""
        return value


@dataclasses.dataclass(frozen=True)
class Whole(Spec):
    """A whole number.

    Attributes:
      least: The smallest.
      most: The largest.
    """

    least: int = 0
    most: int = MOST_WHOLE

    def read(self, value: Json, path: str) -> int:
        """See ``Spec``."""
        if type(value) is not int or not self.least <= value <= self.most:
            expected = f"a whole number from {self.least} to {self.most}"
            raise Mismatch(path, expected, shown(value))
        return value

    def write(self, value: Any) -> int:
        """Returns a Python int, also for numbers of numpy."""
        return int(value)


@dataclasses.dataclass(frozen=True)
class Real(Spec):
    """A finite number.

    Attributes:
      least: The smallest.
      most: The largest.
    """

    least: float = 0.0
    most: float = 1e18

    def read(self, value: Json, path: str) -> float:
        """See ``Spec``."""
        # Compared without conversion: a whole number of 400 digits is not a float.
        if type(value) not in (int, float) or not self.least <= value <= self.most:
            expected = f"a number from {self.least:g} to {self.most:g}"
            raise Mismatch(path, expected, shown(value))
        return float(value)

    def write(self, value: Any) -> float:
        """Returns a Python float clipped to the range, since measurements may exceed it."""
        return min(max(float(value), self.least), self.most)


@dataclasses.dataclass(frozen=True)
class Figure(Spec):
    """Any number; infinities and NaN, as of diverging training, are encoded as texts."""

    def read(self, value: Json, path: str) -> float:
        """See ``Spec``."""
        if type(value) is str and value in ("nan", "inf", "-inf"):
            return float(value)
        if type(value) not in (int, float) or not abs(value) <= 1e308:
            raise Mismatch(path, "a number, or nan, inf or -inf in quotes", shown(value))
        return float(value)

    def write(self, value: Any) -> float | str:
        """See ``Spec``."""
        number = float(value)
        return number if math.isfinite(number) else str(number)


@dataclasses.dataclass(frozen=True)
class Truth(Spec):
    """True or false."""

    def read(self, value: Json, path: str) -> bool:
        """See ``Spec``."""
        if type(value) is not bool:
            raise Mismatch(path, "true or false", shown(value))
        return value


@dataclasses.dataclass(frozen=True)
class Text(Spec):
    """A text.

    Attributes:
      most: Maximum number of characters.
      pattern: Pattern of the whole text, if not empty.
      valid: Raises ValueError for an invalid text.
    """

    most: int = 64
    pattern: str = ""
    valid: Callable[[str], object] | None = None

    def read(self, value: Json, path: str) -> str:
        """See ``Spec``."""
        fits = type(value) is str and len(value) <= self.most
        if not fits or (self.pattern and not re.fullmatch(self.pattern, value)):
            matching = f" such as {self.pattern}" if self.pattern else ""
            raise Mismatch(path, f"a text of at most {self.most}{matching}", shown(value))
        if self.valid is not None:
            try:
                self.valid(value)
            except ValueError as error:
                raise Mismatch(path, "a known name", f"{shown(value)} ({error})") from error
        return str(value)


@dataclasses.dataclass(frozen=True)
class Prose(Text):
    """A text for people, which is truncated instead of being refused by the receiver."""

    most: int = 4000

    def read(self, value: Json, path: str) -> str:
        """Returns one printable line, since logs and terminals interpret control characters."""
        return one_line(" ".join(super().read(value, path).split()), self.most)

    def write(self, value: Any) -> str:
        """See ``Spec``."""
        text = str(value)
        return text if len(text) <= self.most else f"{text[: self.most - 1]}…"


@dataclasses.dataclass(frozen=True)
class OneOf(Spec):
    """One of several texts."""

    of: tuple[str, ...]

    def read(self, value: Json, path: str) -> str:
        """See ``Spec``."""
        for spec in self.of:
            if spec == value:
                return spec
        raise Mismatch(path, f"one of {', '.join(self.of)}", shown(value))

    def write(self, value: Any) -> Json:
        """See ``Spec``."""
        return str(value)


@dataclasses.dataclass(frozen=True)
class Maybe(Spec):
    """A value, or null."""

    of: Spec

    def read(self, value: Json, path: str) -> Any:
        """See ``Spec``."""
        return None if value is None else self.of.read(value, path)

    def write(self, value: Any) -> Json:
        """See ``Spec``."""
        return None if value is None else self.of.write(value)


@dataclasses.dataclass(frozen=True)
class Many(Spec):
    """A list of equal values, as a tuple.

    Attributes:
      of: Specification of the items.
      most: Maximum length.
      least: Minimum length.
    """

    of: Spec
    most: int
    least: int = 0

    def read(self, value: Json, path: str) -> tuple[Any, ...]:
        """See ``Spec``."""
        if type(value) is not list or not self.least <= len(value) <= self.most:
            raise Mismatch(path, f"a list of {self.least} to {self.most}", shown(value))
        return tuple(self.of.read(item, f"{path}[{i}]") for i, item in enumerate(value))

    def write(self, value: Any) -> list[Json]:
        """See ``Spec``."""
        return [self.of.write(item) for item in value]


@dataclasses.dataclass(frozen=True)
class TupleOf(Spec):
    """A list of fixed length whose items have different meanings: a tuple or a named tuple.

    Attributes:
      made: Constructs the value from the items.
      of: Specifications of the items.
    """

    made: Callable[..., Any]
    of: tuple[Spec, ...]

    def read(self, value: Json, path: str) -> Any:
        """See ``Spec``."""
        if type(value) is not list or len(value) != len(self.of):
            raise Mismatch(path, f"a list of {len(self.of)}", shown(value))
        pairs = zip(self.of, value, strict=True)
        return self.made(*(spec.read(item, f"{path}[{i}]") for i, (spec, item) in enumerate(pairs)))

    def write(self, value: Any) -> list[Json]:
        """See ``Spec``."""
        return [spec.write(item) for spec, item in zip(self.of, value, strict=True)]


@dataclasses.dataclass(frozen=True)
class Table(Spec):
    """Values by name.

    Attributes:
      of: Specification of the values.
      most: Maximum number of values.
      key: Specification of the names.
    """

    of: Spec
    most: int
    key: Text = Text(256)

    def read(self, value: Json, path: str) -> JsonObject:
        """See ``Spec``."""
        if type(value) is not dict or len(value) > self.most:
            raise Mismatch(path, f"an object of at most {self.most} names", shown(value))
        return {
            self.key.read(name, f"{path} name"): self.of.read(item, f"{path}.{shown(name)}")
            for name, item in value.items()
        }

    def write(self, value: Any) -> JsonObject:
        """See ``Spec``."""
        return {name: self.of.write(item) for name, item in value.items()}


@dataclasses.dataclass(frozen=True)
class Struct(Spec):
    """An object with fixed fields: a dataclass.

    Attributes:
      made: Constructs the value from its fields, by name; may raise ``errors``.
      of: Specifications of the fields.
      errors: Exceptions of ``made`` for inconsistent fields.
    """

    made: Callable[..., Any]
    of: Mapping[str, Spec]
    errors: tuple[type[Exception], ...] = ()

    def read(self, value: Json, path: str) -> Any:
        """See ``Spec``."""
        if type(value) is not dict:
            raise Mismatch(path, "an object", shown(value))
        for name in value:
            if name not in self.of:
                known = ", ".join(self.of) or "none"
                raise Mismatch(f"{path}.{shown(name)}", f"no such field (known: {known})",
                               shown(value[name]))  # fmt: skip
        for name in self.of:
            if name not in value:
                raise Mismatch(f"{path}.{name}", "a value", "nothing: it is missing")
        fields = {name: spec.read(value[name], f"{path}.{name}") for name, spec in self.of.items()}
        try:
            return self.made(**fields)
        except self.errors as error:
            raise Mismatch(path, "consistent fields", str(error)) from error

    def write(self, value: Any) -> JsonObject:
        """See ``Spec``."""
        return {name: spec.write(getattr(value, name)) for name, spec in self.of.items()}


@dataclasses.dataclass(frozen=True)
class Free(Spec):
    """Any JSON of bounded size, whose meaning is checked elsewhere.

    Attributes:
      depth: Maximum depth of lists and objects.
      items: Maximum total number of values.
      text: Maximum number of characters of a text or name.
    """

    depth: int
    items: int
    text: int

    def read(self, value: Json, path: str) -> Any:
        """See ``Spec``."""
        left = [self.items]

        def look(item: Json, depth: int) -> None:
            left[0] -= 1
            if left[0] < 0 or depth > self.depth:
                raise Mismatch(path, f"at most {self.items} values, {self.depth} deep", "more")
            if type(item) is str and len(item) > self.text:
                raise Mismatch(path, f"texts of at most {self.text}", shown(item))
            if type(item) is int and item.bit_length() > 64:
                raise Mismatch(path, "numbers of at most 64 bits", shown(item))
            if type(item) is float and not math.isfinite(item):
                raise Mismatch(path, "finite numbers", shown(item))
            if type(item) is dict:
                for name, inner in item.items():
                    look(name, depth + 1)
                    look(inner, depth + 1)
            elif type(item) is list:
                for inner in item:
                    look(inner, depth + 1)

        look(value, 0)
        return value


@functools.cache
def struct(made: type) -> Struct:
    """Returns the specification of a dataclass from the annotations of its fields."""
    hints = get_type_hints(made, include_extras=True)
    specs_by_name = {}
    for field in dataclasses.fields(made):
        specs = [hint for hint in typing.get_args(hints[field.name]) if isinstance(hint, Spec)]
        if len(specs) != 1:
            raise TypeError(f"{made.__name__}.{field.name} must be annotated with one Spec")
        specs_by_name[field.name] = specs[0]
    return Struct(made, specs_by_name)
