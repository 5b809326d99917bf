"""The tuner against real runs: settings, trained plans, and results.

``experiments.bench_tuner`` runs them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import stages
from experiments.benchmarks import harness, trials
from pipar_jax.config import Config
from pipar_jax.config.codec_candidates import BITS
from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import (
    CodecProfile,
    DeviceProfile,
    HostProfile,
    Profile,
    UnitFacts,
)
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import Plan

LINKS, SLOWDOWNS = ("4g", "4g+", "wifi", "lan"), (1.0, 10.0)


class Network(NamedTuple):
    """A network of the table.

    Attributes:
      name: Its name.
      batch: Samples in a mini-batch.
      most: Maximum number of near plans that are trained: large networks compile slowly for each
        cut.
      links: The links behind which it is trained.
    """

    name: str
    batch: int
    most: int
    links: tuple[str, ...] = LINKS


#: The networks by their stem. The weights of ResNet-101, 170 MB, move with every change of plan,
#: which takes minutes behind slow links.
NETWORKS = {
    "cifar": (
        Network("vgg5", 100, 99), Network("resnet18", 20, 8), Network("mobilenetv3_small", 20, 8),
    ),
    "imagenet": (Network("resnet18", 20, 8), Network("resnet101", 10, 3, ("wifi", "lan"))),
}  # fmt: skip
#: Rounds in which the tuner's plan and the best of the others alternate.
TURNS = 4

#: Slowdowns of unequal devices, doubled because they share one core here.
UNEQUAL = (2.0, 10.0, 40.0)
#: Their links: equal ones, and slower ones for faster devices.
UNEQUAL_LINKS = {"4G+": ("4g+",) * 3, "4G, 4G+, WiFi": ("4g", "4g+", "wifi")}
#: A host of ``many_devices``: its rates, and the seconds of calling a compiled function.
FLOPS, BYTES_S, CODED_BYTES_S, CALL_S = 1e11, 1e10, 1e9, 1e-4


@dataclasses.dataclass(frozen=True)
class Setting:
    """One network, link and slowdown; there are two slow devices, which share the server."""

    network: Network
    stem: str
    link: str
    slowdown: float
    quick: bool = False

    @property
    def name(self) -> str:
        """Name in the table."""
        stem = "" if self.stem == "cifar" else f" {self.stem} stem"
        quick = " quick" if self.quick else ""
        return f"{self.network.name}{stem} {self.link} {self.slowdown:g}x{quick}"

    def config(self, folder: Path) -> Config:
        """Returns its configuration, with runs and data in a folder."""
        devices = 1 if self.slowdown == 1.0 else 2
        network = self.network
        config = trials.base_config(folder, network.name, network.batch, devices, self.link)
        config.model.stem = self.stem
        config.devices.defaults.slowdown = self.slowdown
        return config


class Choice(NamedTuple):
    """The tuner's plan compared with the trained plans.

    Attributes:
      tuner_plan: Text of the tuner's plan.
      best_plan: Text of the fastest measured plan.
      paper_plan: Text of the plan of the paper's formulas.
      tuner_s: Seconds per round of the tuner's plan.
      best_s: Seconds per round of the fastest plan.
      paper_s: Seconds per round of the paper's plan.
      ratio: Ratio of the tuner's plan to the best, from neighbouring rounds.
      paper: Ratio of the paper's plan to the best.
      spread: Median difference between two rounds of the same plan, as a share.
      error: Median error of the predictions, as a share.
      plans: Number of trained plans.
    """

    tuner_plan: str
    best_plan: str
    paper_plan: str
    tuner_s: float
    best_s: float
    paper_s: float
    ratio: float
    paper: float
    spread: float
    error: float
    plans: int


def settings(stems: Iterable[str] = tuple(NETWORKS), quick: bool = False) -> list[Setting]:
    """Returns the settings of networks with some stems; with ``quick`` a single one."""
    made = [
        Setting(network, stem, link, slowdown)
        for stem in stems
        for network in NETWORKS[stem]
        for link in network.links
        for slowdown in SLOWDOWNS
    ]
    if quick:
        fast = next(setting for setting in made if setting.link == "lan")
        return [dataclasses.replace(fast, network=fast.network._replace(most=2), quick=True)]
    return made


def choice(setting: Setting, folder: Path, results: Path) -> Choice:
    """Measures a setting, or reads earlier results."""

    def measure() -> dict[str, Any]:
        config = setting.config(folder)
        profile = trials.survey(config)
        found = trials.candidates(profile, resolve(config))
        (tuner,), paper = found["tuner"], found["paper"]
        near = found["near"][: setting.network.most]
        twice = list(dict.fromkeys([tuner, *paper, *near]))
        once = [plan for plan in found["others"] if plan not in twice]
        # Forth and back, so that a change of the machine's speed favours no plan.
        tried = trials.try_plans(config, profile, [*twice, *once, *twice[::-1]])
        best = min(tried.values(), key=lambda one: one.mean_s).plan
        turns = trials.try_plans(config, profile, [tuner, best] * TURNS) if best != tuner else {}
        return {
            "tuner": tuner.to_dict(),
            "best": best.to_dict(),
            "paper": paper[0].to_dict() if paper else tuner.to_dict(),
            "tried": [[one.plan.to_dict(), one.predicted_s, one.seconds] for one in tried.values()],
            "turns": [
                [turn.plan.to_dict(), turn.predicted_s, turn.seconds] for turn in turns.values()
            ],
            "profile": profile.to_dict(),
        }

    return _judge(harness.kept(results, setting.name, measure))


def _judge(found: dict[str, Any]) -> Choice:
    """Computes the results of a setting from its measurements."""
    tuner, best, paper = (Plan.from_dict(found[name]) for name in ("tuner", "best", "paper"))
    tried = _tried(found["tried"])
    turns = _tried(found["turns"]) or {tuner: tried[tuner]}
    pairs = zip(turns[tuner].seconds, turns[best].seconds, strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    twice = [one for one in tried.values() if len(one.seconds) > 1]
    return Choice(
        trials.words(tuner), trials.words(best), trials.words(paper),
        statistics.median(turns[tuner].seconds), statistics.median(turns[best].seconds),
        tried[paper].mean_s, ratio, tried[paper].mean_s / tried[best].mean_s,
        statistics.median((max(o.seconds) - min(o.seconds)) / o.mean_s for o in twice),
        statistics.median(abs(o.predicted_s / o.mean_s - 1.0) for o in tried.values()),
        len(tried),
    )  # fmt: skip


class Unequal(NamedTuple):
    """Individual plans against a common one, in seconds per round, and the texts of the plans."""

    own_s: float
    common_s: float
    own_plan: str
    common_plan: str


def unequal(folder: Path, results: Path, links: Sequence[str], quick: bool = False) -> Unequal:
    """Trains unequal devices alternately under the tuner's plan and the best common ones.

    Args:
      folder: Folder of runs and data.
      results: Folder of saved measurements.
      links: Link of each device.
      quick: Whether to try few common plans.
    """

    def measure() -> dict[str, Any]:
        config = trials.base_config(folder, "vgg5", 100, len(UNEQUAL), links[0])
        config.devices.overrides = {
            device: {"slowdown": slower, "link": link}
            for device, (slower, link) in enumerate(zip(UNEQUAL, links, strict=True))
        }
        profile = trials.survey(config)
        found = trials.candidates(profile, resolve(config))
        common = found["near"][: 2 if quick else 6]
        tried = trials.try_plans(config, profile, [*common, *common[::-1]])
        best = min(tried.values(), key=lambda one: one.mean_s).plan
        own = found["tuner"][0]
        turns = trials.try_plans(config, profile, [own, best] * (1 if quick else TURNS))
        rows = [[turn.plan.to_dict(), turn.predicted_s, turn.seconds] for turn in turns.values()]
        return {"own": own.to_dict(), "best": best.to_dict(), "turns": rows}

    found = harness.kept(
        results, f"unequal {' '.join(links)}" + (" quick" if quick else ""), measure
    )
    turns = _tried(found["turns"])
    own, best = (Plan.from_dict(found[name]) for name in ("own", "best"))
    return Unequal(
        statistics.median(turns[own].seconds), statistics.median(turns[best].seconds),
        trials.words(own), trials.words(best),
    )  # fmt: skip


def many_devices(unequal: bool = False, devices: int = 20) -> Profile:
    """Returns a profile of many devices and ResNet-101, its times by floating-point operations.

    Args:
      unequal: Whether devices and links are of three kinds, or all equal.
      devices: Number of devices.
    """
    batch, sizes = 100, (5, 25, 100)
    model = stages.build("resnet101", input_shape=trials.INPUT_SHAPE, classes=trials.CLASSES)
    units = stages.unit_facts(model, batch)

    def seconds(flops: float) -> tuple[float, ...]:
        return tuple(CALL_S + flops / FLOPS * size / batch for size in sizes)

    forward = [seconds(unit.forward_flops) for unit in units]
    backward = [seconds(unit.backward_flops) for unit in units]
    # The last unit is one call: forward, loss and backward.
    backward[-1] = seconds(units[-1].forward_flops + units[-1].backward_flops)
    forward[-1] = (0.0,) * len(sizes)
    updates = tuple(CALL_S + 5 * unit.parameter_bytes / BYTES_S for unit in units)
    host = HostProfile(sizes, tuple(forward), tuple(backward), updates, CALL_S, 3 / BYTES_S)
    facts = tuple(
        UnitFacts(
            "+".join(unit.units), unit.parameter_bytes, unit.state_bytes, unit.parameter_bytes,
            unit.output_bytes / batch, unit.residual_bytes / batch,
        )
        for unit in units
    )  # fmt: skip
    links = [LinkModel(rate * 1.25e5, 0.002, 2e-4) for rate in (10.0, 20.0, 50.0)]
    made = []
    for index in range(devices):
        slower, link = (
            ((1.0, 5.0, 20.0)[index % 3], links[index % 3]) if unequal else (5.0, links[1])
        )
        made.append(DeviceProfile(host.slowed(slower), 500, link, link))
    codecs = {
        f"bits:{bits}": CodecProfile((bits + 1.125) / 32, 1 / CODED_BYTES_S, 1 / CODED_BYTES_S)
        for bits in BITS
    }
    return Profile("resnet101", batch, facts, host, tuple(made), codecs=codecs, window_bytes=32e6)


def _tried(rows: Sequence[Any]) -> dict[Plan, trials.Tried]:
    found = [trials.Tried(Plan.from_dict(plan), s, seconds) for plan, s, seconds in rows]
    return {one.plan: one for one in found}
