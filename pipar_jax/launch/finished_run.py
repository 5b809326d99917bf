"""A finished run, read from its folder: weights, scores, predictions."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import stages
from comms.arrays import Array
from pipar_jax import config as configuration
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import HOST_STATES, PERSONAL, WEIGHTS, rounds_kept
from pipar_jax.config.plugins import OWN
from pipar_jax.config.tasks import make_task
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data import make_queries, normalise
from pipar_jax.data.types import computed
from pipar_jax.disk.event_log import read_events, score_of
from pipar_jax.disk.files import describe_reading
from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import RunError
from pipar_jax.protocol.values import SIGNATURE
from pipar_jax.roles.run_folder import CONFIG, METRICS, TRACE
from pipar_jax.runtime.personal import run_of
from pipar_jax.runtime.setup import build_model
from pipar_jax.schedule.plan import device_name, long_name
from pipar_jax.schedule.trace import Trace
from pipar_jax.training import checkpoint
from stages import Model
from stages.signature import INPUT, Signature
from stages.tasks.task import LOSS
from stages.trees import Variables


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A finished run, as read from its folder.

    Attributes:
      folder: The run's folder.
      config: Its resolved configuration.
      model: The whole model.
      params: Weights by unit and path.
      state: Batch statistics by unit and path.
      metrics: Every event of the run, in order.
      facts: Facts about the model and its data, such as classes and normalisation.
      personal: Names (unit/path) of the weights that ``params`` does not have, since each device
        keeps its own; ``load(folder, device=…)`` reads those of a device.
    """

    folder: Path
    config: Config
    model: Model
    params: Variables
    state: Variables
    metrics: tuple[JsonObject, ...]
    facts: JsonObject
    personal: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Returns what it is of: the values of weights and events are many lines."""
        return f"Run({str(self.folder)!r}, {self.config.method}, {self.model.name})"

    def score(self, name: str = "") -> float:
        """Returns a score on the test set after the last round; NaN if it is not finite.

        Args:
          name: ``loss`` or a metric of the run's task; empty: the task's main score.

        Raises:
          RunError: The task has no such score.
        """
        event, name = self._last("evaluated"), name or self.model.task.main
        if name != LOSS and name not in event["metrics"]:
            known = ", ".join([*event["metrics"], LOSS])
            raise RunError(f"{self.folder} has no score {name!r} (known: {known})")
        value = score_of(event, name)
        return float("nan") if value is None else value

    @property
    def summary(self) -> JsonObject:
        """The event ``run_finished``: seconds, idle shares, bytes."""
        return self._last("run_finished")

    def trace(self) -> Trace:
        """Returns the timed actions of the run.

        Raises:
          RunError: The run has no trace (``run.trace=none``).
        """
        return Trace.load(self.folder / TRACE)

    def outputs(self, inputs: Any) -> Array:
        """Returns the model's outputs [batch, …] for raw inputs, such as logits.

        Args:
          inputs: [batch, …] as stored, of the dtype that the run was trained on: images as uint8,
            or floats scaled like the training data; or arrays by name, ``x`` and side inputs. With
            ``data.pad_to`` they are padded to its longest length, or are lists of sequences.

        Raises:
          DataError: There is no sample, or shape, dtype or a value is not valid.
          RunError: Personal weights are missing.
        """
        if self.personal:
            raise RunError(
                f"{self.folder} has the shared weights alone, and {', '.join(self.personal[:3])} "
                "are each device's own: load(folder, device=0) reads those of device 0"
            )
        mean, std = (
            None if self.facts[name] is None else np.asarray(self.facts[name], np.float32)
            for name in ("mean", "std")
        )
        signature = self.model.signature
        pad_to = whole_numbers(self.config.data.pad_to)
        given = make_queries(inputs, signature, self.facts["stored"], max(pad_to, default=0))
        x = computed(normalise(given.pop(INPUT), mean, std), self.config.model.weight_dtype)
        sides = {
            name: jnp.asarray(side, signature.sides[name].dtype) for name, side in given.items()
        }
        return np.asarray(
            stages.predict(self.model, self.params, self.state, jnp.asarray(x), sides)
        )

    def predict(self, inputs: Any) -> Array:
        """Returns what the task makes of the outputs, such as the most likely class.

        See ``outputs``.

        Raises:
          DataError: There is no sample, or shape, dtype or a value is not valid.
        """
        answer: Array = self.model.task.answer(self.outputs(inputs))
        return answer

    def _last(self, event: str) -> JsonObject:
        for row in reversed(self.metrics):
            if row["event"] == event:
                return dict(row)
        raise RunError(f"{self.folder} has no {event!r} in {METRICS}: the run did not finish")


def load(folder: str | Path, model: Model | None = None, *, device: int | None = None) -> Run:
    """Reads a finished run.

    Args:
      folder: The run's folder, such as ``runs/digits``.
      model: The model, if the run was trained with one of the user's own.
      device: The device whose personal weights complete those that are shared (see
        ``aggregation.personal``); None: the shared weights alone.

    Raises:
      RunError: The run is not over, a file is missing or belongs to another model, the run's model
        was the user's own and is not given, or the device has no personal weights here.
    """
    path, model = Path(folder), as_model(model, "load")
    try:
        config = configuration.from_json((path / CONFIG).read_text(encoding="utf-8"))
        metrics = read_events(path / METRICS)
    except OSError as error:
        raise RunError(f"{path} is not the folder of a run: {describe_reading(error)}") from error
    if not (path / WEIGHTS).exists() and (kept := rounds_kept(path)):
        raise RunError(
            f"{path} is not over and has no {WEIGHTS} yet: go on with it (run.resume=auto), or "
            f"take the weights of its newest checkpoint, that after {kept[-1]} rounds (pipar "
            "export, or another run's model.weights)"
        )
    facts = checkpoint.facts(path / WEIGHTS)
    if model is None:
        if facts["recipe"] is None:
            raise RunError(
                f"{path} was trained with your own model {facts['model']!r}: pass it, as "
                "load(folder, model)"
            )
        model = stages.build(**facts["recipe"])
    if not model.has_task:
        model = model.for_task(make_task(config.task))
    model = model.unfrozen  # the file holds all weights
    _check_model(model, facts, path)
    tensors, personal = checkpoint.read_tensors(path / WEIGHTS), tuple(facts.get("personal", ()))
    if device is not None:
        tensors |= _personal_tensors(path, personal, device, facts.get("run"))
        personal = ()
    params, state = checkpoint.sort_tensors(tensors, model, path / WEIGHTS, without=personal)
    return Run(path, config, model, params, state, metrics, facts, personal)


def _personal_tensors(
    path: Path, personal: tuple[str, ...], device: int, run: str | None
) -> dict[str, Array]:
    """Returns the personal weights of a device by name, those that belong to a run.

    Raises:
      RunError: There are none in the run's folder, or not these.
    """
    if not personal:
        raise RunError(
            f"{path} has no personal weights (aggregation.personal): leave out device={device}"
        )
    file = path / HOST_STATES / device_name(device) / PERSONAL
    if not os.path.isfile(file):
        raise RunError(
            f"{file} is not there: {long_name(device_name(device))} has taken part in no round, or "
            "wrote it into the run's folder on its own machine; then copy it"
        )
    tensors = checkpoint.read_tensors(file)
    if run_of(file) != run:
        raise RunError(
            f"{file} is of another run, whose devices used the same folder: look for that of this "
            f"run beside it, or where {long_name(device_name(device))} ran"
        )
    if tensors.keys() != set(personal):
        raise RunError(
            f"{file} has {', '.join(sorted(tensors)[:3])}, expected {', '.join(personal[:3])}: it "
            "is of another run"
        )
    return tensors


def load_configured(config: Config, folder: Path, model: Model | None) -> Run:
    """Returns a run that has just finished, with the network that its configuration names.

    Args:
      config: Resolved configuration.
      folder: The run's folder.
      model: The model, if not the configured one.
    """
    if model is None and config.model.name.startswith(OWN):
        facts = checkpoint.facts(folder / WEIGHTS)
        model = build_model(config, _signature(facts))
    return load(folder, model)


def as_model(model: object, function: str) -> Model | None:
    """Returns a model that was given, or None.

    Args:
      model: What was given.
      function: The name of the function that got it, for the message.

    Raises:
      RunError: It is not a model.
    """
    if model is None or isinstance(model, Model):
        return model
    got = f"{function}() got a {type(model).__name__} as model"
    raise RunError(f"{got}: convert it to a stages.Model with stages.trace(model, example)")


def _check_model(model: Model, facts: JsonMapping, path: Path) -> None:
    """Checks that a model has the input shape and classes of the trained one."""
    trained, ours = _signature(facts), model.signature
    if (ours.input, ours.sides, ours.classes) != (trained.input, trained.sides, trained.classes):
        raise RunError(
            f"{path} was trained with model {facts['model']!r} of samples {trained} and "
            f"{trained.classes} classes, and {model.name!r} has {ours} and {ours.classes}: load it "
            "with the model that it was trained with"
        )


def _signature(facts: JsonMapping) -> Signature:
    """Returns shapes and dtypes of the samples that a model was trained with."""
    signature: Signature = SIGNATURE.read(facts["signature"], "signature")
    return signature
