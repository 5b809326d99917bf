"""Destinations of a run's events in addition to metrics.jsonl: TensorBoard, or your own function.

``run.sinks`` lists them, separated by commas: ``tensorboard`` or ``MODULE:FUNCTION``. The function
is called once, on the server, with the run's folder, and returns an object with the methods of
``Sink``::

    class Printer:
        def write(self, event):
            if event["event"] == "evaluated":
                print(event["epoch"], event["metrics"]["accuracy"])

        def close(self): ...

    def make(folder):
        return Printer()
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipar_jax.config import plugins
from pipar_jax.config.sink_names import TENSORBOARD, sink_names
from pipar_jax.disk.event_log import Event
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError, RunError

_LINK_SCALARS = ("bytes", "queue_s", "credit_wait_s")


class Sink(Protocol):
    """Receives the events of a run; called from several threads, one at a time."""

    def write(self, event: Event) -> None:
        """Receives an event, in the form of metrics.jsonl."""

    def close(self) -> None:
        """Closes the sink; called however the run ended."""


class TensorBoard:
    """Writes event files for TensorBoard into ``tensorboard/`` in the run's folder.

    A step of TensorBoard is a round. Scalars are loss and metrics, seconds, idle shares and links.

    Args:
      folder: The run's folder.

    Raises:
      ConfigError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the event file."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "run.sinks='tensorboard' needs tensorboardX, which is not installed: "
                "pip install 'pipar-jax[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(logdir=str(folder / TENSORBOARD), flush_secs=10)

    def write(self, event: Event) -> None:
        """Writes the scalars of an event."""
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event["round"] + 1)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def scalars(event: Event) -> dict[str, float]:
    """Returns the scalars of an event by names such as ``idle/server``."""
    if event["event"] == "evaluated":
        scalars = {"test/loss": event["loss"]}
        scalars.update({f"test/{name}": value for name, value in event["metrics"].items()})
    elif event["event"] == "round_finished":
        scalars = _round_scalars(event)
    else:
        return {}
    return {name: value for name, value in scalars.items() if value is not None}  # not finite


def _round_scalars(event: Event) -> JsonObject:
    """Returns the scalars of a round."""
    seconds = event["seconds"]
    scalars = {
        "train/loss": event["loss"],
        **{f"train/{name}": value for name, value in event["metrics"].items()},
        "round/seconds": seconds,
        "round/samples_per_s": event["samples"] / seconds,
        "round/epoch": event["epoch"],
    }
    scalars.update({f"idle/{host}": share for host, share in event["idle"].items()})
    for row in event["links"]:
        way = f"{row['source']}-{row['target']}"
        scalars.update({f"{key}/{way}": row[key] for key in _LINK_SCALARS})
    return scalars


class Sinks:
    """All sinks of a run; a context manager that closes them.

    Args:
      text: The field ``run.sinks``.
      folder: The run's folder.

    Raises:
      ConfigError: A sink is unknown or cannot be created.
    """

    def __init__(self, text: str, folder: Path) -> None:
        """Creates the sinks."""
        self._sinks: list[tuple[str, Sink]] = []
        try:
            for name in sink_names(text):
                self._sinks.append((name, _make(name, folder)))
        except BaseException as error:
            self._close_after(error)
            raise

    def write(self, event: Event) -> None:
        """Passes an event to each sink.

        Raises:
          RunError: A sink failed.
        """
        for name, sink in self._sinks:
            with plugins.guarded(f"{_what(name)} failed", RunError):
                sink.write(event)

    def close(self) -> None:
        """Closes all sinks, even if one of them fails.

        Raises:
          RunError: A sink failed; the error is that of the first.
        """
        errors = []
        for name, sink in self._sinks:
            try:
                with plugins.guarded(f"{_what(name)} failed", RunError):
                    sink.close()
            except RunError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _close_after(self, error: BaseException) -> None:
        """Closes all sinks; a failure becomes a note of the original error."""
        try:
            self.close()
        except RunError as late:
            error.add_note(str(late))

    def __enter__(self) -> Sinks:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes the sinks."""
        if error is None:
            self.close()
        else:
            self._close_after(error)


def _what(name: str) -> str:
    return f"the sink {name} of run.sinks"


def _make(name: str, folder: Path) -> Sink:
    """Creates a sink."""
    if name == TENSORBOARD:
        return TensorBoard(folder)
    made: Sink = plugins.find(name, _what(name), ConfigError)(folder)
    if not all(callable(getattr(made, method, None)) for method in ("write", "close")):
        raise ConfigError(
            f"{_what(name)} must be an object with write(event) and close(), got "
            f"{type(made).__name__}"
        )
    return made
