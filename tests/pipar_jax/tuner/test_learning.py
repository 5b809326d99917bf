"""A chain that was planned by wrong times learns the right ones while it trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import optax
import pytest

from experiments.latency_data import collect
from pipar_jax.config import Config
from pipar_jax.cost_model.profile import DeviceProfile, HostProfile, NodeProfile, Profile, UnitFacts
from pipar_jax.errors import PlanError
from pipar_jax.methods.plans import plan_of_chain
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling.predictor.online import Learner
from pipar_jax.profiling.predictor.operators import Tables
from pipar_jax.profiling.predictor.predict_host import facts_of, one_call
from pipar_jax.profiling.predictor.reference import reference_layers
from pipar_jax.protocol.values import Seen
from pipar_jax.roles.candidates import Candidates
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE
from pipar_jax.schedule.plan import Boundary, Plan
from pipar_jax.simulator import LinkModel
from pipar_jax.simulator.predict import HostTimes, StageCosts, estimate
from pipar_jax.tuner.chains import tune_chain
from pipar_jax.tuner.drift import LinkThroughput, ProfileTracker, differ, lone
from tests.pipar_jax.profiling.predictor import synthetic
from tests.pipar_jax.runtime import support
from tests.pipar_jax.tuner import profiles

BATCH, PARTS = 16, 4
LINK = LinkModel(12.5e6, 0.001, 1e-4)
NODES = 3


def config(**pipeline) -> Config:
    made = Config(method="accept")
    made.devices.count, made.nodes.count = 1, NODES
    made.data.batch_size, made.pipeline.micro_batches = BATCH, PARTS
    for name, value in pipeline.items():
        setattr(made.pipeline, name, value)
    return resolve(made)


def chain_profile(hosts: dict[str, HostProfile], units) -> Profile:
    nodes = tuple(NodeProfile(hosts[f"n{i + 1}"], LINK, LINK) for i in range(NODES))
    device = DeviceProfile(hosts["d0"], 160, LINK, LINK)
    return Profile("made-up", BATCH, units, hosts["d0"], (device,), nodes=nodes)


def seen(times_s, plan: Plan, count: int, host: str) -> list[Seen]:
    """What a host's computations last: one median for each kind and stage."""
    found = []
    for stage in range(plan.devices[0].stages):
        if plan.host(0, stage) != host:
            continue
        units = plan.units(0, stage, count)
        last = stage == plan.devices[0].stages - 1
        for kind in ((LOSS,) if last else (FORWARD, BACKWARD)) + (UPDATE,):
            size = 0 if kind == UPDATE else BATCH // PARTS
            found.append(Seen(0, stage, kind, size, 9, times_s(host, kind, units, size)))
    return found


def follow(watch: ProfileTracker, made: Config, times_s, count: int, looks: int) -> list[Plan]:
    """Changes to the best chain after each look; returns the plans."""
    plans = []
    for _ in range(looks):
        plans.append(tune_chain(watch.profile(), made).plan)
        for host in ("d0", *(f"n{i + 1}" for i in range(NODES))):
            watch.computed(host, plans[-1], seen(times_s, plans[-1], count, host))
    plans.append(tune_chain(watch.profile(), made).plan)
    return plans


def slowdown(true: Profile, plan: Plan) -> float:
    """Returns by how much a plan is slower than the best, by true times."""
    best = tune_chain(true, config()).epoch_s
    return estimate(StageCosts(true), plan).epoch_s / best


@pytest.mark.parametrize("wrong", [0.2, 3.0])
def test_a_node_that_is_unlike_its_profile_gets_the_units_that_it_should(wrong):
    speeds = {"d0": 1.0, "n1": 2.0, "n2": 1.0, "n3": 4.0}
    hosts = {name: profiles.host(1e-3, units=12).slowed(s) for name, s in speeds.items()}
    true = chain_profile(hosts, profiles.profile(profiles.device(units=12), units=12).units)
    believed = chain_profile(hosts | {"n3": hosts["n3"].slowed(wrong)}, true.units)
    times = {name: HostTimes(host) for name, host in hosts.items()}

    def times_s(host, kind, units, size):
        return times[host].time_s(kind, units.start, units.stop, size)

    plans = follow(ProfileTracker(believed), config(), times_s, 12, 2)
    if wrong < 1:
        assert slowdown(true, plans[0]) > 1.2  # it was worth learning
    assert slowdown(true, plans[-1]) < 1.03


@pytest.mark.parametrize(("method", "units", "least"), [("mpsl", 2, 3), ("accept", 1, 2)])
def test_a_model_with_fewer_units_than_a_chain_has_stages_is_told_so(method, units, least):
    made = config()
    made.method = method
    host = profiles.host(1e-3, units=units)
    believed = chain_profile(
        {name: host for name in ("d0", "n1", "n2", "n3")},
        profiles.profile(profiles.device(units=units), units=units).units,
    )
    with pytest.raises(PlanError, match=f"has {units} units, and a chain at least {least} stages"):
        tune_chain(believed, made)


class World:
    """Four hosts and a network of a kind that the predictor knows."""

    def __init__(self) -> None:
        self.model = collect.build("chain3")
        self.tables = Tables(self.model)
        self.sizes = tuple(1e8 + i for i in range(len(reference_layers())))  # steps last the same
        self.laws = {name: synthetic.Law(4 + i) for i, name in enumerate(("d0", "n1", "n2", "n3"))}
        self.units = facts_of(self.model, optax.sgd(0.1), BATCH)
        sizes = (BATCH // PARTS, BATCH)
        self.hosts = {name: self._host(law, sizes) for name, law in self.laws.items()}
        self.true = chain_profile(self.hosts, self.units)

    def _host(self, law: synthetic.Law, sizes) -> HostProfile:
        forward, backward = (
            tuple(tuple(each(self.tables.at(n)[i]) for n in sizes) for i in range(len(self.units)))
            for each in (law.forward_s, law.backward_s)
        )
        whole = tuple(f + b - law.call_s for f, b in zip(forward[-1], backward[-1], strict=True))
        return HostProfile(sizes, (*forward[:-1], (0.0, 0.0)), (*backward[:-1], whole),
                           (1e-4,) * len(forward), law.call_s)  # fmt: skip

    def learner(self, name: str, wrong: float = 1.0) -> Learner:
        reference = dataclasses.replace(
            synthetic.reference_times(self.laws[name], wrong), parameter_bytes=self.sizes
        )
        return Learner(self.model, reference, synthetic.weights(), self.tables)

    def times_s(self, host, kind, units, size) -> float:
        if kind == UPDATE:
            return 1e-4
        law, table = (
            self.laws[host],
            np.concatenate(one_call(self.tables.at(size)[units.start : units.stop])),
        )
        ahead, back = law.forward_s(table), law.backward_s(table)
        return {FORWARD: ahead, BACKWARD: back, LOSS: ahead + back - law.call_s}[kind]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(
    ("host", "wrong"), [pytest.param("n1", 0.2, marks=pytest.mark.soak), ("n2", 0.2), ("n2", 2.5)]
)
def test_predictions_that_mislead_are_learned_from_the_stages_of_the_run(world, host, wrong):
    learners = {name: world.learner(name, wrong if name == host else 1.0) for name in world.laws}
    sizes = world.true.nodes[0].host.sizes
    believed = {name: learner.profile(sizes) for name, learner in learners.items()}
    watch = ProfileTracker(chain_profile(believed, world.units), learners)
    state = watch.state()
    plans = follow(watch, config(), world.times_s, len(world.units), 3)
    assert slowdown(world.true, plans[0]) > 1.2  # it was worth learning
    assert slowdown(world.true, plans[-1]) < 1.03
    assert differ(state, watch.state(), 0.5)


def test_only_what_was_predicted_is_learned_and_memory_stays(world):
    hosts = world.hosts | {"n1": dataclasses.replace(world.hosts["n1"], memory_bytes=1e9)}
    base = chain_profile(hosts, world.units)
    watch = ProfileTracker(base, {"n1": world.learner("n1")})
    assert watch.profile() == base
    plan = tune_chain(base, config()).plan
    watch.computed("n1", plan, [Seen(0, 1, UPDATE, 0, 3, 1.0)])
    now, was = watch.profile().nodes[0].host, base.nodes[0].host
    assert now.update_s[0] > 100 * was.update_s[0]
    assert dataclasses.replace(now, update_s=was.update_s) == was  # nothing else is told by steps
    rows = seen(world.times_s, plan, len(world.units), plan.host(0, 1))
    slower = [one._replace(median_s=3 * one.median_s) for one in rows]
    watch.computed("n1", plan, slower)
    watch.computed("n2", plan, slower)
    now = watch.profile()
    assert now.nodes[0].host.memory_bytes == 1e9
    assert now.nodes[0].host != base.nodes[0].host
    factor = now.nodes[1].host.update_s[0] / base.nodes[1].host.update_s[0]
    assert now.nodes[1].host == base.nodes[1].host.slowed(factor)


def test_a_rate_between_nodes_is_that_of_the_lower_ones_line(world):
    watch = ProfileTracker(world.true)
    there, back = Boundary("n2", "n1", 1), Boundary("d0", "n2", 0)
    for total in (LinkThroughput(1e6, 1.0), LinkThroughput(3e6, 3.0)):
        watch.carried(there, "n1", total)
        watch.carried(back, "d0", total)
    now = watch.profile()
    assert now.nodes[1].up.rate_bytes_s == pytest.approx(1e6)
    assert now.devices[0].down.rate_bytes_s == pytest.approx(1e6)
    untouched = (now.nodes[1].down, now.nodes[0].up, now.nodes[0].down, now.devices[0].up)
    assert set(untouched) == {LINK}


def test_links_that_share_a_line_tell_no_rate():
    made = config(cuts="1,2,3")
    ends = plan_of_chain(made, (1, 2), ("device", "n2", "n1"))
    assert set(lone(ends)) == set(ends.boundaries())
    home = plan_of_chain(made, (1, 2, 3), ("device", "n2", "n1", "device"))
    assert lone(home) == (Boundary("n2", "n1", 1),)


def unequal(memory_bytes: float | None = None) -> Profile:
    """Two slow nodes and a quick one; twelve units, 100 kB each."""
    speeds = {"d0": 8.0, "n1": 8.0, "n2": 8.0, "n3": 1.0}
    host = dataclasses.replace(profiles.host(1e-3, units=12), memory_bytes=memory_bytes)
    units = tuple(UnitFacts(f"u{i}", 1e5, 0.0, 1e5, 512.0, 512.0) for i in range(12))
    return chain_profile({name: host.slowed(factor) for name, factor in speeds.items()}, units)


def test_plans_that_somebody_objects_to_are_not_proposed():
    best = tune_chain(unequal(), config())
    other = tune_chain(unequal(), config(), lambda one: "no" if one == best.plan else None)
    assert other.plan != best.plan
    assert other.epoch_s >= best.epoch_s
    with pytest.raises(PlanError, match=r"no chain .* can be planned: all are away"):
        tune_chain(unequal(), config(), lambda one: "all are away")


def test_a_planner_that_counts_too_little_memory_is_told_of_less():
    """What a node really needs is half as much again as the planner counts."""
    profile = unequal(2.4e6)  # by its count eight units, in truth five

    def objection(plan: Plan) -> str | None:
        held = max(len(plan.held_units(node, 12)) for node in ("n1", "n2", "n3"))
        return "no room" if 1.5 * 3 * 1e5 * held > 2.4e6 else None

    free = tune_chain(profile, config(), lambda _: None)  # by the planner's own count
    assert objection(free.plan) is not None
    found = tune_chain(profile, config(), objection)
    assert objection(found.plan) is None
    assert found.epoch_s > free.epoch_s


def test_a_plan_that_a_node_refused_is_no_candidate_any_more():
    network = support.model(dtype="float32")
    host = profiles.host(1e-3, units=len(network.units))
    units = profiles.profile(profiles.device(units=4), units=4).units
    profile = chain_profile({name: host for name in ("d0", "n1", "n2", "n3")}, units)
    candidates = Candidates(config(), network, (160,))
    present = plan_of_chain(config(), (1, 2, 3), ("device", "n3", "n2", "n1"))
    refused = []
    while (best := candidates.best(profile, present)) not in refused and best != present:
        refused.append(best)
        candidates.refuse(best, "no room")
        assert candidates.refused(best)
    assert refused
    assert best == present  # nothing else is left
