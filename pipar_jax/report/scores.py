"""Scores of a run as text: what its task measures, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipar_jax.disk.event_log import Event, score_of

#: Facts of a run whose task is not known yet.
UNKNOWN: Mapping[str, Any] = {"name": "", "main": "loss", "scores": {}}


def score_text(task: Mapping[str, Any], name: str, value: float | None, digits: int = 1) -> str:
    """Returns a score as text, a share as a percentage.

    Args:
      task: What the event ``run_started`` says of the task.
      name: The score.
      value: Its value; None: not finite.
      digits: Digits behind the point of a percentage.
    """
    if value is None:
        return "not finite"
    if task["scores"].get(name, {}).get("share"):
        return f"{value:.{digits}%}"
    return f"{value:.4g}"


def scores_text(task: Mapping[str, Any], event: Event, *, main: bool = False) -> list[str]:
    """Returns the metrics of an event as texts such as ``accuracy 87.5%``.

    Args:
      task: See ``score_text``.
      event: An event with ``metrics``.
      main: Whether the main score alone is wanted, which may be the loss.
    """
    names = [task["main"]] if main else list(event.get("metrics") or {})
    return [f"{name} {score_text(task, name, score_of(event, name))}" for name in names]


def final_score(summary: Event, digits: int = 2) -> str:
    """Returns the main score on the test set of the event that ends a run."""
    task = summary.get("task", UNKNOWN)
    name = task["main"]
    return f"test {name} {score_text(task, name, score_of(summary, name), digits)}"
