"""Names of the sinks that ``run.sinks`` lists."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipar_jax.config.texts import split_list
from pipar_jax.errors import ConfigError

TENSORBOARD = "tensorboard"


def sink_names(text: str) -> Sequence[str]:
    """Parses a list of sinks.

    Raises:
      ConfigError: A name is neither known nor of the form MODULE:FUNCTION.
    """
    names = split_list(text)
    for name in names:
        if name != TENSORBOARD and not re.fullmatch(r"[\w.]+:\w+", name):
            raise ConfigError(
                f"run.sinks={text!r} is not valid: {name!r} is neither {TENSORBOARD} nor a "
                "function MODULE:FUNCTION"
            )
    return names
