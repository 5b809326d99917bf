"""Trials of plans: one run in processes whose rounds have given plans.

For benchmarks of the tuner: each plan is trained, without its compilation and without starting
processes for every plan. As a program it is a host's process (see ``launcher.launch``) whose server
reads the plans from a file next to the run's folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipar_jax.config import AUTO, Config
from pipar_jax.cost_model.profile import Profile
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.files import replacing, write_text
from pipar_jax.disk.json_text import dumps
from pipar_jax.launch import launcher, process
from pipar_jax.launch.pinning import first_cores
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import Plan
from pipar_jax.simulator.predict import StageCosts, estimate
from pipar_jax.tuner.bounds import DeviceOption, excess
from pipar_jax.tuner.plan_labels import labels
from pipar_jax.tuner.search import search

INPUT_SHAPE, CLASSES = (32, 32, 3), 10
#: Steps of a round.
STEPS = 3
#: Numbers of micro-batches that are tried.
NUMBERS = (1, 2, 4, 5, 10, 20)
#: Plans are tried if they are predicted within this factor of the best.
WITHIN = 1.5
#: Number of other plans that are tried, drawn at random.
OTHERS = 5
#: Rounds that are predicted to be shorter than these seconds are trained twice for each occurrence,
#: and the second counts: the first one after a change of plan fetches memory that was given back,
#: for 0.1 s and more.
SHORT_S = 2.0


class Tried(NamedTuple):
    """A trained plan.

    Attributes:
      plan: The plan.
      predicted_s: Predicted seconds of a round.
      seconds: Measured seconds of each of its rounds.
    """

    plan: Plan
    predicted_s: float
    seconds: list[float]

    @property
    def mean_s(self) -> float:
        """The mean of its rounds."""
        return sum(self.seconds) / len(self.seconds)


def base_config(
    folder: Path, network: str, batch: int, devices: int, link: str, steps: int = STEPS
) -> Config:
    """Returns a configuration with few steps per round, on random images, which it writes.

    Args:
      folder: Folder of runs and data.
      network: Name of the network.
      batch: Samples in a mini-batch.
      devices: Number of devices.
      link: Their link.
      steps: Steps of a device per round.
    """
    data = folder / f"data-{batch}-{steps}.npz"
    if not data.exists():
        _write_data(data, batch, steps)
    config = Config(method=AUTO)
    config.model.name = network
    config.data.source, config.data.batch_size = f"npz:{data}", batch
    config.devices.count, config.devices.defaults.link = devices, link
    config.tuner.methods, config.tuner.codecs = "fl,sfl,pipar", "raw"
    config.run.dir, config.run.evaluate_every, config.run.trace = str(folder), 0, "none"
    cores = first_cores(2)
    if cores:
        config.server.cpus, config.devices.defaults.cpus = str(cores[0]), str(cores[-1])
    return config


def survey(config: Config) -> Profile:
    """Returns the profile of hosts and links that a run with method=auto measures."""
    config = resolve(config)
    events = _launch(config, 1)
    (tuned,) = [event for event in events if event["event"] == "tuned"]
    return Profile.from_dict(tuned["profile"])


def candidates(profile: Profile, config: Config, seed: int = 0) -> dict[str, list[Plan]]:
    """Returns the plans to try: ``tuner``'s, the ``paper``'s, ``near`` ones and ``others``.

    Args:
      profile: Hosts and links.
      config: Resolved configuration.
      seed: Seed of the draw of others.
    """
    found, stages = search(profile, config), StageCosts(profile)
    best = found.plans[0].plan
    units, batch = len(profile.units), profile.batch_size
    options = [DeviceOption(0)]
    options += [DeviceOption(cut, n) for cut in range(1, units) for n in NUMBERS if n <= batch]
    plans = [common_plan(option, best) for option in options]
    plans = [plan for plan in plans if excess(stages, plan) is None]
    seconds = {plan: estimate(stages, plan).epoch_s for plan in plans}
    limit_s = WITHIN * min(seconds.values())
    near = sorted((plan for plan in plans if seconds[plan] <= limit_s), key=seconds.__getitem__)
    rest = [plan for plan in plans if seconds[plan] > limit_s]
    others = random.Random(seed).sample(rest, min(OTHERS, len(rest)))
    paper = [] if found.paper is None else [found.paper.plan]
    return {"tuner": [best], "paper": paper, "near": near, "others": others}


def common_plan(option: DeviceOption, like: Plan) -> Plan:
    """Returns a plan with one option for all devices, otherwise equal to another plan."""
    devices = (option.device_plan(),) * len(like.devices)
    return Plan(devices, dispatch=like.dispatch, aggregate_every=like.aggregate_every)


def try_plans(config: Config, profile: Profile, plans: Sequence[Plan]) -> dict[Plan, Tried]:
    """Trains each plan for one round that counts per occurrence, in the given order.

    Args:
      config: The configuration; a round under the first plan precedes as a warm-up.
      profile: The profile for predictions.
      plans: The plans.

    Raises:
      PiparError: The run failed.
    """
    stages = StageCosts(profile)
    found = {plan: Tried(plan, estimate(stages, plan).epoch_s, []) for plan in plans}
    rounds = [(plans[0], False)]  # a plan, and whether its round counts
    for plan in plans:
        if found[plan].predicted_s < SHORT_S:
            rounds.append((plan, False))
        rounds.append((plan, True))
    events = _launch(resolve(config), len(rounds), [plan for plan, _ in rounds])
    seconds = [event["seconds"] for event in events if event["event"] == "round_finished"]
    for (plan, counts), round_s in zip(rounds, seconds, strict=True):
        if counts:
            found[plan].seconds.append(round_s)
    return found


def words(plan: Plan) -> str:
    """Returns a short text of a plan, such as ``pipar 2 x4``."""
    found = labels(plan)
    cuts = [f"{one.cuts[0] if one.cuts else 'fl'}x{one.micro_batches}" for one in plan.devices]
    if len(set(cuts)) > 1:
        return f"{found['method']} {' '.join(cuts)}"
    return found["method"] if found["cut"] == "-" else f"{found['method']} {cuts[0]}"


def _launch(config: Config, rounds: int, plans: Sequence[Plan] = ()) -> list[dict[str, Any]]:
    """Runs a number of rounds; returns the run's events."""
    folder, number = Path(config.run.dir), 0
    while (folder / f"trial{number}").exists():
        number += 1
    config.name, config.epochs = f"trial{number}", rounds
    script = dumps([plan.to_dict() for plan in plans])
    write_text(_script(config), script)
    events: list[dict[str, Any]] = []
    launcher.launch(config, on_event=events.append, process_module="experiments.benchmarks.trials")
    return events


def _script(config: Config) -> Path:
    """Returns the file of a run's plans."""
    return Path(config.run.dir) / f"{config.name}.plans.json"


def _write_data(path: Path, batch: int, steps: int) -> None:
    """Writes random images, as many as the steps of a round need."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", steps * batch), ("test", batch)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, *INPUT_SHAPE), np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, CLASSES, count, np.int32)
    with replacing(path) as aside:
        np.savez(aside, classes=np.array(CLASSES), scale=np.array(255), **arrays)


def _serve(config: Config, tell: OnEvent) -> None:
    """Runs the server of a run of trials."""
    from pipar_jax.roles.server import run_server  # after jax's environment is set

    plans = json.loads(_script(config).read_text(encoding="utf-8"))
    run_server(config, on_event=tell, script=[Plan.from_dict(plan) for plan in plans])


if __name__ == "__main__":
    process.main(serve=_serve)
