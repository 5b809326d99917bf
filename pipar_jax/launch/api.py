"""The public API: trains from a configuration and loads finished runs."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

import stages
from comms.arrays import Array
from pipar_jax import config as configuration
from pipar_jax import data as datasets
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import WEIGHTS
from pipar_jax.config.plugins import OWN, name_of
from pipar_jax.config.tasks import make_task
from pipar_jax.data import ArrayOrDict, Dataset, Examples, make_queries, normalise
from pipar_jax.disk.event_log import OnEvent, read_events, score_of
from pipar_jax.disk.files import describe_reading
from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import PeerError, ProtocolError, RunError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import check_plan, resolve
from pipar_jax.protocol.values import SIGNATURE
from pipar_jax.roles.participants import run_device, run_node
from pipar_jax.roles.run_folder import CONFIG, METRICS, TRACE
from pipar_jax.roles.server import run_server
from pipar_jax.runtime.setup import as_trained, build_model, target_rule
from pipar_jax.schedule.plan import COORDINATOR, device_name, host_index
from pipar_jax.schedule.trace import Trace
from pipar_jax.training import checkpoint
from stages import Model
from stages.signature import INPUT, Signature
from stages.tasks.task import LOSS
from stages.trees import Variables

#: The data of one host: a pair of inputs and targets, each an array or a dictionary of arrays.
Data: TypeAlias = tuple[ArrayOrDict, ArrayOrDict] | Examples | Dataset


@dataclasses.dataclass(frozen=True)
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
    """

    folder: Path
    config: Config
    model: Model
    params: Variables
    state: Variables
    metrics: tuple[JsonObject, ...]
    facts: JsonObject

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
            or floats scaled like the training data; or arrays by name, ``x`` and side inputs.

        Raises:
          DataError: There is no sample, or shape, dtype or a value is not valid.
        """
        mean, std = (
            None if self.facts[name] is None else np.asarray(self.facts[name], np.float32)
            for name in ("mean", "std")
        )
        signature = self.model.signature
        given = make_queries(inputs, signature, self.facts["stored"])
        x = normalise(given.pop(INPUT), mean, std)
        sides = {name: jnp.asarray(one, signature.sides[name].dtype) for name, one in given.items()}
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


def load(folder: str | Path, model: Model | None = None) -> Run:
    """Reads a finished run.

    Args:
      folder: The run's folder, such as ``runs/digits``.
      model: The model, if the run was trained with one of the user's own.

    Raises:
      RunError: A file is missing or belongs to another model, or the run's model was the user's own
        and is not given.
    """
    path, model = Path(folder), _as_model(model, "load")
    try:
        config = configuration.from_json((path / CONFIG).read_text(encoding="utf-8"))
        metrics = read_events(path / METRICS)
    except OSError as error:
        raise RunError(f"{path} is not the folder of a run: {describe_reading(error)}") from error
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
    params, state = checkpoint.load(path / WEIGHTS, model)
    return Run(path, config, model, params, state, metrics, facts)


def _as_model(model: object, function: str) -> Model | None:
    """Returns a model that was given, or None."""
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


def train(
    config: Config,
    model: Model | Callable[..., Any] | None = None,
    data: Sequence[Data] | Callable[..., Any] | None = None,
    *,
    on_event: OnEvent | None = None,
) -> Run:
    """Trains with all hosts on this machine and returns the finished run.

    With a configured model and configured data each host is a process. So it is with functions of
    yours that can be imported by name: they stand for ``model.name`` and ``data.source`` with
    ``module:NAME:FUNCTION``. With a model or data that are objects all hosts are threads of this
    process, since objects cannot be passed to another process; they still communicate over TCP on
    the loopback interface.

    Args:
      config: The configuration, which is resolved here.
      model: Your own model, or a function that makes it (see ``runtime.own_model.make_own``).
      data: Your own data: for each device, and last for the test, a pair (inputs, targets) of
        arrays [samples, …]. Inputs may be a dictionary: ``x`` flows through the network, all others
        are side inputs; so may targets. ``data.source`` is not read then, and ``data.classes`` is
        the number of classes, or the vocabulary, where data do not say it. Where normalisation is
        wanted, give a ``Dataset``, of which each device uses the training split and the server the
        test split. Or a function that returns the data of a host (see ``data.own.load_own``).
      on_event: Called with each event as it happens.

    Raises:
      ConfigError: The configuration is not valid, or a function cannot be imported by name.
      DataError: Data or model are not valid or do not match; nothing was started.
      PiparError: The run failed.
    """
    if not isinstance(config, Config):
        resolve(config)  # raises
    if callable(model) and hasattr(model, "__qualname__"):  # a function or class, not a network
        named = dataclasses.replace(config.model, name=name_of(model, "model"))
        config, model = dataclasses.replace(config, model=named), None
    if callable(data):
        source = dataclasses.replace(config.data, source=name_of(data, "data"))
        config, data = dataclasses.replace(config, data=source), None
    model = _as_model(model, "train")
    names = () if model is None else (config.model.name,)
    resolved = resolve(config, models=names, reads_data=data is None)
    if model is not None:
        model = as_trained(resolved, model)
        check_plan(resolved, model.unit_names)
    tell = on_event or (lambda event: None)
    if model is None and data is None:
        from pipar_jax.launch.launcher import launch

        return load_configured(resolved, Path(launch(resolved, on_event=tell)["folder"]), None)
    return load(run_here(resolved, model, data, on_event=tell), model)


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


def run_here(
    config: Config,
    model: Model | None = None,
    data: Sequence[Data] | None = None,
    *,
    on_event: OnEvent,
) -> Path:
    """Runs server and devices as threads of this process; returns the run's folder.

    The folder is new: if the name is taken, a number is appended, as on the command line. Links and
    slowdowns are emulated; processes are not pinned to cores.

    Args:
      config: Resolved configuration.
      model: The model, if not the configured one.
      data: See ``train``.
      on_event: Called with each event as it happens.

    Raises:
      DataError: Data or model are not valid or do not match; nothing was started.
      PiparError: The run failed; of several hosts' errors, the first that is not about a peer.
    """
    from pipar_jax.launch.run_folders import hold_folder

    own = _admit(config, model, data)
    # A copy: its name becomes that of the folder, and that of the model the model's own.
    of_model = config.model if model is None else dataclasses.replace(config.model, name=model.name)
    config = dataclasses.replace(config, model=of_model)
    with hold_folder(config) as held, _Roles(config, model, on_event) as roles:
        roles.start("server", run_server, on_event=roles.tell, data=own[-1])
        address = roles.listening.get()
        if address is not None:
            for name in hosts_of(config).nodes:
                roles.start(name, run_node, host_index(name), address)
            for index in range(config.devices.count):
                roles.start(device_name(index), run_device, index, address, data=own[index])
    return held.path


class _Roles:
    """The roles of a run as threads of this process; leaving the block waits for all of them.

    Args:
      config: Resolved configuration.
      model: The model, if not the configured one.
      on_event: Takes the server's events.

    Attributes:
      listening: Gets the server's address, or None if it failed before.
    """

    def __init__(self, config: Config, model: Model | None, on_event: OnEvent) -> None:
        self._config, self._model, self._on_event = config, model, on_event
        self._stop, self._threads = threading.Event(), list[threading.Thread]()
        self._errors: list[BaseException] = []
        self.listening: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

    def __enter__(self) -> _Roles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Joins all threads, and raises the first error that is not a consequence of another."""
        if kind is not None:
            self._stop.set()
        try:
            self._join()
        except BaseException:  # Ctrl-C
            self._stop.set()
            self._join()
            raise
        if kind is None and self._errors:
            raise min(self._errors, key=_rank)

    def start(self, name: str, function: Callable[..., Any], *args: Any, **values: Any) -> None:
        """Starts a role as a thread."""
        role = functools.partial(
            function, self._config, *args, model=self._model, stop=self._stop, **values
        )
        thread = threading.Thread(target=self._guarded, args=(role,), name=f"pipar-{name}")
        self._threads.append(thread)
        thread.start()

    def tell(self, event: JsonObject) -> None:
        """Takes an event of the server."""
        if event["event"] == "listening":
            self.listening.put((event["host"], event["port"]))
        self._on_event(event)

    def _guarded(self, role: Callable[[], Any]) -> None:
        try:
            role()
        except BaseException as error:  # raised where the threads are joined
            self._errors.append(error)
            self._stop.set()
            self.listening.put(None)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


def _rank(error: BaseException) -> int:
    """Returns the rank of an error among several: lost peers are consequences of other errors."""
    if isinstance(error, ProtocolError):
        return 0
    return 2 if isinstance(error, PeerError) else 1


def _admit(config: Config, model: Model | None, data: Sequence[Data] | None) -> Sequence[Dataset]:
    """Returns the dataset of every device and, last, of the server, checked against the model."""
    hosts = [*(device_name(index) for index in range(config.devices.count)), COORDINATOR]
    rule = target_rule(config, model)
    if data is None:
        devices = range(config.devices.count)
        loaded = [datasets.load_device(config, index, rule) for index in devices]
        own = [*loaded, datasets.load_server(config, rule)]
    elif not isinstance(data, list | tuple) or len(data) != len(hosts):
        got = f"{len(data)} datasets" if isinstance(data, list | tuple) else type(data).__name__
        raise RunError(
            f"train() got {got} for {config.devices.count} devices: give one per device and the "
            "one for the test last, each a pair (inputs, targets)"
        )
    else:
        classes, tests = config.data.classes, config.run.evaluate_on != "server"
        own = [
            datasets.admit(one, "test", host, rule, classes)
            if host == COORDINATOR
            else datasets.admit_device(one, host, rule, classes, tests=tests)
            for host, one in zip(hosts, data, strict=True)
        ]
    if model is None:
        datasets.check_alike(zip(reversed(hosts), reversed(own), strict=True))
    else:
        for host, one in zip(hosts, own, strict=True):
            datasets.check_fits(one, model.signature, host)
    return own
