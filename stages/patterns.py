"""Weights that a regular expression picks by their names, ``unit/path``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from stages.errors import StageError


def matching(weights: Mapping[str, Iterable[str]], pattern: str) -> dict[str, list[str]]:
    """Returns the paths of each unit's weights in whose names an expression is found.

    Args:
      weights: For each unit the paths of its weights.
      pattern: A regular expression, such as "lora|head".

    Raises:
      StageError: The expression is not valid.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:  # nested too deep; too large a count
        raise StageError(
            f"{pattern[:120]!r} is not a regular expression: {str(error)[:120]}"
        ) from error
    return {
        unit: [path for path in paths if compiled.search(f"{unit}/{path}")]
        for unit, paths in weights.items()
    }
