"""Whole runs in one process whose devices come and go when a test says so."""

from __future__ import annotations

import json
import pathlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from pipar_jax.config.checkpoints import WEIGHTS
from pipar_jax.data import loader as loading
from pipar_jax.errors import PiparError
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.checkpoints import Checkpoints
from pipar_jax.roles.evaluation import Evaluator
from pipar_jax.roles.host_replies import HostReplies
from pipar_jax.roles.participants import run_device, run_node
from pipar_jax.roles.round_results import RoundResults
from pipar_jax.roles.round_start import RoundStart
from pipar_jax.roles.server import run_server
from tests.patience import PATIENCE_S, PROCESS_S
from tests.pipar_jax.runtime import support

#: Samples of each device; mini-batches are of seven.
SAMPLES = (14, 14, 14)


class OpenRun:
    """A server and its devices as threads; ``when`` is called with every event.

    Attributes:
      when: Is called with this object and each event, on the thread that tells it.
      events: What was told.
      error: What ended the server, or None.
      folder: The run's folder.
    """

    def __init__(
        self,
        made: Any,
        samples=SAMPLES,
        when: Callable[..., None] | None = None,
        network: Any = None,
    ) -> None:
        names = () if network is None else (made.model.name,)
        self.config = resolve(made, models=names)
        self.when = when or (lambda run, event: None)
        self.samples, self.data = samples, support.datasets(samples)
        self.network = network or support.model(made.model.name, made.model.dtype)
        self.events: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.errors: dict[int, BaseException] = {}
        self.folder = pathlib.Path(self.config.run.dir) / self.config.name
        self._stops: dict[int, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._nodes: dict[int, threading.Thread] = {}
        self._devices: dict[int, threading.Thread] = {}
        self._address: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._where: Any = None
        self._stop = threading.Event()

    def run(self, devices) -> OpenRun:
        """Runs to the end with these devices at the start."""
        server = threading.Thread(target=self._serve)
        server.start()
        self._where = self._address.get()
        for node in range(1, self.config.nodes.count + 1):
            self.start_node(node)
        for index in devices:
            self.start(index)
        server.join(PROCESS_S)
        hung = server.is_alive()
        self._stop.set()
        for stop in self._stops.values():
            stop.set()
        for thread in (server, *self._threads):
            thread.join(60)
        assert not hung, self.events[-5:]
        return self

    def start(self, index: int) -> None:
        """Starts a device, or starts it again."""
        stop = self._stops[index] = threading.Event()
        thread = threading.Thread(target=self._take_part, args=(index, stop))
        self._devices[index] = thread
        self._threads.append(thread)
        thread.start()

    def end(self, index: int) -> None:
        """Ends a device in whatever it does."""
        self._stops[index].set()

    def await_end(self, index: int) -> None:
        """Waits until a device that was told to end has ended, with all that it writes."""
        self._devices[index].join(60)

    def start_node(self, node: int) -> None:
        """Starts a compute node, or starts it again."""
        stop = self._stops[-node] = threading.Event()
        thread = self._nodes[node] = threading.Thread(target=self._help, args=(node, stop))
        self._threads.append(thread)
        thread.start()

    def end_node(self, node: int) -> None:
        """Ends a compute node in whatever it does, and returns when it has ended."""
        self._stops[-node].set()
        self._nodes[node].join(60)

    def kinds(self, *kinds: str) -> list[dict[str, Any]]:
        """Returns the events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    def script(self) -> list[dict[str, Any]]:
        """Returns the run's script."""
        text = (self.folder / "membership.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the run's weights by name."""
        assert self.error is None, self.error
        found: dict[str, np.ndarray] = load_file(self.folder / WEIGHTS)
        return found

    def _serve(self) -> None:
        try:
            run_server(self.config, on_event=self._tell, model=self.network,
                       data=self.data[-1], stop=self._stop)  # fmt: skip
        except BaseException as error:
            self.error = error
            self._address.put(None)

    def _take_part(self, index: int, stop: threading.Event) -> None:
        try:
            run_device(self.config, index, self._where, model=self.network,
                       data=self.data[index], stop=stop)  # fmt: skip
        except PiparError as error:
            self.errors[index] = error

    def _help(self, node: int, stop: threading.Event) -> None:
        try:
            run_node(self.config, node, self._where, model=self.network, stop=stop)
        except PiparError as error:
            self.errors[-node] = error

    def _tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "listening":
            self._address.put((event["host"], event["port"]))
        self.events.append(event)
        self.when(self, event)


def config(folder, method="pipar", rounds=4, samples=SAMPLES, **cohort):
    """The configuration of a run of some rounds of an epoch each."""
    made = support.config(folder, samples, dtype="float32", method=method)
    made.aggregation.every, made.epochs = "epoch", rounds
    made.optimizer.momentum, made.network.deadline_s = 0.9, 30.0
    made.pipeline.cut, made.pipeline.micro_batches = 1, 1 if method == "sl" else 2
    made.run.progress_every_s = 0.0
    if method == "mpsl":
        made.nodes.count, made.pipeline.cuts = 1, "1,2"
    for name, value in cohort.items():
        setattr(made.cohort, name, value)
    return made


def together(*some: Callable[..., None]) -> Callable[..., None]:
    """Returns what does several things, each when it is due."""

    def when(run: OpenRun, event: Any) -> None:
        for act in some:
            act(run, event)

    return when


def before_batch(monkeypatch, device: int, from_step: int, act: Callable[[], None]) -> None:
    """Acts once, on the device that then gets its mini-batch of a step or of a later one."""
    get, done = loading.Prefetcher.get, []

    def first(self, step):
        if self._loader._seed[1] == device and step >= from_step and not done:
            done.append(step)
            act()
        return get(self, step)

    monkeypatch.setattr(loading.Prefetcher, "get", first)


def break_batch(monkeypatch, device: int, step: int) -> list[int]:
    """Makes a device's mini-batch of a step one without numbers, once; returns what was done."""
    get, done = loading.Prefetcher.get, list[int]()

    def broken(self, of):
        batch = get(self, of)
        if self._loader._seed[1] == device and of == step and not done:
            done.append(of)
            return batch._replace(x=np.full_like(batch.x, np.nan))
        return batch

    monkeypatch.setattr(loading.Prefetcher, "get", broken)
    return done


class Points:
    """Calls hooks at points of runs: on the thread that comes there, before it goes on."""

    def __init__(self, monkeypatch) -> None:
        self.hooks: list[Callable[..., None]] = []
        self._patch = monkeypatch
        points = self

        def get(self, step, inner=loading.Prefetcher.get):
            points.fire("batch", f"d{self._loader._seed[1]}", step)
            return inner(self, step)

        def send(self, said, states, inner=HostReplies.send):
            kind, round_ = type(said).__name__, getattr(said, "round", -1)
            points.fire(f"before {kind}", self._name, round_)
            inner(self, said, states)
            points.fire(kind, self._name, round_)

        monkeypatch.setattr(loading.Prefetcher, "get", get)
        monkeypatch.setattr(HostReplies, "send", send)
        for owner, method in ((RoundResults, "average"), (RoundResults, "store"),
                              (RoundResults, "count"), (RoundStart, "bring_up_to_date"),
                              (Evaluator, "evaluate"), (Checkpoints, "take")):  # fmt: skip
            self._wrap(owner, method)

    def _wrap(self, owner, method):
        inner, calls = getattr(owner, method), []

        def wrapped(of, *args, **kwargs):
            calls.append(method)
            self.fire(method, "server", len(calls) - 1)
            return inner(of, *args, **kwargs)

        self._patch.setattr(owner, method, wrapped)

    def fire(self, point: str, host: str, number: int) -> None:
        """Calls the hooks.

        Args:
          point: ``batch``, the name of a message or ``before`` it, or of a method of the server.
          host: The host.
          number: The step of a batch, the round of a message, how often a method was called before.
        """
        for hook in list(self.hooks):
            hook(point, host, number)

    def once(self, point: str, host: str, number: int, act: Callable[[], None]) -> None:
        """Acts once, at a point of a host, from some number on."""
        lock, done = threading.Lock(), []

        def hook(*at) -> None:
            if at[:2] == (point, host) and at[2] >= number and lock.acquire(blocking=False):
                done.append(at)
                self.hooks.remove(hook)
                act()

        self.hooks.append(hook)


def told(run: OpenRun, kind: str, count: int, seconds: float = PATIENCE_S) -> None:
    """Waits until events of a kind have been told, or for some seconds."""
    until_s = time.monotonic() + seconds
    while len(run.kinds(kind)) < count and time.monotonic() < until_s:
        time.sleep(0.01)


def lose(run: OpenRun, index: int) -> None:
    """Ends a device, and goes on when the server has noticed; not for the server's own thread."""
    before = len(run.kinds("device_lost"))
    run.end(index)
    told(run, "device_lost", before + 1)


def replayed(tmp_path, made, run):
    """The weights of a run that replays another one's script with all devices there."""
    made.name = "replay"
    made.cohort.script = str(run.folder / "membership.jsonl")
    made.checkpoint.every_rounds = 0
    again = OpenRun(made).run(range(len(SAMPLES)))
    assert again.error is None, again.error
    assert again.script() == run.script()
    return again.weights()


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Returns whether all arrays are the same bit for bit."""
    return one.keys() == other.keys() and all(
        np.array_equal(array, other[name]) for name, array in one.items()
    )


def pause_until_there(count=3, seconds=0.6):
    """Pauses between rounds while a device is on its way: until so many finish one again.

    Pauses become longer while it is: a busy machine may take its time.
    """
    fewer = there = False
    pause_s = seconds

    def when(run, event):
        nonlocal fewer, there, pause_s
        if event["event"] == "round_finished":
            there = there or (fewer and event["committed"] >= count)
            fewer = fewer or event["committed"] < count
        if event["event"] in ("evaluated", "round_finished") and not there:
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 10.0) if fewer else seconds

    return when
