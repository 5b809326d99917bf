"""A server that trains with light fakes: many registered devices, or many rounds.

The server is a host's process as the launcher starts it. The fakes share a process: each has a link
and answers as a device does, with the weights of the seed and random activations, and computes
nothing. As a program this module is that process.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import numpy as np

import pipar_jax
from comms import Endpoint, Link, Message, MessageKind, PeerClosed, Role, Tag
from experiments.benchmarks.watched import PATIENCE_S, Usage, usage
from pipar_jax.config import Config, from_json, to_json
from pipar_jax.disk import files
from pipar_jax.disk.json_text import dumps
from pipar_jax.errors import RunError
from pipar_jax.launch import process
from pipar_jax.methods.registry import plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import ControlMessage, Sender
from pipar_jax.protocol.values import Memory
from pipar_jax.runtime import exchanges, unit_state
from pipar_jax.runtime.unit_state import Tensors, UnitState
from pipar_jax.schedule.plan import COORDINATOR, device_name

#: Samples of a fake, all of one mini-batch.
SAMPLES = 8
#: Times at which the server is looked at in the course of a run.
LOOKS = 40


class Crowd(NamedTuple):
    """Light fakes, and the rounds of their run.

    Attributes:
      registered: Devices that register in the course of the run.
      connected: Devices that are there at a time: who has taken part in a round goes, and another
        one comes.
      cohort: Devices in a round; 0: all.
      rounds: Number of rounds.
    """

    registered: int
    connected: int
    cohort: int
    rounds: int

    @property
    def rotates(self) -> bool:
        """Whether devices come and go."""
        return self.registered > self.connected


class Held(NamedTuple):
    """What the server holds.

    Attributes:
      round: Number of rounds that were over.
      time_s: When, on the monotonic clock.
      usage: Its memory, descriptors and threads.
    """

    round: int
    time_s: float
    usage: Usage


def setting(folder: pathlib.Path, crowd: Crowd) -> Config:
    """Returns the configuration of a run with fakes: SFL of a small network on the digits."""
    config = Config(name=f"fakes{crowd.registered}x{crowd.rounds}", method="sfl")
    config.epochs, config.model.name, config.model.norm = crowd.rounds, "mlp", "group"
    config.data.source, config.data.batch_size, config.data.test_samples = "digits", SAMPLES, 8
    config.devices.count, config.pipeline.cut = crowd.registered, 1
    config.cohort.size = float(crowd.cohort)
    if crowd.rotates:
        config.cohort.min_devices, config.cohort.quorum = crowd.connected, crowd.cohort // 2
        config.cohort.wait_s = 1.0
    config.run.dir, config.run.trace, config.run.evaluate_every = str(folder), "none", 0
    config.network.join_timeout_s = 60.0
    return resolve(config)


def train(folder: pathlib.Path, crowd: Crowd) -> list[Held]:
    """Trains with fakes.

    Args:
      folder: Where the run's folder and the files of the processes go.
      crowd: The fakes and the rounds.

    Returns:
      What the server held in the course of the rounds.

    Raises:
      RunError: The run failed, or a process ended.
    """
    path = folder / "fakes.json"
    config = setting(folder, crowd)
    files.write_text(path, to_json(config))
    (folder / config.name).mkdir()
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "pipar_jax.launch.process", f"--name={COORDINATOR}"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            [*command, f"--config={path}", f"--events={writing}"],
            stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writing,),
        )  # fmt: skip
    os.close(writing)
    fakes: subprocess.Popen[bytes] | None = None
    held: list[Held] = []
    try:
        with open(reading, encoding="utf-8") as events:
            for line in events:
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "listening":
                    where = f"{event['host']}:{event['port']}"
                    fakes = subprocess.Popen(
                        [sys.executable, "-m", __spec__.name, str(path), where,
                         dumps(crowd)],
                        env={**os.environ, "JAX_PLATFORMS": "cpu"},
                    )  # fmt: skip
                elif event["event"] == "process_failed":
                    raise RunError(f"the server of the fakes: {event['error']}")
                elif event["event"] == "round_finished":
                    every = max(1, crowd.rounds // LOOKS)
                    if event["round"] % every == every - 1:
                        now_s = time.monotonic()
                        held.append(Held(event["round"] + 1, now_s, usage(server.pid)))
        if server.wait(PATIENCE_S) or fakes is None or fakes.wait(PATIENCE_S):
            last = (folder / "server.log").read_text(errors="replace").strip()[-300:]
            raise RunError(f"the run with fakes failed; the last that its server printed: {last}")
    finally:
        for one in (fakes, server):
            if one is not None:
                one.kill()
                one.wait()
        if server.stdin is not None:
            server.stdin.close()
    return held


class _Answers:
    """What fakes say, made once for all of them."""

    def __init__(self, config: Config) -> None:
        from pipar_jax.roles.admission import describe
        from pipar_jax.runtime.setup import build_model
        from stages.signature import Signature

        self._model = model = build_model(config, Signature.labelled((8, 8, 1), 10))
        self._names = tuple(model.unit_names)
        self._plan = plan_for(config, self._names)
        self._params, self._state = model.init(config.seed)
        self._join = messages.JoinDevice(
            messages.VERSION, pipar_jax.__version__, device_name(0), json.loads(to_json(config)),
            SAMPLES, 1, model.signature, describe(model), "a fake's",
        )  # fmt: skip
        shape = model.shapes(SAMPLES)[self._plan.devices[0].cuts[0]]
        draws = np.random.default_rng(0)
        self.activation = draws.standard_normal(shape.shape).astype(shape.dtype)
        self.labels = draws.integers(0, model.classes, SAMPLES, np.int32)
        self._weights: dict[int, Tensors] = {}

    def join(self, index: int) -> ControlMessage:
        """Returns a device's first message."""
        return dataclasses.replace(self._join, name=device_name(index))

    def weights(self, place: int) -> Tensors:
        """Returns what a device in a place gives to the average."""
        if place not in self._weights:
            wanted = exchanges.trained(self._plan, device_name(place), self._names)
            states = {
                (copy, unit): UnitState(self._params[unit], self._state[unit])
                for copy, unit in wanted
            }
            self._weights[place] = unit_state.pack(states)
        return self._weights[place]


class _Fake:
    """A link that answers as a device would."""

    def __init__(self, index: int, config: Config, answers: _Answers) -> None:
        from pipar_jax.runtime.setup import channel_options

        self.index, self._answers = index, answers
        self.over = self.gone = False
        self._place, self._round = 0, 0
        options = channel_options(config.network, config.pipeline.window_mb)
        self._endpoint = Endpoint(device_name(index), options=options)
        self._link: Link | None = None

    def join(self, address: tuple[str, int], inbox: queue.SimpleQueue[Any]) -> None:
        """Joins the run."""
        self._link = link = self._endpoint.connect(
            *address, name_of_peer="the server", timeout_s=PATIENCE_S
        )
        link.start(lambda message: inbox.put((self, message)), _nothing,
                   lambda error: inbox.put((self, error)))  # fmt: skip
        registry.send(link, self._answers.join(self.index))

    def take(self, message: Message) -> bool:
        """Answers a message; returns whether a round is over here."""
        link = message.link
        if message.kind == MessageKind.TENSOR:  # the cotangent of its only step
            message.release()
            weights = self._answers.weights(self._place)
            registry.send_bundle(link, messages.Trained(self._round), weights)
            return False
        said = registry.decode(message, Sender.COORDINATOR, "the server")
        message.release()
        if isinstance(said, messages.Meet):
            registry.send(link, messages.Met(said.number))
        elif isinstance(said, messages.Prepare):
            registry.send(link, messages.Prepared(0.0, 0))
        elif isinstance(said, messages.Release):
            self._train(link, said)
        elif isinstance(said, messages.Drop) and said.place == self._place:
            registry.send(link, messages.Dropped(said.round))
        elif isinstance(said, messages.PushState) and said.round is None:
            registry.send(link, messages.PushedState())
        elif isinstance(said, messages.PushState):
            nothing = Memory(0, 0, 0)
            registry.send(link, messages.Stored(self._round, 0, 0.0, nothing, 0.0, 0, {}))
            return True
        elif isinstance(said, messages.Finish):
            registry.send_bundle(link, messages.Bye(), _no_rows())
            self.over = True
        elif isinstance(said, messages.Abort | messages.Refused):
            raise RunError(f"fake {self.index} is told: {said.reason}")
        return False

    def leave(self) -> None:
        """Leaves with a word; another thread ends its link."""
        assert self._link is not None
        registry.send(self._link, messages.Leave("another one's turn"))
        threading.Thread(target=self.close).start()

    def close(self) -> None:
        """Ends its link and thread."""
        self._endpoint.close()

    def _train(self, link: Link, said: messages.Release) -> None:
        """Sends labels and activation of the only step of a round."""
        self._round, self._place = said.round, said.cohort.index(self.index)
        span = next(one for one in said.spans if one.device == self._place)
        tag = Tag(
            role=Role.LABEL, device=self._place, stage=1, step=span.first, samples=SAMPLES,
            batch_samples=SAMPLES, attempt=said.attempt,
        )  # fmt: skip
        link.send(tag, self._answers.labels)
        link.send(dataclasses.replace(tag, role=Role.ACTIVATION), self._answers.activation)


def _nothing() -> None:
    """Does nothing with a link's credit."""


def _no_rows() -> Tensors:
    """Returns an empty trace."""
    return {"numbers": np.zeros((0, 7), np.int64), "times": np.zeros((0, 2))}


def play(config: Config, address: tuple[str, int], crowd: Crowd) -> None:
    """Plays a crowd of devices until the run is over.

    Raises:
      RunError: The server ended the run, or is gone.
    """
    answers = _Answers(config)
    inbox: queue.SimpleQueue[tuple[_Fake, Message | BaseException]] = queue.SimpleQueue()
    here: dict[int, _Fake] = {}
    waiting = collections.deque(range(crowd.registered))

    def start() -> None:
        fake = _Fake(waiting.popleft(), config, answers)
        here[fake.index] = fake
        fake.join(address, inbox)

    try:
        for _ in range(crowd.connected):
            start()
        while not all(fake.over or fake.gone for fake in here.values()):
            fake, item = inbox.get(timeout=PATIENCE_S)
            if isinstance(item, BaseException):
                # A run that fails says why first; one that is over closes what joined too late.
                ended = isinstance(item, PeerClosed) or any(one.over for one in here.values())
                if here.get(fake.index) is fake and not ended:
                    raise RunError(f"fake {fake.index} lost the server: {item}")
                fake.gone = True
            elif here.get(fake.index) is fake and fake.take(item) and crowd.rotates:
                del here[fake.index]
                fake.leave()
                waiting.append(fake.index)
                start()
    except queue.Empty:
        raise RunError("the server says nothing any more") from None
    finally:
        for fake in here.values():
            fake.close()


def main() -> None:
    """Plays a crowd; its run's configuration, the server's address and the crowd are arguments."""
    path, where, crowd = sys.argv[1:]
    config = from_json(pathlib.Path(path).read_text(encoding="utf-8"))
    host, _, port = where.rpartition(":")
    fakes = Crowd(*json.loads(crowd))
    process.leave(
        process.perform(lambda: play(config, (host, int(port)), fakes), _print, debug=False)
    )


def _print(event: dict[str, Any]) -> None:
    """Prints why the fakes ended."""
    print(event["error"], file=sys.stderr)


if __name__ == "__main__":
    main()
