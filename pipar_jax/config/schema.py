"""The schema of a configuration: reads, checks, parses and documents its fields.

The dataclasses of ``pipar_jax.config`` are the single source of truth. Help texts, flags, checks
and JSON all derive from their annotations and from what ``option`` attaches to each field. Nothing
here depends on a particular field.
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

from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import ConfigError

T = TypeVar("T")

#: Choices that are registered elsewhere, by the module that defines what the field names.
REGISTERED = ("",)
#: Maps the path of each field that names something registered to the names.
Names = Mapping[str, tuple[str, ...]]
NONE: Names = {}
#: Upper bound of all times in seconds; operating systems support waits of this length reliably.
LONGEST_S = 1e6

#: Counts have 32 bits in messages between hosts and in compiled programs.
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
    path: str | tuple[str, ...] | None = None,
    words: tuple[str, ...] = (),
) -> Any:
    """Returns a dataclass field with its default, its help text and its limits.

    Args:
      default: The default value; for a class, a new instance of it.
      text: One line of help.
      choices: The allowed values, for texts; ``REGISTERED`` for names that ``check`` is given.
      at_least: Smallest allowed value, for numbers.
      above: Exclusive lower bound.
      at_most: Largest allowed value.
      below: Exclusive upper bound.
      path: For texts that name a file or folder: the prefixes before the path, such as ``npz:``,
        or an empty text if the whole text is a path. ``pipar_jax.config.paths`` makes them
        absolute.
      words: Texts that stand for themselves in a field that names a file or folder.
    """
    metadata = {
        "text": text,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "path": path,
        "words": words,
    }
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


#: Reading them from the source is slow, and every join is checked against all fields: cached.
_hints: Callable[[Any], JsonObject] = functools.cache(typing.get_type_hints)


class ConfigField(NamedTuple):
    """A leaf field of a configuration.

    Attributes:
      path: Dotted path below the root, such as ``data.batch_size``.
      types: Scalar types of the field, including ``NoneType`` if it is optional.
      default: The default value.
      field: The dataclass field, with what ``option`` attached to it.
      names: What is registered for the field, if it names such things.
    """

    path: str
    types: tuple[type, ...]
    default: Any
    field: dataclasses.Field[Any]
    names: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The help text."""
        return str(self.field.metadata["text"]).replace("{names}", ", ".join(self.names))

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values, for texts; empty for any."""
        choices: tuple[str, ...] = self.field.metadata["choices"] or ()
        return self.names if choices is REGISTERED else choices

    @property
    def expects(self) -> str:
        """Describes the valid values: choices, or types and bounds."""
        limits = self.field.metadata
        if self.choices:
            return ", ".join(self.choices)
        words = " or ".join(_WORDS[kind] for kind in self.types if kind in _WORDS)
        bounds = [
            f"{sign} {limits[name]:.12g}"
            for name, sign in (("at_least", "≥"), ("above", ">"), ("at_most", "≤"), ("below", "<"))
            if limits[name] is not None
        ]
        none = " or none" if type(None) in self.types else ""
        return " ".join([words, " and ".join(bounds)]).strip() + none


def options(root: Any, prefix: str = "", names: Names = NONE) -> Iterator[ConfigField]:
    """Yields the options of a dataclass (a class or an instance), including nested ones.

    Fields whose type is a mapping (overrides by index) are skipped.

    Args:
      root: The dataclass.
      prefix: Prefix of the paths.
      names: What is registered, for fields that name such things.
    """
    hints = _hints(root if isinstance(root, type) else type(root))
    for field in dataclasses.fields(root):
        kind = hints[field.name]
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from options(kind, f"{path}.", names)
        elif "text" in field.metadata and not _is_mapping(kind):
            yield ConfigField(path, scalars(kind), _default(field), field, names.get(path, ()))


def scalars(kind: Any) -> tuple[type, ...]:
    """Returns the scalar types that an annotation allows: ``float | None`` gives both."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(scalar for part in typing.get_args(kind) for scalar in scalars(part))
    return (kind,)


def check(root: Any, prefix: str = "", names: Names = NONE) -> None:
    """Checks types, choices and bounds of all fields, including nested ones.

    Whole numbers in float fields become floats, so that equal configurations have equal texts.

    Args:
      root: An instance of a dataclass of options; changed.
      prefix: Prefix of the fields' names in messages.
      names: What is registered, for fields that name such things.

    Raises:
      ConfigError: A value is not valid; the message names the field, the value and what is valid.
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
            check(value, f"{path}.", names)
        elif "text" in field.metadata and not _is_mapping(kind):
            option = ConfigField(path, scalars(kind), None, field, names.get(path, ()))
            setattr(root, field.name, fit(option, value))


def fit(option: ConfigField, value: Any) -> Any:
    """Returns a value converted to the type of an option; one of numpy's becomes Python's.

    Raises:
      ConfigError: The value has another type, is not a choice, or is out of bounds.
    """
    if value is None and type(None) in option.types:
        return None
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if float in option.types and type(value) is int:
        value = float(value)
    limits = option.field.metadata
    if type(value) not in option.types or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{option.path}={value!r} is not valid: expected {option.expects}")
    if isinstance(value, str) and not _is_utf8(value):
        raise ConfigError(
            f"{option.path}={value!r} is not valid UTF-8: write it in UTF-8; if it names a file, "
            "rename the file"
        )
    choices = option.choices
    if choices and value not in choices:
        raise ConfigError(
            f"{option.path}={value!r} is not known{did_you_mean(value, choices)} (known: "
            f"{option.expects})"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        good = (
            (limits["at_least"] is None or value >= limits["at_least"])
            and (limits["above"] is None or value > limits["above"])
            and (limits["at_most"] is None or value <= limits["at_most"])
            and (limits["below"] is None or value < limits["below"])
        )
        if not good:
            raise ConfigError(f"{option.path}={value!r} is out of range: expected {option.expects}")
        if isinstance(value, int) and abs(value) >= _COUNTS:
            raise ConfigError(
                f"{option.path} is out of range: the largest whole number is {_COUNTS - 1}, got "
                f"one of {value.bit_length()} bits"
            )
    return value


def parse(option: ConfigField, text: str) -> Any:
    """Parses the text of a flag as the value of an option.

    Raises:
      ConfigError: The text is not a valid value of the option.
    """
    if type(None) in option.types and text.lower() in ("none", "null"):
        return None
    for kind in (bool, int, float, str):  # narrowest first: 3 is an int where both are allowed
        if kind not in option.types:
            continue
        if kind is bool:
            if text.lower() in ("true", "t", "1", "yes", "false", "f", "0", "no"):
                return fit(option, text.lower() in ("true", "t", "1", "yes"))
            continue
        try:
            return fit(option, kind(text))
        except ValueError:
            continue
    raise ConfigError(f"{option.path}={text!r} is not valid: expected {option.expects}")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Returns ``": did you mean 'x'?"`` for the nearest known name, or an empty text."""
    known = list(known)
    word = str(name)
    if len(word) > 100:  # too long to resemble a name, and slow to compare
        return ""
    leaf = word.rpartition(".")[2]
    leaves = {name.rpartition(".")[2]: name for name in known}
    if leaf in leaves:  # only the group is missing or wrong: data.epochs, batch_size
        return f": did you mean {leaves[leaf]!r}?"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    return f": did you mean {near[0]!r}?" if near else ""


def from_dict(kind: type[T], values: JsonMapping, prefix: str = "") -> T:
    """Returns an instance of a dataclass from nested mappings; missing fields keep their defaults.

    Raises:
      ConfigError: A field is unknown, or a group is not a mapping.
    """
    hints = _hints(kind)
    known = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'configuration'} must be a group of fields")
    made: JsonObject = {}
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
    """Returns whether a text can be encoded; invalid UTF-8 from a command line cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_mapping(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping)
