"""The public API: trains from a configuration, on this machine."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pipar_jax import data as datasets
from pipar_jax.config import Config
from pipar_jax.config.plugins import name_of
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data import ArrayOrDict, Dataset, Examples
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import PeerError, ProtocolError, RunError
from pipar_jax.launch.finished_run import Run, as_model, load, load_configured
from pipar_jax.methods.personal_checks import check_stays
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import check_plan, resolve
from pipar_jax.roles.participants import run_device, run_node
from pipar_jax.roles.server import run_server
from pipar_jax.runtime.setup import as_trained, target_rule
from pipar_jax.schedule.plan import COORDINATOR, device_name, host_index
from stages import Model
from stages.personal import personal_paths

#: The data of one host: a pair of inputs and targets, each an array or a dictionary of arrays.
Data: TypeAlias = tuple[ArrayOrDict, ArrayOrDict] | Examples | Dataset


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
      StageError: The network cannot be made, cut, or trained as configured; nothing was started.
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
    model = as_model(model, "train")
    names = () if model is None else (config.model.name,)
    resolved = resolve(config, models=names, reads_data=data is None)
    if model is not None:
        model = as_trained(resolved, model)
        check_plan(resolved, model.unit_names)
        check_stays(resolved, (), model.unit_names, personal_paths(model))
    tell = on_event or (lambda event: None)
    if model is None and data is None:
        from pipar_jax.launch.launcher import launch

        return load_configured(resolved, Path(launch(resolved, on_event=tell)["folder"]), None)
    return load(run_here(resolved, model, data, on_event=tell), model)


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
      ConfigError: The run cannot have its folder.
      DataError: Data or model are not valid or do not match; nothing was started.
      StageError: The network cannot be made, cut, or trained as configured; nothing was started.
      PiparError: The run failed; of several hosts' errors, the first that is not about a peer.
    """
    from pipar_jax.launch.run_folders import check_place, hold_folder

    check_place(config)
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
        pad_to = whole_numbers(config.data.pad_to)
        own = [
            datasets.admit(given, "test", host, rule, classes, pad_to=pad_to)
            if host == COORDINATOR
            else datasets.admit_device(given, host, rule, classes, tests=tests, pad_to=pad_to)
            for host, given in zip(hosts, data, strict=True)
        ]
    if model is None:
        datasets.check_alike(zip(reversed(hosts), reversed(own), strict=True))
    else:
        for host, admitted in zip(hosts, own, strict=True):
            datasets.check_fits(admitted, model.signature, host)
    return own
