"""A device's or node's side of the survey: it measures what it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from comms import Link, Message
from comms.arrays import Array
from pipar_jax.config import Config, HostSpec
from pipar_jax.profiling.unit_times import as_configured, emulated, measure_host, measure_reference
from pipar_jax.protocol import messages, registry
from pipar_jax.training.compile import TOLD_S, now_and_then
from stages import Model


class Respondent:
    """A device's or node's side: performs the requests and reports the results.

    Args:
      config: The host's resolved configuration.
      own: The host.
      model: The whole model.
      between: Called between measurements, to detect that they are no longer wanted.
    """

    def __init__(
        self, config: Config, own: HostSpec, model: Model, between: Callable[[], None]
    ) -> None:
        self._config, self._model, self._between = config, model, between
        self._own = own
        self._first_s: float | None = None

    def profile(self, question: messages.SurveyProfile, link: Link) -> None:
        """Answers with units' times."""
        registry.send(link, messages.Working("timing", 0, 0))
        told = now_and_then(
            lambda done, of: registry.send(link, messages.Working("timing", done, of)), TOLD_S
        )
        in_turns = not self._own.slowdown.emulated
        found = measure_host(
            self._config, self._model, question.sizes, self._between, told, in_turns
        )
        host = as_configured(found.host, self._own)
        registry.send(link, messages.Profiled(host, found.units, found.seconds))

    def reference(self, link: Link) -> None:
        """Answers with the times of reference layers."""
        registry.send(link, messages.Working("timing", 0, 0))
        config = self._config
        measured = measure_reference(
            config.optimizer, config.aggregation, config.seed, self._between
        )
        times = emulated(measured, self._own.slowdown)
        fields = {one.name: getattr(times, one.name) for one in dataclasses.fields(times)}
        registry.send(link, messages.Referenced(**fields, memory_bytes=self._own.memory_bytes))

    def echo(self, link: Link) -> None:
        """Answers at once."""
        registry.send(link, messages.Echoed())

    def send(self, question: messages.SurveySend, link: Link) -> None:
        """Answers with bytes."""
        for tensors in two_bundles(question.nbytes):
            registry.send_bundle(link, messages.SurveyBytes(), tensors)

    def take(self, message: Message) -> None:
        """Receives a bundle of two; answers after the second with the time since the first."""
        message.release()
        if self._first_s is None:
            self._first_s = message.received_s
            return
        seconds, self._first_s = message.received_s - self._first_s, None
        registry.send(message.link, messages.Took(max(seconds, 0.0)))


def two_bundles(nbytes: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns a small bundle and a bundle of some bytes, to be sent right behind it.

    Args:
      nbytes: Bytes of the second one.
    """
    return {"bytes": np.zeros(1024, np.uint8)}, {"bytes": np.zeros(nbytes, np.uint8)}
