"""AccEPT against even cuts and raw tensors, on chains of unequal devices.

``experiments.bench_accept`` runs these trials. All plans of a setting are trained alternately in
one run; a round is an epoch of a few steps.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import harness, trials
from pipar_jax.config import Config
from pipar_jax.config.codec_candidates import AUTO, bit_widths
from pipar_jax.cost_model.profile import Profile
from pipar_jax.launch import launcher
from pipar_jax.methods.plans import plan_of_chain
from pipar_jax.methods.resolution import resolve
from pipar_jax.report import read_run
from pipar_jax.schedule.plan import OWNER, Plan, node_name
from pipar_jax.simulator.predict import StageCosts, estimate
from pipar_jax.tuner.chains import tune_chain

NETWORK, BATCH, STEPS, MICRO_BATCHES = "resnet18", 20, 4, 4
LENGTHS, RATES_MBPS = (2, 3, 4), (10, 50, 200)
#: Slowdowns of the hosts of a chain, the device first.
SPEEDS = (1.0, 2.0, 4.0, 8.0)
#: Number of rounds of each plan.
TURNS = 3
VARIANTS = ("even + raw", "balanced + raw", "even + codec", "balanced + codec")
#: Number of epochs for the comparison of accuracies.
ACCURACY_EPOCHS = 10
#: Number of epochs of a run that starts from predicted times, and the interval of its checks.
LEARNING_EPOCHS, LOOK_S = 12, 5.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One chain: its number of hosts and the rate of its links.

    Attributes:
      length: Number of hosts, including the device with the data.
      mbps: Rate of every link in each direction, in Mbit/s.
      data_dir: Folder with CIFAR-10 as TFDS prepares it; random images of its shape without.
    """

    length: int
    mbps: float
    data_dir: str = ""

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.length} devices, {self.mbps:g} Mbit/s"

    @property
    def saved(self) -> str:
        """Name under which its measurements are saved: those of other data are others."""
        return f"{self.name} {'cifar10' if self.data_dir else 'random'}"

    def config(self, folder: Path) -> Config:
        """Returns its configuration, with runs and data in a folder."""
        link = f"{self.mbps:g}/{self.mbps:g}"
        config = trials.base_config(folder, NETWORK, BATCH, 1, link, STEPS)
        if self.data_dir:
            config.data.source, config.data.data_dir = "cifar10", self.data_dir
            config.data.train_samples = BATCH * STEPS
        config.method, config.pipeline.micro_batches = "accept", MICRO_BATCHES
        config.devices.defaults.slowdown = SPEEDS[0]
        config.nodes.count, config.nodes.defaults.link = self.length - 1, link
        config.nodes.overrides = {i: {"slowdown": SPEEDS[i]} for i in range(1, self.length)}
        # The device computes permanently on its own core, the others seven eighths of the time.
        config.nodes.defaults.cpus = config.server.cpus
        return config


class Compared(NamedTuple):
    """The plans of a setting.

    Attributes:
      seconds: Measured epochs of each variant, in the order of the rounds.
      predicted_s: The simulator's prediction of each.
      plans: Text of each plan.
    """

    seconds: dict[str, list[float]]
    predicted_s: dict[str, float]
    plans: dict[str, str]

    def ratio(self, one: str, other: str) -> float:
        """Returns the median of neighbouring epochs' ratios."""
        pairs = zip(self.seconds[one], self.seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


def settings(quick: bool = False, data_dir: str = "") -> list[Setting]:
    """Returns the settings, with data from a folder; with ``quick`` a single setting."""
    made = [Setting(length, mbps, data_dir) for length in LENGTHS for mbps in RATES_MBPS]
    return [made[0]] if quick else made


def even_plan(config: Config, units: int) -> Plan:
    """Returns the plan that gives every host as many units as the others, in the given order.

    Args:
      config: Resolved configuration of method accept, whose codecs every link uses.
      units: Number of units of the model.
    """
    length = config.nodes.count + 1
    cuts = tuple(round(units * i / length) for i in range(1, length))
    return plan_of_chain(config, cuts, (OWNER, *(node_name(i) for i in range(1, length))))


def plans_of(config: Config, profile: Profile) -> dict[str, Plan]:
    """Returns the plan of each variant.

    Coded tensors have the fewest bits that the configuration's floors allow; where cuts are
    balanced, the tuner gives each link the bits that it needs, or none.

    Args:
      config: Resolved configuration of method accept, its tensors raw.
      profile: Hosts and links.
    """
    units = len(profile.units)
    coded, auto = copy.deepcopy(config), copy.deepcopy(config)
    auto.tuner.codecs = AUTO
    coded.pipeline.activation_codec = bit_widths(auto.tuner, "activation")[0]
    coded.pipeline.cotangent_codec = bit_widths(auto.tuner, "cotangent")[0]
    return dict(
        zip(
            VARIANTS,
            (
                even_plan(config, units), tune_chain(profile, config).plan,
                even_plan(coded, units), tune_chain(profile, auto).plan,
            ),
            strict=True,
        )
    )  # fmt: skip


def compare(setting: Setting, folder: Path, results: Path, quick: bool = False) -> Compared:
    """Trains all variants of a setting alternately, or reads earlier results."""

    def measure() -> dict[str, Any]:
        config = setting.config(folder)
        config.tuner.codecs = AUTO  # so that codecs are timed, too
        profile = trials.survey(config)
        config.tuner.codecs = ""
        plans = plans_of(resolve(config), profile)
        seconds = _turns(config, profile, list(plans.values()), 1 if quick else TURNS)
        return {
            "profile": profile.to_dict(),
            "plans": {name: plan.to_dict() for name, plan in plans.items()},
            "seconds": {name: seconds[plan] for name, plan in plans.items()},
        }

    found = harness.kept(results, f"accept {setting.saved}" + (" quick" if quick else ""), measure)
    stages = StageCosts(Profile.from_dict(found["profile"]))
    plans = {name: Plan.from_dict(plan) for name, plan in found["plans"].items()}
    return Compared(
        found["seconds"],
        {name: estimate(stages, plan).epoch_s for name, plan in plans.items()},
        {name: str(plan.devices[0]) for name, plan in plans.items()},
    )


def accuracy(config: Config, coded: bool, results: Path, quick: bool = False) -> float:
    """Returns the test accuracy, in [0, 1], after training on a chain of two hosts.

    Links do not affect accuracy and are not shaped. Initial weights and the order of samples depend
    only on the seed, so that raw and coded training with one seed are a pair.

    Args:
      config: Model, data, optimiser and seed; modified in place.
      coded: Whether tensors have the minimum number of bits of the tuner, or all.
      results: Folder in which the accuracy is saved.
      quick: Whether to use part of the data and one epoch.
    """

    def measure() -> float:
        config.name, config.method = f"accuracy{config.seed}{coded:d}", "accept"
        config.epochs = 1 if quick else ACCURACY_EPOCHS
        if quick:
            config.data.train_samples = 2000
        config.nodes.count, config.pipeline.cuts = 1, "2"
        config.pipeline.micro_batches = MICRO_BATCHES
        if coded:
            config.pipeline.activation_codec = bit_widths(config.tuner, "activation")[0]
            config.pipeline.cotangent_codec = bit_widths(config.tuner, "cotangent")[0]
        config.run.evaluate_every, config.run.trace = 0, "none"
        return float(launcher.launch(config)["metrics"]["accuracy"])

    name = f"accept accuracy {config.seed} {'coded' if coded else 'raw'}"
    return float(harness.kept(results, name + (" quick" if quick else ""), measure))


class Learned(NamedTuple):
    """A run that started from predicted times, and its last partition.

    Attributes:
      start_s: Measured epoch of the first partition.
      end_s: Measured epoch of the last partition.
      best_s: Measured epoch of the best partition tried.
      ratio: Ratio of the last to the best partition, from neighbouring epochs.
      plans: Texts of the three.
      changes: Number of changes of the partition.
      tried: Number of trained partitions.
    """

    start_s: float
    end_s: float
    best_s: float
    ratio: float
    plans: tuple[str, str, str]
    changes: int
    tried: int


def learn(setting: Setting, folder: Path, results: Path, quick: bool = False) -> Learned:
    """Trains an adapting chain from predicted times, then its last partition and others.

    Args:
      setting: The chain.
      folder: Folder of runs and data.
      results: Folder of saved measurements.
      quick: Whether to use few epochs and partitions.
    """

    def measure() -> dict[str, Any]:
        config = setting.config(folder)
        config.name, config.epochs = "learning", 4 if quick else LEARNING_EPOCHS
        config.run.trace = "all"  # it has the first plan
        config.tuner.times, config.tuner.adapt, config.tuner.look_s = "predicted", True, LOOK_S
        events: list[dict[str, Any]] = []
        summary = launcher.launch(config, on_event=events.append)
        start = read_run(Path(summary["folder"])).plan
        assert start is not None
        changes = [Plan.from_dict(e["to"]) for e in events if e["event"] == "replanned"]
        end = changes[-1] if changes else start
        config = setting.config(folder)
        profile = trials.survey(config)
        near = near_plans(resolve(config), profile, 2 if quick else 12)
        others = [plan for plan in dict.fromkeys([start, *near]) if plan != end]
        tried = trials.try_plans(config, profile, [end, *others, *others[::-1], end])
        best = min(tried.values(), key=lambda one: one.mean_s).plan
        turns = _turns(config, profile, [end, best], 1 if quick else TURNS)
        return {
            "plans": [one.to_dict() for one in (start, end, best)],
            "start_s": tried[start].mean_s,
            "end": turns[end],
            "best": turns[best],
            "changes": len(changes),
            "tried": len(tried),
        }

    name = f"accept learning {setting.saved}" + (" quick" if quick else "")
    found = harness.kept(results, name, measure)
    start, end, best = (str(Plan.from_dict(one).devices[0]) for one in found["plans"])
    return Learned(
        found["start_s"], statistics.median(found["end"]), statistics.median(found["best"]),
        statistics.median(a / b for a, b in zip(found["end"], found["best"], strict=True)),
        (start, end, best), found["changes"], found["tried"],
    )  # fmt: skip


def near_plans(config: Config, profile: Profile, most: int) -> list[Plan]:
    """Returns the fastest partitions according to profiled times.

    All partitions over any nodes in any order are evaluated.

    Args:
      config: Resolved configuration of method accept.
      profile: Hosts and links.
      most: How many to return.
    """
    stages, count = StageCosts(profile), len(profile.units)
    names = [node_name(i + 1) for i in range(len(profile.nodes))]
    found = {}
    for used in range(1, len(names) + 1):
        for nodes in itertools.permutations(names, used):
            for cuts in itertools.combinations(range(1, count), used):
                plan = plan_of_chain(config, cuts, (OWNER, *nodes))
                found[plan] = estimate(stages, plan).epoch_s
    return sorted(found, key=found.__getitem__)[:most]


def _turns(
    config: Config, profile: Profile, plans: Sequence[Plan], turns: int
) -> dict[Plan, list[float]]:
    """Returns each plan's epochs, the order reversed every other turn."""
    distinct = list(dict.fromkeys(plans))
    order = [plan for turn in range(turns) for plan in distinct[:: -1 if turn % 2 else 1]]
    return {plan: one.seconds for plan, one in trials.try_plans(config, profile, order).items()}
