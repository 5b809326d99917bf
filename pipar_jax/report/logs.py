"""The log of a host's process: one line with a time stamp per event."""

from __future__ import annotations

import logging
import sys

from pipar_jax.disk.event_log import Event, OnEvent

#: Parent of all loggers of this project.
LOG = logging.getLogger("pipar_jax")
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s"
_DATE = "%Y-%m-%dT%H:%M:%S"
#: Events that are too frequent for a log.
_OFTEN = ("progress", "working")


def begin() -> None:
    """Sends log records to standard error, which is redirected to the process's log file."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    LOG.setLevel(logging.INFO)


def begin_plain() -> None:
    """Sends warnings to standard error as their bare text, for whoever reads them as they come.

    A library such as absl may have set up records that begin with a time and a line of its source.
    """
    handler = logging.lastResort  # it looks for standard error anew, which a live view replaces
    logging.getLogger().handlers[:] = [handler] if handler else []


def note_event(event: Event) -> None:
    """Logs an event: its name, all fields that are numbers or texts, and its metrics."""
    kind = event["event"]
    if kind in _OFTEN:
        return
    facts = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in {**event, **event.get("metrics", {})}.items()
        if name not in ("event", "time_s") and isinstance(value, int | float | str)
    ]
    LOG.info("%s", " ".join([kind, *facts]))


class EventHandler(logging.Handler):
    """Tells whoever started this process of a log's warnings, by its events.

    Args:
      host: The host in this process.
      tell: Takes events.
    """

    def __init__(self, host: str, tell: OnEvent) -> None:
        super().__init__(logging.WARNING)
        self._host, self._tell = host, tell

    def emit(self, record: logging.LogRecord) -> None:
        """Tells of a record."""
        self._tell({"event": "warning", "host": self._host, "text": record.getMessage()})


class WithoutTpu(logging.Filter):
    """Filters jax's messages about a missing TPU that was not requested."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record is logged."""
        return "tpu" not in record.getMessage().lower()


def leave_out_tpu() -> None:
    """Suppresses jax's messages about missing TPUs when it looks for accelerators."""
    logger = logging.getLogger("jax._src.xla_bridge")
    if not any(isinstance(known, WithoutTpu) for known in logger.filters):
        logger.addFilter(WithoutTpu())
