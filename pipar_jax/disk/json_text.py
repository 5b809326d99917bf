"""JSON without NaN and Infinity, which other readers reject."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Any
"""A value of JSON, as it was read or can be written: a text, number, list or object, or None."""
JsonObject: TypeAlias = dict[str, Json]
"""A JSON object: a configuration, a profile or an event, for instance."""
JsonMapping: TypeAlias = Mapping[str, Json]
"""A ``JsonObject`` that is only read."""


def dumps(
    value: object, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True
) -> str:
    """Returns a value as JSON; numbers that are not finite become null.

    Args:
      value: Mappings, sequences, texts and numbers, including numpy's; other values become texts.
      indent: Spaces per level; None: all on one line.
      sort_keys: Whether keys are sorted.
      ensure_ascii: Whether non-ASCII characters are escaped.
    """

    def text(value: object) -> str:
        return json.dumps(
            value, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii,
            allow_nan=False, default=_default,
        )  # fmt: skip

    try:
        return text(value)
    except ValueError:  # rare: checking every number first would take longer than writing it
        return text(plain(value))


def plain(value: object) -> Json:
    """Returns a value as read from its JSON: None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | int | None):
        return value
    return plain(_default(value))


def _default(value: object) -> Json:
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and jax
        return value.tolist()
    return str(value)
