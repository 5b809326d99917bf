"""What a run leaves behind: ``runs/<name>/`` with metrics, trace, plan and weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comms.errors import explain
from pipar_jax import checkpoint, config
from pipar_jax.config import Config
from pipar_jax.trace import Trace

CONFIG, METRICS, TRACE, PLAN = "config.json", "metrics.jsonl", "trace.json.gz", "plan.json"


class RunFolder:
    """Writes a run's files; an error of the disk names the file that could not be written.

    Args:
      path: The folder; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        """See the class."""
        self.path = path
        with _naming(path):
            path.mkdir(parents=True, exist_ok=True)

    def save_config(self, resolved: Config) -> None:
        """Writes the resolved configuration."""
        with _naming(self.path / CONFIG):
            (self.path / CONFIG).write_text(config.to_json(resolved), encoding="utf-8")

    def save_plan(self, plan: Mapping[str, Any]) -> None:
        """Writes the plan that the run executes."""
        with _naming(self.path / PLAN):
            (self.path / PLAN).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Appends a row to metrics.jsonl; it is on disk when this returns."""
        with _naming(self.path / METRICS), open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def save_trace(self, trace: Trace) -> None:
        """Writes the trace."""
        with _naming(self.path / TRACE):
            trace.save(self.path / TRACE)

    def save_weights(
        self, params: Mapping[str, Any], state: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Writes the weights and batch statistics of the whole model."""
        with _naming(self.path / checkpoint.WEIGHTS):
            checkpoint.save(self.path / checkpoint.WEIGHTS, params, state, meta)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name into errors of the disk, which leave it out when a write fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, explain(error), str(path)) from error
