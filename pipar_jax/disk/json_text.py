"""JSON as everything here is written: never a bare NaN or Infinity, which no other reader takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(
    value: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True
) -> str:
    """Returns a value's JSON text; a number that is not finite is written as null.

    Args:
      value: Mappings, sequences, texts and numbers, also numpy's; anything else as its text.
      indent: Spaces by which each level is set in; None: all on one line.
      sort_keys: Whether keys are sorted.
      ensure_ascii: Whether other characters are escaped.
    """

    def text(value: Any) -> str:
        return json.dumps(
            value, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii,
            allow_nan=False, default=_default,
        )  # fmt: skip

    try:
        return text(value)
    except ValueError:  # rare: looking at every number first would take longer than writing it
        return text(plain(value))


def plain(value: Any) -> Any:
    """Returns a value as a reader of its JSON gets it: None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, str | int | None):
        return value
    return plain(_default(value))


def _default(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's numbers and arrays, and jax's
        return value.tolist()
    return str(value)
