"""Settings in which the simulator is compared with real runs, and its predictions.

Every setting trains PiPar in processes: the server on one core, the devices on another; several
devices are slowed down, so that they do not saturate that core. Data are random images, since times
do not depend on what is learned. ``experiments.validate_simulator`` runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comms.emulation.shaping import parse_link
from experiments.benchmarks.time_alone import Alone, time_alone
from pipar_jax.config import Config
from pipar_jax.cost_model.from_trace import observed
from pipar_jax.disk.files import replacing
from pipar_jax.launch.pinning import first_cores
from pipar_jax.methods.registry import plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling.link_delay import measure_delay_s
from pipar_jax.report import RecordedRun
from pipar_jax.schedule import actions
from pipar_jax.schedule.actions import AGGREGATE, SEND_FORWARD, ActionKind
from pipar_jax.schedule.plan import COORDINATOR
from pipar_jax.simulator import Costs, LinkModel, simulate
from stages.signature import Signature

LINKS, COUNTS, DEVICES = ("4g", "4g+", "wifi"), (1, 4, 10), (1, 4)
#: Slowdown of several devices, with which they do not saturate one core.
SLOWDOWN = 10.0
INPUT_SHAPE, CLASSES = (32, 32, 3), 10
#: Steps of a round, and rounds of a run, of which the first is a warm-up.
STEPS, ROUNDS = 4, 3


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, its cut, its mini-batch, its stem, and where it is trained.

    Attributes:
      name: Its name.
      cut: Units on a device.
      batch: Samples in a mini-batch.
      stem: One of ``stages.STEMS``, for a ResNet.
      links: The links behind which it is trained.
      devices: The numbers of devices with which it is trained.
    """

    name: str
    cut: int
    batch: int
    stem: str = "cifar"
    links: tuple[str, ...] = LINKS
    devices: tuple[int, ...] = DEVICES

    @property
    def title(self) -> str:
        """Name in the table."""
        return self.name if self.stem == "cifar" else f"{self.name} {self.stem} stem"


#: ResNets with the papers' stem; a step of ResNet-101 takes seconds, so that it has few settings.
NETWORKS = (
    Network("vgg5", 2, 100),
    Network("resnet18", 3, 100, "imagenet"),
    Network("resnet101", 3, 20, "imagenet", LINKS[-1:], DEVICES[:1]),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run."""

    network: Network
    link: str
    micro_batches: int
    devices: int

    @property
    def name(self) -> str:
        """Name in the table."""
        title = self.network.title
        return f"{title} {self.link} N={self.micro_batches} devices={self.devices}"

    def config(self, folder: Path) -> Config:
        """Returns its configuration, with runs and data in a folder."""
        config = Config(name=self.name.replace(" ", "_").replace("=", ""), method="pipar",
                        epochs=ROUNDS)  # fmt: skip
        config.model.name, config.model.stem = self.network.name, self.network.stem
        config.data.source = f"npz:{folder / 'data'}-{self.network.batch}.npz"
        config.data.batch_size = self.network.batch
        config.pipeline.cut, config.pipeline.micro_batches = self.network.cut, self.micro_batches
        config.devices.count = self.devices
        config.devices.defaults.link = self.link
        config.devices.defaults.slowdown = SLOWDOWN if self.devices > 1 else 1.0
        config.run.dir, config.run.evaluate_every = str(folder), 0
        cores = first_cores(2)
        if cores:
            config.server.cpus, config.devices.defaults.cpus = str(cores[0]), str(cores[-1])
        return resolve(config)


def settings(quick: bool = False) -> list[Setting]:
    """Returns the settings; with ``quick`` a single one."""
    if quick:
        return [Setting(NETWORKS[0], LINKS[-1], COUNTS[1], DEVICES[0])]
    return [
        Setting(network, link, count, many)
        for network in NETWORKS
        for many in network.devices
        for link in network.links
        for count in COUNTS
    ]


def grouped(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Returns settings in groups that differ in N only, by a name that has the values of N."""
    keyed: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        keyed.setdefault((setting.network, setting.link, setting.devices), []).append(setting)
    return {
        f"{network.title} {link} devices={devices} "
        f"N={'-'.join(str(setting.micro_batches) for setting in group)}": group
        for (network, link, devices), group in keyed.items()
    }


def write_data(folder: Path, batch: int) -> None:
    """Writes random images, as many as each device's steps need."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", STEPS * batch), ("test", batch)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, *INPUT_SHAPE), np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, CLASSES, count, np.int32)
    with replacing(folder / f"data-{batch}.npz") as aside:
        np.savez(aside, classes=np.array(CLASSES), scale=np.array(255), **arrays)


def time_network(some: Sequence[Setting], folder: Path) -> dict[str, Alone]:
    """Times the functions of server and device separately, at all micro-batch sizes."""
    config = some[0].config(folder)
    plan = plan_for(config, unit_names(config))
    sizes = {
        size
        for one in some
        for size in actions.micro_batch_sizes(one.network.batch, one.micro_batches)
    }
    found = {}
    for host, cpus in ((COORDINATOR, config.server.cpus), ("d0", config.devices.defaults.cpus)):
        found[host] = time_alone(
            config, plan, host, sizes, input_shape=INPUT_SHAPE, classes=CLASSES,
            cores=[int(cpus)] if cpus else [], repeats=9,
        )  # fmt: skip
    return found


def unit_names(config: Config) -> tuple[str, ...]:
    """Returns the names of a configured network's units."""
    # Here, so that --help and wrong flags do not load jax.
    from pipar_jax.runtime.setup import build_model

    return build_model(config, Signature.labelled(INPUT_SHAPE, CLASSES)).unit_names


def time_links(setting: Setting, run: RecordedRun) -> dict[tuple[str, str], LinkModel]:
    """Returns the emulated links, with the separately measured delay of messages."""
    assert run.trace is not None
    nbytes = max(row.nbytes for _, row in run.trace.rows() if row.action.kind == SEND_FORWARD)
    up, down = (
        dataclasses.replace(LinkModel.of(shape), delay_s=measure_delay_s(shape, nbytes))
        for shape in parse_link(setting.link)
    )
    return {ends: up if ends[1] == COORDINATOR else down for ends in run.links}


def predict(setting: Setting, run: RecordedRun, alone: dict[str, Alone]) -> tuple[float, float]:
    """Returns two predictions of a round: from separate times, and from the run's own medians.

    From the run, the first uses the bytes of messages, the short average, and the emulated duration
    of each computation of a slowed device, the minimum of its times.
    """
    assert run.trace is not None
    plan, round_schedule = run.plan, run.schedule()
    assert plan is not None and round_schedule is not None
    by_kind = {
        host: {(kind, samples): s for (*_, kind, samples), s in found.items()}
        for host, found in alone.items()
    }
    seen = observed(run.trace)
    emulated, in_run = seen.seconds(min), seen.seconds()

    def compute_s(device: int, stage: int, kind: ActionKind, samples: int) -> float:
        if kind == AGGREGATE:
            return in_run(device, stage, kind, samples)
        if stage:
            return by_kind[COORDINATOR][kind, samples]
        if setting.devices > 1:
            return emulated(device, stage, kind, samples)
        return by_kind["d0"][kind, samples]

    weights = dict.fromkeys(range(setting.devices), run.weight_bytes)
    costs = Costs(compute_s, seen.wire_bytes(weights), time_links(setting, run))
    beside = dataclasses.replace(costs, compute_s=in_run)
    return (
        simulate(round_schedule, costs, collect=False).seconds,
        simulate(round_schedule, beside, collect=False).seconds,
    )
