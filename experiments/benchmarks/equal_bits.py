"""Runs that are disturbed and must leave the weights of the undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import pathlib
import random
import signal
import time
from collections.abc import Callable, Iterator

from experiments.benchmarks import watched
from experiments.benchmarks.fault_trials import (
    LENGTHS,
    ORPHANS_S,
    ROUNDS,
    Kill,
    beginning,
    folder_of,
    launched,
    setting,
)
from experiments.benchmarks.watched import Cutter, Line, Watched, watching
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import WEIGHTS
from pipar_jax.errors import RunError


def by_hand(config: Config) -> tuple[str, ...]:
    """Returns the flags of a run's hosts that are started by hand."""
    given = {
        "name": config.name, "method": config.method, "epochs": config.epochs,
        "model.name": config.model.name, "model.norm": config.model.norm,
        "data.batch_size": config.data.batch_size, "data.train_samples": config.data.train_samples,
        "data.test_samples": config.data.test_samples,
        "optimizer.momentum": config.optimizer.momentum,
        "devices.count": config.devices.count, "pipeline.micro_batches": 2,
        "checkpoint.every_rounds": config.checkpoint.every_rounds,
        "run.resume": config.run.resume, "run.dir": config.run.dir, "run.trace": "none",
        "run.evaluate_every": 0, "run.progress_every_s": 0.0,
        "network.rejoin_s": config.network.rejoin_s, "network.resume_s": config.network.resume_s,
        "network.join_timeout_s": config.network.join_timeout_s,
    }  # fmt: skip
    return ("--config=digits", *(f"--config.{name}={value}" for name, value in given.items()))


class Bits:
    """Runs of one setting whose weights must equal those of the undisturbed run bit for bit.

    Args:
      folder: Where runs go.
      method: The method.
    """

    def __init__(self, folder: pathlib.Path, method: str) -> None:
        self._folder, self._method, self._number = folder, method, 0
        self._whole = self._setting("whole")
        with launched(self._whole) as run:
            _check_finished(run)

    def server_killed(self, rng: random.Random) -> bool:
        """Kills the server under hand-started devices, starts it again; returns whether equal."""
        config = self._setting("server")
        config.network.rejoin_s = 120.0
        port, flags = watched.free_port(), by_hand(config)
        server = ("experiments.server", *flags, f"--config.server.port={port}")
        devices = [
            ("experiments.device", *flags, f"--server=127.0.0.1:{port}", f"--index={index}")
            for index in range(config.devices.count)
        ]
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(watching(*server))
            joined = [stack.enter_context(watching(*one)) for one in devices]
            first.wait_for(_tells_round(rng.randrange(1, ROUNDS - 2)))
            time.sleep(rng.random() * LENGTHS["training"])
            first.process.kill()
            first.end()
            again = stack.enter_context(watching(*server))
            ends = [one.end() for one in (again, *joined)]
        return not any(ends) and self._is_equal(config)

    def launcher_killed(self, rng: random.Random) -> bool:
        """Kills the launcher and resumes the run; returns whether equal."""
        config = self._setting("launcher")
        with launched(config) as run:
            run.wait_for(beginning(Kill("", "", "training", rng.randrange(1, ROUNDS - 2), 0.0)))
            time.sleep(rng.random() * LENGTHS["training"])
            run.process.kill()
            run.end()
        orphans = watched.left_behind(folder_of(config), ORPHANS_S)
        with launched(config) as run:
            _check_finished(run)
        return not orphans and self._is_equal(config)

    def links_cut(self, rng: random.Random, most: int) -> tuple[int, bool]:
        """Cuts links of hand-started devices again and again; returns how often, and if equal."""
        with self._behind_cutter("cut") as (config, cutter, hosts):
            hosts[0].wait_for(_tells_round(1))
            while cutter.cuts < most and hosts[0].process.poll() is None:
                cutter.cut(rng.randrange(8))
                time.sleep(0.02 + 0.1 * rng.random())
            cuts = cutter.cuts
            ends = [one.end() for one in hosts]
        return cuts, not any(ends) and self._is_equal(config)

    def device_stopped(self, rng: random.Random, seconds: float) -> bool:
        """Stops a device for a while; returns whether the weights are equal."""
        with self._behind_cutter("stop") as (config, _, hosts):
            hosts[0].wait_for(_tells_round(rng.randrange(1, ROUNDS - 2)))
            stopped = rng.choice(hosts[1:]).process
            stopped.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            stopped.send_signal(signal.SIGCONT)
            ends = [one.end() for one in hosts]
        return not any(ends) and self._is_equal(config)

    @contextlib.contextmanager
    def _behind_cutter(self, name: str) -> Iterator[tuple[Config, Cutter, list[Watched]]]:
        """Starts a server and its devices by hand, whose links may break and resume."""
        config = self._setting(name)
        config.network.resume_s, port = 60.0, watched.free_port()
        flags, cutter = by_hand(config), Cutter(port)
        try:
            with contextlib.ExitStack() as stack:
                server = ("experiments.server", *flags, f"--config.server.port={port}")
                hosts = [stack.enter_context(watching(*server))]
                hosts[0].wait_for(lambda line: line.text.startswith("listening on"))
                for index in range(config.devices.count):
                    where = f"--server={cutter.address}"
                    device = ("experiments.device", *flags, where, f"--index={index}")
                    hosts.append(stack.enter_context(watching(*device)))
                yield config, cutter, hosts
        finally:
            cutter.close()

    def _setting(self, name: str) -> Config:
        """Returns the setting: two devices that must all be there, a model of the preset."""
        self._number += 1
        config = setting(self._folder, self._method, f"{self._method}-{name}{self._number}")
        fresh = Config()
        config.cohort, config.devices.count, config.network = fresh.cohort, 2, fresh.network
        config.network.join_timeout_s = 600.0  # processes of a busy machine take long to start
        return config

    def _is_equal(self, config: Config) -> bool:
        return watched.equal_files([folder_of(one) / WEIGHTS for one in (self._whole, config)])


def _tells_round(number: int) -> Callable[[Line], bool]:
    """Returns a function that recognises the line with which a binary reports a round."""
    return lambda line: f"round {number + 1} of" in line.text


def _check_finished(run: Watched) -> None:
    """Waits for a launcher.

    Raises:
      RunError: It failed.
    """
    if run.end():
        raise RunError(f"an undisturbed run failed; {run.last_words}")
