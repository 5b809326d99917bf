"""Runs in processes whose hosts are killed, stopped and cut off at seeded moments.

As a program it is the launcher of such a run: it trains by a saved configuration and writes every
event as a line of JSON, until it is killed or the run has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments.benchmarks import watched
from experiments.benchmarks.trials import base_config
from experiments.benchmarks.watched import Line, Watched, watching
from pipar_jax.config import AUTO, Config, from_json, to_json
from pipar_jax.disk import files
from pipar_jax.launch import launcher, process
from pipar_jax.methods.registry import METHODS, hosts_of
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import COORDINATOR

#: Rounds between two checkpoints, and the seconds after which a round goes on without the late.
EVERY, DEADLINE_S = 4, 5.0
#: Rounds of a run that is disturbed.
ROUNDS = 24
LAUNCHER = "launcher"
#: What a run does when a process is killed.
PHASES = ("start", "profiling", "compiling", "training", "averaging", "checkpoint")
#: Seconds within which the children of a killed launcher must be gone.
ORPHANS_S = 10.0
_MODULE = "experiments.benchmarks.fault_trials"


def setting(folder: pathlib.Path, method: str, name: str, rounds: int = ROUNDS) -> Config:
    """Returns a run of a few seconds that may lose devices and writes checkpoints.

    Args:
      folder: Where runs go.
      method: A method, or ``auto``.
      name: The run's name.
      rounds: Number of rounds, of an epoch each.
    """
    config = Config(name=name, method=method, epochs=rounds)
    config.model.name, config.model.norm = "mlp", "group"
    config.data.source, config.data.batch_size = "digits", 8
    config.data.train_samples = config.data.test_samples = 288
    config.optimizer.learning_rate, config.optimizer.momentum = 0.05, 0.9
    config.devices.count, config.pipeline.cut, config.pipeline.micro_batches = 3, 1, 2
    chain = METHODS.get(method)
    if chain is not None and chain.uses_nodes:
        config.nodes.count, config.nodes.replicate_every = 2, 1
    if chain is not None and chain.one_device:
        config.devices.count = 1
    else:
        config.cohort.min_devices = config.cohort.quorum = 2
        config.cohort.deadline_s, config.cohort.wait_s = DEADLINE_S, 3.0
    config.checkpoint.every_rounds, config.run.resume = EVERY, "auto"
    config.run.dir, config.run.trace, config.run.evaluate_every = str(folder), "none", 0
    config.run.progress_every_s, config.network.join_timeout_s = 0.0, 120.0
    return config


@contextlib.contextmanager
def launched(config: Config) -> Iterator[Watched]:
    """Starts a launcher in a process, and kills it after the block if it runs still."""
    path = pathlib.Path(config.run.dir, f"{config.name}.json")
    files.write_text(path, to_json(config))
    with watching(_MODULE, str(path)) as process:
        yield process


def folder_of(config: Config) -> pathlib.Path:
    """Returns the folder of a run that is resumed there."""
    return pathlib.Path(config.run.dir, config.name)


# --- kills ------------------------------------------------------------------------------------


class Kill(NamedTuple):
    """A process that is killed in a run.

    Attributes:
      method: The run's method.
      victim: The host, or the launcher.
      phase: What the run does then.
      round: For phases of a round, its number.
      delay: Share of the phase that goes by before.
    """

    method: str
    victim: str
    phase: str
    round: int
    delay: float

    def __str__(self) -> str:
        where = f"{self.phase} of round {self.round + 1}" if self.in_round else self.phase
        return f"{self.method}: {self.victim} killed in {where}"

    @property
    def in_round(self) -> bool:
        """Whether the run trains already: before it does it has no progress to make."""
        return self.phase in PHASES[3:]


#: Longest delay of a kill after the event that begins its phase, in seconds.
LENGTHS = {
    "start": 4.0, "profiling": 1.0, "compiling": 1.0, "training": 0.2, "averaging": 0.02,
    "checkpoint": 0.2,
}  # fmt: skip


def draw_kills(count: int, seed: int = 0) -> list[Kill]:
    """Returns seeded kills over all methods, kinds of hosts and phases."""
    rng, kills = random.Random(seed), list[Kill]()
    methods = (*METHODS, AUTO)
    for number in range(count):
        method = methods[number % len(methods)]
        planned = method == AUTO or METHODS[method].uses_nodes
        hosts = hosts_of(resolve(setting(pathlib.Path("runs"), method, "draw")))
        kinds = [rng.choice(hosts.devices), COORDINATOR, LAUNCHER]
        kinds += [rng.choice(hosts.nodes)] if hosts.nodes else []
        phases = [one for one in PHASES if planned or one != "profiling"]
        phase = rng.choice(phases)
        round_ = rng.randrange(1, ROUNDS - 2)
        if phase == "checkpoint":
            round_ = EVERY * rng.randrange(1, ROUNDS // EVERY) - 1
        kills.append(Kill(method, rng.choice(kinds), phase, round_, rng.random()))
    return kills


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of a run after a kill.

    Attributes:
      kill: The kill.
      happened: Whether the run was in the phase, and the process there.
      went_on: Whether the run itself finished.
      resumed: Whether a run that was resumed from its checkpoints finished.
      lost: Rounds that had to be trained again, without those that were trained while the last
        checkpoint was being written.
      on_s: Seconds until a run that trained made progress again; None if it ended.
      orphans: Processes that were left.
      reason: Why it neither went on nor could be resumed.
    """

    kill: Kill
    happened: bool = False
    went_on: bool = False
    resumed: bool = False
    lost: int = 0
    on_s: float | None = None
    orphans: int = 0
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether the run came to its end, by itself or resumed."""
        return self.went_on or self.resumed


def try_kill(folder: pathlib.Path, kill: Kill, number: int) -> Outcome:
    """Runs until a moment, kills a process, and lets the run come to its end."""
    config, outcome = setting(folder, kill.method, f"kill{number}"), Outcome(kill)
    run_folder = folder_of(config)
    with launched(config) as run:
        if run.wait_for(beginning(kill)) is not None:
            time.sleep(kill.delay * LENGTHS[kill.phase])
            at_s = time.monotonic()
            outcome.happened = _kill(run, run_folder, kill.victim)
        code = run.end()
        finished = _rounds(run)
        if kill.victim == LAUNCHER and outcome.happened:
            outcome.orphans = len(watched.left_behind(run_folder, ORPHANS_S))
        outcome.went_on = code == 0
        if outcome.went_on and outcome.happened and kill.in_round:
            outcome.on_s = _next_progress_s(run, at_s)
    outcome.orphans += len(watched.left_behind(run_folder, 1.0))
    if not outcome.went_on:
        outcome.reason = run.last_words
        _resume(config, outcome, finished, _checkpoints(run))
    return outcome


def beginning(kill: Kill) -> Callable[[Line], bool]:
    """Returns a function that knows the event with which a kill's phase begins."""

    def begins(line: Line) -> bool:
        event = line.event
        kind = event.get("event")
        if kill.phase == "start":
            return True
        if kill.phase == "profiling":
            return kind == "working" and event["what"] == "timing"
        if kill.phase == "compiling":
            return kind == "working" and event["what"] == "compiling"
        if kill.phase == "averaging":
            return kind == "progress" and event["round"] == kill.round and event["step"] > 0
        ended = kill.round if kill.phase == "checkpoint" else kill.round - 1
        return kind == "round_finished" and event["round"] == ended

    return begins


def _kill(run: Watched, folder: pathlib.Path, victim: str) -> bool:
    """Kills a process of a run; returns whether it was there."""
    if run.process.poll() is not None:
        return False
    if victim == LAUNCHER:
        run.process.kill()
        return True
    host = watched.host_of(folder, victim)
    if host is not None:
        host.signal(signal.SIGKILL)
    return host is not None


def _rounds(run: Watched) -> int:
    """Returns how many rounds a run has finished, with those before it was resumed."""
    ended = [line.event["round"] + 1 for line in run.events
             if line.event["event"] == "round_finished"]  # fmt: skip
    return max(ended, default=0)


def _checkpoints(run: Watched) -> list[int]:
    """Returns the rounds after which a run has begun to write a checkpoint."""
    return [line.event["rounds"] for line in run.events if line.event["event"] == "checkpoint"]


def _next_progress_s(run: Watched, at_s: float) -> float | None:
    """Returns the seconds from a moment to the first step that was reported after it."""
    return next(
        (line.time_s - at_s for line in run.events
         if line.time_s > at_s + 0.1 and line.event["event"] in ("progress", "round_finished")),
        None,
    )  # fmt: skip


def _resume(config: Config, outcome: Outcome, finished: int, checkpoints: list[int]) -> None:
    """Resumes a run that has ended, and notes what was lost.

    Args:
      config: The run's configuration.
      outcome: Takes what becomes of it.
      finished: Rounds that it had finished.
      checkpoints: Rounds after which it had begun to write a checkpoint.
    """
    with launched(config) as run:
        code = run.end()
        resumed = [line.event["rounds"] for line in run.events
                   if line.event["event"] == "run_resumed"]  # fmt: skip
    outcome.orphans += len(watched.left_behind(folder_of(config), 1.0))
    outcome.resumed = code == 0
    if not outcome.resumed:
        outcome.reason = run.last_words
    begun, newest = max(resumed, default=0), max(checkpoints, default=0)
    outcome.lost = max(newest - begun, finished - newest)


# --- the cost of checkpoints ------------------------------------------------------------------


def digits(folder: pathlib.Path, rounds: int) -> Config:
    """Returns a run of the digits' preset, as long as it is trained for users."""
    config = Config(name="digits", method="pipar", epochs=rounds)
    config.model.name, config.model.norm, config.data.batch_size = "cnn", "group", 32
    config.optimizer.learning_rate = 0.05
    config.run.dir, config.run.evaluate_every, config.run.trace = str(folder), 0, "none"
    return config


def vgg16(folder: pathlib.Path, rounds: int) -> Config:
    """Returns a run of VGG-16 on random images behind links of 50 Mbit/s."""
    config = base_config(folder, "vgg16", 10, 2, "50/50", steps=1)
    config.name, config.method, config.epochs = "vgg16", "pipar", rounds
    return config


def rounds_s(config: Config) -> float:
    """Trains, and returns the seconds from the end of the first round to that of the last."""
    ends: list[float] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "round_finished":
            ends.append(event["time_s"])

    launcher.launch(config, on_event=note)
    return ends[-1] - ends[0]


def main() -> None:
    """Trains by a saved configuration; writes events as lines of JSON."""
    tell = process.event_writer(sys.stdout.fileno())
    config = from_json(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    code = process.perform(lambda: launcher.launch(config, on_event=tell), tell, debug=False)
    process.leave(code)


if __name__ == "__main__":
    main()
