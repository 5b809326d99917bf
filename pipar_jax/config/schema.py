"""What a configuration's fields may hold: read from dataclasses, checked, parsed and explained.

The dataclasses of ``pipar_jax.config`` are the only truth. Help texts, command-line flags, checks
and JSON all come from the annotations and from what ``option`` attaches to each field. Nothing
here knows a particular field.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from pipar_jax.errors import ConfigError

T = TypeVar("T")

_SCALARS = (bool, int, float, str)
#: Counts travel in 32 bits between hosts, and are 32-bit numbers in compiled programs.
_COUNTS = 2**32
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: str | None = None,
) -> Any:
    """Returns a dataclass field with its default, its help text and its limits.

    Args:
      default: The value without an override; a class stands for a fresh instance of it.
      text: One line of help.
      choices: The values allowed, for texts.
      at_least: Smallest value allowed, for numbers.
      above: Bound that a number must exceed.
      at_most: Largest value allowed.
      below: Bound that a number must stay under.
      path: For texts that name a file or folder: empty if the whole text does, else the prefix
        behind which it does, such as ``npz:``. ``pipar_jax.config.paths`` makes them absolute.
    """
    metadata = {
        "text": text,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "path": path,
    }
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


#: Read from source text each time it is asked for: kept, since every join is held to all fields.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


class ConfigField(NamedTuple):
    """One field of a configuration that holds a value, not further fields.

    Attributes:
      path: Dotted path below the root, such as ``data.batch_size``.
      types: Scalar types that the field takes, ``NoneType`` among them if it may be empty.
      default: The value without an override.
      field: The dataclass field, with what ``option`` attached to it.
    """

    path: str
    types: tuple[type, ...]
    default: Any
    field: dataclasses.Field[Any]

    @property
    def text(self) -> str:
        """The help text."""
        return str(self.field.metadata["text"])

    @property
    def expects(self) -> str:
        """What the field takes, in words: choices, or types and bounds."""
        limits = self.field.metadata
        if limits["choices"]:
            return ", ".join(limits["choices"])
        words = " or ".join(_WORDS[kind] for kind in self.types if kind in _WORDS)
        bounds = [
            f"{sign} {limits[name]:.12g}"
            for name, sign in (("at_least", "≥"), ("above", ">"), ("at_most", "≤"), ("below", "<"))
            if limits[name] is not None
        ]
        none = " or none" if type(None) in self.types else ""
        return " ".join([words, " and ".join(bounds)]).strip() + none


def options(root: Any, prefix: str = "") -> Iterator[ConfigField]:
    """Yields the options of a dataclass (a class or an instance), nested ones included.

    A field whose type is a mapping (overrides by index) is left to whoever knows its keys.
    """
    hints = _hints(root if isinstance(root, type) else type(root))
    for field in dataclasses.fields(root):
        kind = hints[field.name]
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from options(kind, f"{path}.")
        elif "text" in field.metadata and not _is_mapping(kind):
            yield ConfigField(path, scalars(kind), _default(field), field)


def scalars(kind: Any) -> tuple[type, ...]:
    """Returns the scalar types that an annotation allows: ``float | None`` gives both."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(one for part in typing.get_args(kind) for one in scalars(part))
    return (kind,)


def check(root: Any, prefix: str = "") -> None:
    """Checks types, choices and bounds of every field, nested ones included.

    Whole numbers in fields for numbers become floats, so that equal configurations print equal.

    Raises:
      ConfigError: A value does not fit; the message names the field, the value and what fits.
    """
    hints = _hints(type(root))
    for field in dataclasses.fields(root):
        value, path = getattr(root, field.name), f"{prefix}{field.name}"
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, typing.cast(type, kind)):
                raise ConfigError(
                    f"{path} must be a {typing.cast(type, kind).__name__}, "
                    f"got {type(value).__name__} {value!r}"
                )
            check(value, f"{path}.")
        elif "text" in field.metadata and not _is_mapping(kind):
            one = ConfigField(path, scalars(kind), None, field)
            setattr(root, field.name, fit(one, value))


def fit(one: ConfigField, value: Any) -> Any:
    """Returns a value as the option holds it.

    Raises:
      ConfigError: The type is another one, or the value is not a choice or out of bounds.
    """
    if value is None and type(None) in one.types:
        return None
    if float in one.types and type(value) is int:
        value = float(value)
    limits = one.field.metadata
    if type(value) not in one.types or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{one.path}={value!r} does not fit: it takes {one.expects}")
    if isinstance(value, str) and not _is_utf8(value):
        raise ConfigError(
            f"{one.path}={value!r} is not a text in UTF-8, as all of a configuration is: write it "
            "in UTF-8, and rename the file if it is a file's name"
        )
    choices = limits["choices"]
    if choices and value not in choices:
        raise ConfigError(
            f"{one.path}={value!r} is not known{did_you_mean(value, choices)} "
            f"(it takes {one.expects})"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        good = (
            (limits["at_least"] is None or value >= limits["at_least"])
            and (limits["above"] is None or value > limits["above"])
            and (limits["at_most"] is None or value <= limits["at_most"])
            and (limits["below"] is None or value < limits["below"])
        )
        if not good:
            raise ConfigError(f"{one.path}={value!r} is out of range: it takes {one.expects}")
        if isinstance(value, int) and abs(value) >= _COUNTS:
            raise ConfigError(
                f"{one.path} is out of range: whole numbers end at {_COUNTS - 1}, got one of "
                f"{value.bit_length()} bits"
            )
    return value


def parse(one: ConfigField, text: str) -> Any:
    """Returns the value that a command line's text means for an option.

    Raises:
      ConfigError: The text is nothing that the option takes.
    """
    if type(None) in one.types and text.lower() in ("none", "null"):
        return None
    for kind in (bool, int, float, str):  # narrowest first: 3 is an int where both are allowed
        if kind not in one.types:
            continue
        if kind is bool:
            if text.lower() in ("true", "t", "1", "yes", "false", "f", "0", "no"):
                return fit(one, text.lower() in ("true", "t", "1", "yes"))
            continue
        try:
            return fit(one, kind(text))
        except ValueError:
            continue
    raise ConfigError(f"{one.path}={text!r} does not fit: it takes {one.expects}")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Returns ``": did you mean 'x'?"`` for the nearest known name, or an empty text."""
    known = list(known)
    word = str(name)
    if len(word) > 100:  # resembles none, and comparing takes long
        return ""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not found:
        # A field is often right and only its group is missing or wrong: data.epochs, batch_size.
        leaf = word.rpartition(".")[2]
        leaves = {one.rpartition(".")[2]: one for one in known}
        found = [leaves[near] for near in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    return f": did you mean {found[0]!r}?" if found else ""


def from_dict(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Returns an instance of a dataclass from nested mappings; missing fields keep their default.

    Raises:
      ConfigError: A field is unknown, or a group is not a mapping.
    """
    hints = _hints(kind)
    known = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'configuration'} must be a group of fields")
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"{prefix}{name} is not a field of the configuration{near}")
        if dataclasses.is_dataclass(hints[name]):
            made[name] = from_dict(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            made[name] = value
    return kind(**made)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _is_utf8(text: str) -> bool:
    """Returns whether a text can be written; bytes of a command line that are not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_mapping(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping)
