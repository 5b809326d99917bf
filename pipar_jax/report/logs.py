"""What a host's process writes into its log: one line with a time stamp for whatever happens."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

#: All of this project's loggers are below it.
LOG = logging.getLogger("pipar_jax")
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s"
_DATE = "%Y-%m-%dT%H:%M:%S"
#: Happens several times a second.
_OFTEN = ("progress", "working")


def begin() -> None:
    """Sends the lines of this process to its standard error, which is its log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    LOG.setLevel(logging.INFO)


def note_event(event: Mapping[str, Any]) -> None:
    """Writes an event as a line: its name and all of it that is a number or a short text."""
    kind = event["event"]
    if kind in _OFTEN:
        return
    facts = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in event.items()
        if name not in ("event", "time_s") and isinstance(value, int | float | str)
    ]
    LOG.info("%s", " ".join([kind, *facts]))


class WithoutTpu(logging.Filter):
    """Leaves out what jax says of a TPU that nobody asked for: there is hardly ever one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Says whether a line is written."""
        return "tpu" not in record.getMessage().lower()


def leave_out_tpu() -> None:
    """Lets jax look for accelerators without a word of the one that is missing."""
    logger = logging.getLogger("jax._src.xla_bridge")
    if not any(isinstance(one, WithoutTpu) for one in logger.filters):
        logger.addFilter(WithoutTpu())
