"""Settings in which chains over compute nodes are compared with their predictions.

Runs use processes; every host is slowed down, so that all of them together do not saturate their
two cores, and times itself separately before it starts. Epochs are predicted from these times, not
from those of the run. ``experiments.bench_multihop`` runs them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from comms.emulation.shaping import parse_link
from experiments.benchmarks.node_memory import Driven, drive_alone
from experiments.benchmarks.simulator_settings import CLASSES, INPUT_SHAPE, ROUNDS
from pipar_jax.config import Config
from pipar_jax.cost_model.from_trace import observed
from pipar_jax.launch.pinning import first_cores
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling.link_delay import measure_delay_s
from pipar_jax.report import RecordedRun
from pipar_jax.schedule.actions import AGGREGATE, SEND_FORWARD, ActionKind
from pipar_jax.schedule.plan import OWNER, DevicePlan, Plan, device_name, is_node, node_name
from pipar_jax.simulator import Costs, LinkModel, simulate
from stages import Facts, Model

#: The mini-batch of the paper's measurements.
BATCH = 16
#: Slowdowns of nodes and devices.
NODE_SLOWDOWN, DEVICE_SLOWDOWN = 6.0, 12.0
#: Mini-batch size of timed runs, with steps that are long enough to be timed.
BATCHES = {"vgg5": 64, "resnet18": 16}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network whose middle is on nodes, between the device's first unit and its last."""

    name: str

    def bounds(self, model: Model) -> tuple[int, int]:
        """Returns the first unit on the nodes and one past the last."""
        return 1, len(model.units) - 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """The policy for weights that serve all devices."""

    name: str
    weights: str
    in_flight: int = 0


NETWORKS = (Network("vgg19"), Network("resnet101"))
POLICIES = (Policy("shared, 2 in flight", "shared", 2), Policy("shared", "shared"),
            Policy("copy", "copy"))  # fmt: skip


def memory_config(network: Network, cuts: Sequence[int], devices: int) -> Config:
    """Returns the configuration whose memory is measured."""
    config = Config(name=network.name, method="mpsl")
    config.model.name, config.model.stem = network.name, "imagenet"
    config.data.batch_size = BATCH
    config.devices.count, config.nodes.count = devices, len(cuts) - 1
    config.pipeline.cuts = ",".join(map(str, cuts))
    return resolve(config)


def chain_plan(cuts: Sequence[int], devices: int, policy: Policy) -> Plan:
    """Returns a U-shaped plan over as many nodes as the cuts leave."""
    nodes = [node_name(i + 1) for i in range(len(cuts) - 1)]
    one = DevicePlan(tuple(cuts), (OWNER, *nodes, OWNER))
    return Plan((one,) * devices, weights=policy.weights,  # type: ignore[arg-type]
                in_flight=policy.in_flight)  # fmt: skip


def best_cuts(facts: Sequence[Facts], first: int, stop: int, nodes: int) -> tuple[int, ...]:
    """Returns the cuts whose largest node has the least 3W + A, and with K copies K(3W + A).

    Args:
      facts: Sizes of each unit.
      first: The first unit on the nodes.
      stop: One past their last unit.
      nodes: How many there are.
    """
    sizes = [3 * fact.parameter_bytes + fact.residual_bytes for fact in facts]
    sums = list(itertools.accumulate(sizes, initial=0))
    # The minimal largest node so far by number of nodes and position, and its cuts.
    best: dict[int, tuple[int, tuple[int, ...]]] = {first: (0, (first,))}
    for left in range(nodes - 1, -1, -1):
        best = {
            end: min(
                (max(most, sums[end] - sums[start]), (*cuts, end))
                for start, (most, cuts) in best.items()
                if start < end
            )
            for end in range(first + nodes - left, stop - left + 1)
        }
    return best[stop][1]


def model_bytes(facts: Sequence[Facts], cuts: Sequence[int]) -> list[float]:
    """Returns each node's 3W + A by the units' own facts."""
    return [
        sum(3.0 * fact.parameter_bytes + fact.residual_bytes for fact in facts[start:stop])
        for start, stop in itertools.pairwise(cuts)
    ]


def drive_largest(
    network: Network, facts: Sequence[Facts], cuts: Sequence[int], devices: Sequence[int]
) -> dict[tuple[str, int], Driven]:
    """Returns the memory of the largest node of a chain, by policy and number of devices.

    Cases that need more than 60 % of this machine's memory are left out.
    """
    sizes = model_bytes(facts, cuts)
    node = node_name(sizes.index(max(sizes)) + 1)
    room = 0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cases = [
        (policy, count)
        for policy in POLICIES
        for count in devices
        if policy.weights == "shared" or count * max(sizes) < room
    ]
    config = memory_config(network, cuts, max(devices))
    plans = [chain_plan(cuts, count, policy) for policy, count in cases]
    found = drive_alone(config, plans, node, input_shape=INPUT_SHAPE, classes=CLASSES,
                        cores=first_cores(2))  # fmt: skip
    return {(p.name, count): one for (p, count), one in zip(cases, found, strict=True)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
      model: The network's name.
      cuts: Its cuts; empty for the planner's choice.
      nodes: Slowdown of each node relative to ``NODE_SLOWDOWN``.
      devices: Number of devices.
      micro_batches: Number of micro-batches per mini-batch.
      select: How the planner chooses.
      link: Of each node to the next; the devices are behind WiFi.
    """

    model: str
    cuts: str
    nodes: tuple[float, ...]
    devices: int
    micro_batches: int = 2
    select: str = "search"
    link: str = "none"

    @property
    def name(self) -> str:
        """Name in the table."""
        speeds = "+".join(f"{one:g}" for one in self.nodes)
        cuts = self.cuts or f"cuts by {self.select}"
        linked = "" if self.link == "none" else f" links {self.link}"
        return f"{self.model} {cuts} nodes {speeds} devices={self.devices}{linked}"

    def config(self, folder: Path) -> Config:
        """Returns its configuration, with runs and data in a folder."""
        name = "".join(one if one.isalnum() else "_" for one in self.name)
        config = Config(name=name, method="mpsl", epochs=ROUNDS)
        config.model.name, config.model.stem = self.model, "imagenet"
        batch = BATCHES[self.model]
        config.data.source, config.data.batch_size = f"npz:{folder / 'data'}-{batch}.npz", batch
        config.pipeline.cuts, config.pipeline.micro_batches = self.cuts, self.micro_batches
        config.devices.count, config.nodes.count = self.devices, len(self.nodes)
        config.devices.defaults.link = "wifi"
        config.devices.defaults.slowdown = DEVICE_SLOWDOWN
        config.nodes.overrides = {
            i + 1: {"slowdown": NODE_SLOWDOWN * one} for i, one in enumerate(self.nodes)
        }
        config.nodes.defaults.link, config.tuner.select = self.link, self.select
        config.run.dir, config.run.evaluate_every = str(folder), 0
        cores = first_cores(2)
        if cores:
            config.server.cpus = config.devices.defaults.cpus = str(cores[-1])
            config.nodes.defaults.cpus = str(cores[0])
        return resolve(config)


VALIDATED = (
    Setting("vgg5", "1,4", (1.0,), 1),
    Setting("vgg5", "1,2,4", (1.0, 1.0), 2),
    Setting("vgg5", "1,2,3,4", (1.0, 1.0, 1.0), 4),
    Setting("resnet18", "1,9", (1.0,), 2),
    Setting("resnet18", "1,4,9", (1.0, 1.0), 1),
    Setting("resnet18", "1,3,6,9", (1.0, 1.0, 1.0), 2),
)
#: One node, and three of a third of its speed: the same cost.
ONE_HOP = Setting("resnet18", "", (0.5,), 4)
MULTIHOP = Setting("resnet18", "", (1.5, 1.5, 1.5), 4)
#: Nodes of which two have half the speed, with free links and with slow ones: our plan, and that of
#: the paper's objective, which ignores links.
OURS = tuple(Setting("resnet18", "", (1.0, 2.0, 2.0), 4, link=link) for link in ("none", "10/10"))
PAPERS = tuple(dataclasses.replace(setting, select="paper") for setting in OURS)


def predict(run: RecordedRun) -> float:
    """Returns the predicted seconds of a round.

    From the run it uses the bytes of messages, the short averages, and the emulated duration of
    each computation, the minimum of its times.
    """
    assert run.trace is not None
    schedule = run.schedule()
    assert schedule is not None
    seen = observed(run.trace)
    emulated, in_run = seen.seconds(min), seen.seconds()

    def compute_s(device: int, stage: int, kind: ActionKind, samples: int) -> float:
        return (in_run if kind == AGGREGATE else emulated)(device, stage, kind, samples)

    plan = schedule.plan
    weights = dict.fromkeys(range(len(plan.devices)), run.weight_bytes)
    window = float(run.config["pipeline"]["window_mb"]) * 1e6
    nbytes = seen.wire_bytes(weights)
    costs = Costs(compute_s, nbytes, _links(run, plan), window_bytes=window)
    return simulate(schedule, costs, collect=False).seconds


def _links(run: RecordedRun, plan: Plan) -> dict[tuple[str, str], LinkModel]:
    """Returns the emulated links, with the separately measured delay of messages."""
    assert run.trace is not None
    nbytes = max(row.nbytes for _, row in run.trace.rows() if row.action.kind == SEND_FORWARD)
    shapes = dict(zip(("up", "down"), parse_link("wifi"), strict=True))
    shapes["free"] = parse_link("none")[0]
    models = {
        name: dataclasses.replace(LinkModel.of(shape), delay_s=measure_delay_s(shape, nbytes))
        for name, shape in shapes.items()
    }
    devices = {device_name(i) for i in range(len(plan.devices))}
    found = {}
    for one, other in itertools.permutations(plan.hosts(), 2):
        kind = "up" if one in devices else "down" if other in devices else "free"
        if kind != "free" or is_node(one) or is_node(other):
            found[one, other] = models[kind]
    return found
