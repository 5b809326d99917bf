"""What a run leaves behind: ``runs/<name>/`` with metrics, trace, plan and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipar_jax import config
from pipar_jax.config import Config, membership_script
from pipar_jax.config.checkpoints import WEIGHTS
from pipar_jax.disk.event_log import Event, EventLog
from pipar_jax.disk.files import make_folder, refused, unused, write_text
from pipar_jax.disk.json_text import JsonMapping, JsonObject, dumps
from pipar_jax.errors import DiskError, RunError
from pipar_jax.training import checkpoint
from stages.trees import Arrays

CONFIG, METRICS, TRACE, PLAN = "config.json", "metrics.jsonl", "trace.json.gz", "plan.json"


class RunFolder:
    """Writes a run's files.

    Args:
      path: The folder; made if it does not exist.
      rows: The events so far of a run that goes on; None for a new one.
      script: Its attempts at rounds so far, likewise.

    Raises:
      DiskError: It cannot be written.
      RunError: It has another run in it.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[JsonMapping] | None = None,
        script: Sequence[JsonMapping] | None = None,
    ) -> None:
        self.path = make_folder(path)
        self._events = EventLog(path / METRICS, rows)
        self._membership = EventLog(path / membership_script.FILE, script)

    def save_config(self, resolved: Config) -> None:
        """Writes the resolved configuration.

        Raises:
          DiskError: It cannot be written.
        """
        write_text(self.path / CONFIG, config.to_json(resolved))

    def save_plan(self, plan: JsonMapping) -> None:
        """Writes the plan that the run executes.

        Raises:
          DiskError: It cannot be written.
        """
        write_text(self.path / PLAN, dumps(plan, indent=2) + "\n")

    def add_event(self, event: Event) -> None:
        """Appends a row to metrics.jsonl.

        Raises:
          DiskError: It cannot be written.
        """
        self._events.add(event)

    def add_attempt(self, attempt: JsonMapping) -> None:
        """Appends a row to membership.jsonl.

        Raises:
          DiskError: It cannot be written.
        """
        self._membership.add(attempt)

    def save_weights(
        self, params: Mapping[str, Arrays], state: Mapping[str, Arrays], meta: JsonMapping
    ) -> None:
        """Writes the weights and batch statistics of the whole model.

        Raises:
          DiskError: They cannot be written.
        """
        checkpoint.save(self.path / WEIGHTS, params, state, meta)

    def put_weights_away(self) -> None:
        """Gives weights that are there another name: the run goes on, and they are of before.

        Whoever reads the weights of a run takes its newest checkpoint until it is over again. Those
        of after 10 rounds are ``weights-10.safetensors`` then.

        Raises:
          DiskError: They cannot be renamed.
        """
        path = self.path / WEIGHTS
        if not path.exists():
            return
        rounds: int | None = None
        with contextlib.suppress(RunError):  # damaged, but the user's
            rounds = checkpoint.facts(path).get("rounds")
        with refused(path):
            name = f"{path.stem}-{'before' if rounds is None else rounds}"
            path.rename(unused(self.path, name, path.suffix))


class Record:
    """Keeps what a run tells of itself, and lets the run go on where it cannot.

    Before training begins a disk that takes nothing ends the run. Later the weights are worth more
    than their history: what is not kept is told once, and at the run's end.

    Args:
      folder: Where events go.
      unkept: Kinds of events that are not kept.
    """

    def __init__(self, folder: RunFolder, unkept: Collection[str] = ()) -> None:
        self._folder, self._unkept = folder, frozenset(unkept)
        self._training = False
        self._left_out = 0
        self._first: DiskError | None = None

    def keeps(self, event: Event) -> bool:
        """Returns whether an event is of a kind that is kept."""
        return event["event"] not in self._unkept

    def add(self, event: Event) -> JsonObject | None:
        """Learns of an event, and keeps it if it is of a kind that is kept.

        Returns:
          The event that says that something is not kept from now on, the first time; else None.

        Raises:
          DiskError: It cannot be kept and training has not begun.
        """
        self._training = self._training or event["event"] == "run_started"
        if not self.keeps(event):
            return None
        try:
            self._folder.add_event(event)
        except DiskError as error:
            if not self._training:
                raise
            self._left_out += 1
            return self.note(error)
        return None

    def note(self, error: DiskError) -> JsonObject | None:
        """Notes that something could not be kept; returns what to tell of it, the first time."""
        if self._first is not None:
            return None
        self._first = error
        return {"event": "not_kept", "reason": str(error)}

    def check(self) -> None:
        """Says, once the weights are saved, that something was not kept.

        Raises:
          DiskError: Something was not.
        """
        if self._first is None:
            return
        rows = f"{self._left_out} rows of {METRICS}" if self._left_out else "the trace"
        raise DiskError(
            f"the run is over and {self._folder.path / WEIGHTS} is saved, but "
            f"{rows} could not be kept: {self._first}"
        ) from self._first
