"""When a run ends before its last round: a score reached, no better one for long, or your word."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pipar_jax.config import StopConfig
from pipar_jax.config.plugins import find
from pipar_jax.disk.event_log import score_of
from pipar_jax.errors import RunError


class StopRule:
    """Follows a run's events.

    Attributes:
      reason: Why the run is to end, in words; None while it goes on.

    Args:
      config: ``stop.*``.
      metric: The score that counts.
      higher_is_better: Whether higher values of it are better.

    Raises:
      RunError: The user's own function cannot be found.
    """

    def __init__(self, config: StopConfig, metric: str, higher_is_better: bool) -> None:
        self._config, self._metric = config, metric
        self._sign = 1.0 if higher_is_better else -1.0
        self._best: float | None = None
        self._since = 0
        self.reason: str | None = None
        self._when: Callable[..., Any] | None = None
        if config.when:
            self._when = find(config.when, f"the function {config.when} of stop.when", RunError)

    def add(self, event: Mapping[str, Any], *, past: bool = False) -> None:
        """Takes an event.

        Args:
          event: The event.
          past: Whether it is one of a run that is resumed: it counts, but ends nothing.

        Raises:
          RunError: The user's own function failed, or returned neither true nor false.
        """
        found = self._own(event) or (self._score(event) if event["event"] == "evaluated" else None)
        if self.reason is None and not past:
            self.reason = found

    def _own(self, event: Mapping[str, Any]) -> str | None:
        if self._when is None:
            return None
        said = self._when(dict(event))
        if said is not None and type(said) is not bool:
            raise RunError(
                f"the function {self._config.when} of stop.when returned "
                f"{str(said)[:80]!r} for an event {event['event']!r}, expected True or False"
            )
        return f"{self._config.when} of stop.when returned true" if said else None

    def _score(self, event: Mapping[str, Any]) -> str | None:
        metric, target, sign = self._metric, self._config.target, self._sign
        score = score_of(event, metric)
        value = -sign * math.inf if score is None or math.isnan(score) else score
        if self._best is None or sign * value > self._best:
            self._best, self._since = sign * value, 0
        else:
            self._since += 1
        if target is not None and sign * value >= sign * target:
            return f"{metric} {value:.4g} has reached stop.target={target:g}"
        if self._config.patience and self._since >= self._config.patience:
            return (
                f"{metric} has not been better than {sign * self._best:.4g} for "
                f"stop.patience={self._config.patience} evaluations"
            )
        return None
