"""Settings and plans of the benchmark of AccEPT's parts; its trainings are the benchmark's own."""

import dataclasses
import math
from pathlib import Path

import pytest

from experiments.benchmarks import accept_trials, trials
from pipar_jax.config import Config
from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import NodeProfile, Profile
from pipar_jax.methods.plans import plan_of_chain
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import OWNER, Codecs
from pipar_jax.simulator.predict import StageCosts, estimate
from tests.pipar_jax.tuner import profiles


def chain(rate_bytes_s: float) -> tuple[Config, Profile]:
    """Returns a chain of a device and three nodes 2, 4 and 8 times slower, eight equal units."""
    config = Config(method="accept")
    config.devices.count, config.nodes.count, config.pipeline.micro_batches = 1, 3, 4
    link = LinkModel(rate_bytes_s, 0.001)
    host = profiles.host(units=8)
    device = dataclasses.replace(profiles.device(units=8), up=link, down=link)
    nodes = tuple(NodeProfile(host.slowed(2.0**i), link, link) for i in (1, 2, 3))
    made = profiles.profile(device, units=8, nodes=nodes, codecs=profiles.bit_codecs())
    return resolve(config), made


def test_there_is_a_setting_for_each_length_and_rate() -> None:
    names = [one.name for one in accept_trials.settings()]
    assert len(names) == len(set(names)) == 9
    assert [one.name for one in accept_trials.settings(quick=True)] == names[:1]


def test_a_setting_takes_as_many_images_of_cifar10_as_its_steps_need(tmp_path: Path) -> None:
    for data_dir, source in (("some/folder", "cifar10"), ("", "npz:")):
        config = accept_trials.settings(data_dir=data_dir)[0].config(tmp_path)
        assert config.data.source.startswith(source)
        assert config.data.data_dir == data_dir
        assert config.data.train_samples == (80 if data_dir else 0)


def test_even_cuts_give_every_host_as_many_units_in_the_order_given() -> None:
    config, _ = chain(1e7)
    (one,) = accept_trials.even_plan(config, 8).devices
    assert one.cuts == (2, 4, 6)
    assert one.hosts == ("device", "n1", "n2", "n3")
    assert one.micro_batches == 4


@pytest.mark.parametrize("mbps", [10, 200])
def test_each_variant_does_what_its_name_says(mbps: float) -> None:
    config, profile = chain(mbps * 1.25e5)
    plans = accept_trials.plans_of(config, profile)
    floor = Codecs("bits:3", "bits:7")
    codecs = {name: set(plan.devices[0].codecs) for name, plan in plans.items()}
    assert codecs["even + raw"] == codecs["balanced + raw"] == {Codecs()}
    assert codecs["even + codec"] == {floor}
    stages = StageCosts(profile)
    seconds = {name: estimate(stages, plan).epoch_s for name, plan in plans.items()}
    assert seconds["balanced + raw"] < seconds["even + raw"]
    assert seconds["balanced + codec"] <= seconds["balanced + raw"] * 1.02
    assert seconds["balanced + codec"] <= seconds["even + codec"] * 1.02
    if mbps == 10:
        few = [
            p for p in accept_trials.near_plans(config, profile, 999) if p.devices[0].cuts[0] < 5
        ]
        assert seconds["balanced + codec"] < 0.6 * estimate(stages, few[0]).epoch_s
        assert seconds["balanced + codec"] < 0.75 * seconds["balanced + raw"]
        assert seconds["balanced + codec"] < 0.2 * seconds["even + raw"]
        assert seconds["even + codec"] < 0.4 * seconds["even + raw"]


def test_a_device_keeps_as_many_units_as_suit_it() -> None:
    config, profile = chain(10 * 1.25e5)
    one, stages = accept_trials.plans_of(config, profile)["balanced + raw"], StageCosts(profile)
    assert one.devices[0].cuts[0] > 4  # of eight: behind slow links slow peers are little help
    (best, *_) = accept_trials.near_plans(config, profile, 1)
    assert estimate(stages, one).epoch_s == estimate(stages, best).epoch_s


@pytest.mark.parametrize("mbps", [10, 50, 200])
def test_what_is_not_searched_for_would_not_be_chosen(
    mbps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, profile = chain(mbps * 1.25e5)
    narrow = accept_trials.plans_of(config, profile)
    monkeypatch.setattr("pipar_jax.tuner.chains.NEAR", math.inf)
    monkeypatch.setattr("pipar_jax.tuner.chains.JUDGED", 1000)
    assert accept_trials.plans_of(config, profile) == narrow


def test_measurements_of_other_data_are_saved_apart() -> None:
    one, other = (accept_trials.Setting(2, 10, data_dir) for data_dir in ("", "/data"))
    assert one.name == other.name and one.saved != other.saved


def test_near_plans_are_the_fastest_partitions_first() -> None:
    config, profile = chain(6e6)
    stages = StageCosts(profile)
    near = accept_trials.near_plans(config, profile, 5)
    seconds = [estimate(stages, plan).epoch_s for plan in near]
    assert seconds == sorted(seconds) and len(set(near)) == 5
    # That the planner and the simulator find the best of all is a matter of luck; that they come
    # close is not.
    best = accept_trials.plans_of(config, profile)["balanced + raw"]
    assert seconds[0] <= estimate(stages, best).epoch_s < 1.02 * seconds[0]
    orders = {plan.devices[0].hosts[1:] for plan in accept_trials.near_plans(config, profile, 999)}
    assert len(orders) == 3 + 6 + 6


@pytest.mark.soak
def test_plans_of_a_chain_are_trained_in_one_run(tmp_path: Path) -> None:
    config = trials.base_config(tmp_path, "mlp", 4, 1, "none")
    config.server.cpus = config.devices.defaults.cpus = ""
    config.method, config.nodes.count = "accept", 2
    config.pipeline.micro_batches = 2
    host = profiles.host(units=4)
    nodes = (NodeProfile(host, LinkModel(1e9, 0.0), LinkModel(1e9, 0.0)),) * 2
    made = profiles.profile(profiles.device(units=4, samples=12), units=4, nodes=nodes)
    plans = [
        plan_of_chain(resolve(config), cuts, (OWNER, *hosts))
        for cuts, hosts in (((1, 2), ("n1", "n2")), ((2, 3), ("n2", "n1")), ((1,), ("n2",)))
    ]
    found = trials.try_plans(config, made, [*plans, plans[0]])
    assert {plan: len(one.seconds) for plan, one in found.items()} == {
        plans[0]: 2, plans[1]: 1, plans[2]: 1
    }  # fmt: skip
