"""The configuration: defaults work, wrong values are named, copies and JSON are exact."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pipar_jax
from comms import parse_link
from pipar_jax import config as configuration
from pipar_jax.config import Config, HostSpec, difference, schema
from pipar_jax.config.slowdown import Slowdown
from pipar_jax.errors import ConfigError
from pipar_jax.methods.checks import OF_AVERAGES
from pipar_jax.methods.registry import METHODS, hosts_of, uses_nodes
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import HostKind, Order


def test_the_defaults_are_a_configuration() -> None:
    config = Config()
    made = resolve(config)
    config.run.dir = str(pathlib.Path("runs").absolute())
    assert made == config
    assert made is not config and made.data is not config.data


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cohort.first": 1, "cohort.quorum": 2}, "less than cohort.quorum=2"),
        (
            {"cohort.size": 0.5, "method": "mpsl", "nodes.count": 1},
            "links between devices and compute nodes",
        ),
        (
            {"cohort.size": 1, "devices.overrides": {1: {"cut": 2}}},
            r"devices\.1\.cut=2 .* cut alike",
        ),
        ({"cohort.quorum": 1, "tuner.adapt": True}, "may lose hosts"),
        ({"cohort.size": 1, "tuner.adapt": True}, "cohort.size=1"),
        ({"cohort.first": 1, "method": "sl"}, "take turns"),
        ({"cohort.deadline_s": 1, "pipeline.weights": "shared"}, "none has finished before"),
        ({"cohort.first": 1, "pipeline.weights": "shared"}, "none has finished before"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_of_the_cohort_that_do_not_go_together_are_told(fields: dict, says: str) -> None:
    config = Config()
    for path, value in fields.items():
        holder, (*groups, name) = config, path.split(".")
        for group in groups:
            holder = getattr(holder, group)
        setattr(holder, name, value)
    with pytest.raises(ConfigError, match=says):
        resolve(config)


#: What changes an average, with a value that is not the default's.
AVERAGES = {"proximal_mu": 0.1, "rule": "fedavgm", "learning_rate": 0.5, "weighted": False,
            "codec": "int8"}  # fmt: skip


@pytest.mark.parametrize("field", AVERAGES)
@pytest.mark.parametrize("method", METHODS)
def test_what_changes_an_average_is_refused_where_nothing_is_averaged(method, field) -> None:
    config = Config(method=method)
    setattr(config.aggregation, field, AVERAGES[field])
    if uses_nodes(method):
        config.nodes.count = 1
    if METHODS[method].one_device:
        config.devices.count = 1
    if METHODS[method].order != Order.SEQUENTIAL:
        resolve(config)
        return
    says = rf"^aggregation\.{field}={AVERAGES[field]} .* method={method} devices take turns .*leave"
    with pytest.raises(ConfigError, match=says):
        resolve(config)


@pytest.mark.parametrize("field", AVERAGES)
def test_an_average_that_the_tuner_may_choose_not_to_make_is_refused(field) -> None:
    config = Config(method="auto")
    setattr(config.aggregation, field, AVERAGES[field])
    says = r"tuner\.methods='fl,sl,sfl,pipar' may choose sl, .* tuner\.methods=fl,sfl,pipar$"
    with pytest.raises(ConfigError, match=says):
        resolve(config)
    config.tuner.methods = "fl,sfl,pipar"
    resolve(config)


def test_every_field_of_averages_is_tried() -> None:
    assert set(AVERAGES) == set(OF_AVERAGES)


@pytest.mark.parametrize(
    ("size", "count", "expected"), [(0, 7, 7), (3, 7, 3), (0.5, 7, 4), (0.01, 7, 1), (1, 7, 1)]
)
def test_a_cohort_has_as_many_places_as_its_size_says(size, count, expected) -> None:
    config = Config()
    config.cohort.size, config.devices.count = size, count
    resolve(config)
    assert configuration.places(config.cohort, config.devices.count) == expected


def test_every_option_has_help_and_a_default_that_fits() -> None:
    for one in schema.options(Config):
        assert one.text and one.expects
        assert schema.fit(one, one.default) == one.default


@pytest.mark.parametrize("one", list(schema.options(Config)), ids=lambda one: one.path)
def test_every_option_refuses_a_value_of_another_type(one: schema.ConfigField) -> None:
    with pytest.raises(ConfigError, match=one.path):
        schema.fit(one, [1, 2])


WRONG = [
    ("method", "piper", "did you mean 'pipar'"),
    ("name", "a/b", "letters, digits"),
    ("seed", -1, "≥ 0"),
    ("epochs", 0, "≥ 1"),
    ("epochs", 1.5, "whole number"),
    ("epochs", True, "whole number"),
    ("model.name", "resnet81", "did you mean 'resnet18'"),
    ("model.norm", "layer", "batch, group"),
    ("data.source", "cifar11", "did you mean 'cifar10'"),
    ("data.source", "npz:", "npz:PATH"),
    ("data.source", "module:numbers", "module:NAME:FUNCTION"),
    ("data.test_source", "npz:x.npz", "leave it empty"),
    ("data.classes", 5, "leave it 0"),
    ("data.alpha", 0.0, "> 0"),
    ("data.alpha", float("nan"), "a number"),
    ("data.augment", "crop", "crop_flip"),
    ("data.batch_size", "100", "whole number"),
    ("data.train_samples", 1, "every device needs a sample"),
    ("optimizer.momentum", 1.0, "< 1"),
    ("optimizer.clip_norm", 0.0, "> 0"),
    ("aggregation.every", "0 steps", "10 steps"),
    ("aggregation.every", "sometimes", "10 steps"),
    ("cohort.size", 2.5, "a fraction below 1"),
    ("cohort.size", 3, "more than the 2 devices of devices.count and devices.more"),
    ("cohort.size", -1, "≥ 0"),
    ("cohort.select", "unifrom", "did you mean 'uniform'"),
    ("cohort.select", "module:numbers", "module:NAME:FUNCTION"),
    ("cohort.min_devices", 3, "more than the 2 devices of devices.count and devices.more"),
    ("devices.more", 2, "additional devices need data of their own"),
    ("devices.more", 10_001, "10000"),
    ("cohort.quorum", 3, "more than the cohort, which has 2 devices"),
    ("cohort.first", 3, "more than the cohort, which has 2 devices"),
    ("cohort.below", "stop", "end, repeat, wait"),
    ("cohort.optimizer_state", "fresh", "auto, keep, reset"),
    ("cohort.script", "no/such/membership.jsonl", "there is no such file"),
    ("run.nonfinite", "drop", "set cohort.quorum"),
    ("pipeline.cut", 0, "smallest cut is 1"),
    ("pipeline.cut", "", "name of a unit"),
    ("pipeline.dispatch", "fcsf", "did you mean 'fcfs'"),
    ("devices.count", 0, "≥ 1"),
    ("devices.defaults.link", "5g", "unknown link"),
    ("devices.defaults.slowdown", 0.5, "≥ 1"),
    ("devices.defaults.cpus", "0-", "1-3,5"),
    ("devices.overrides", {2: {"link": "4g"}}, "devices.count=2"),
    ("nodes.overrides", {1: {"link": "4g"}}, "nodes.count=0: raise nodes.count"),
    ("devices.overrides", {1: {"lnik": "4g"}}, "did you mean 'link'"),
    ("devices.overrides", {1: {"slowdown": "fast"}}, "devices.1.slowdown"),
    ("devices.overrides", {1: {"cut": 0}}, "devices.1.cut"),
    ("devices.overrides", {1: {"data_source": "npz:x.npz"}}, "each has its own data"),
    ("server.cpus", "b", "server.cpus"),
    ("server.port", 70000, "≤ 65535"),
    ("server.host", "0.0.0.0", "network.token"),
    ("network.token", "", "empty"),
    ("network.token", "env:PIPAR_NO_SUCH_VARIABLE", "not set"),
    ("network.token", "file:/no/such/file", "cannot be read"),
    ("network.deadline_s", 0, "> 0"),
]


@pytest.mark.parametrize(("path", "value", "says"), WRONG, ids=[f"{p}={v}" for p, v, _ in WRONG])
def test_a_wrong_value_is_refused_with_field_value_and_remedy(
    path: str, value: object, says: str
) -> None:
    config = Config()
    _set(config, path, value)
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    message = str(caught.value)
    assert says in message
    assert path.rpartition(".")[2] in message or path == "devices.overrides"
    assert "\n" not in message


def test_a_whole_number_in_a_field_for_numbers_becomes_a_float() -> None:
    config = Config()
    config.devices.defaults.slowdown = 10
    config.devices.overrides[1] = {"slowdown": 20}
    made = resolve(config)
    assert isinstance(made.devices.defaults.slowdown, float)
    assert isinstance(hosts_of(made).device(1).slowdown.factor, float)


def test_a_value_of_numpy_is_taken_as_python_s() -> None:
    given: dict[str, Any] = {"seed": np.int64(3), "epochs": np.uint8(2), "method": np.str_("fl")}
    config = Config(**given, debug=np.bool_(True))  # type: ignore[arg-type]
    config.optimizer.learning_rate = np.float64(0.5)
    config.optimizer.clip_norm = np.int32(2)  # type: ignore[assignment]
    made = resolve(config)
    found = made.seed, made.epochs, made.debug, made.optimizer.learning_rate, made.method
    assert found == (3, 2, True, 0.5, "fl")
    assert [type(one) for one in found] == [int, int, bool, float, str]
    assert (
        made.optimizer.clip_norm == 2.0
        and configuration.from_json(configuration.to_json(made)) == made
    )
    config.epochs = np.float32(1.5)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"epochs=1.5 is not valid: expected a whole number"):
        resolve(config)


def test_a_group_of_another_type_is_refused() -> None:
    config = Config()
    config.model = "vgg5"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="model must be a ModelConfig"):
        resolve(config)


def test_a_device_takes_the_defaults_then_its_overrides_and_nothing_stays_open() -> None:
    config = Config()
    config.pipeline.cut, config.pipeline.micro_batches = 2, 5
    config.devices.defaults.link = "wifi"
    config.devices.overrides[1] = {"link": "4g", "cut": "conv1", "slowdown": 3.0}
    config = resolve(config)
    hosts = hosts_of(config)
    assert hosts.device(0) == HostSpec(
        "d0", HostKind.DEVICE, 0, *parse_link("wifi"),
        platform="cpu", cut=2, micro_batches=5, data_source="digits",
    )  # fmt: skip
    assert hosts.device(1) == HostSpec(
        "d1", HostKind.DEVICE, 1, *parse_link("4g"), Slowdown(3.0),
        platform="cpu", cut="conv1", micro_batches=5, data_source="digits",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="there is no host 'd2'"):
        hosts.device(2)


def test_hosts_are_found_by_their_names_and_no_others() -> None:
    config = Config(method="mpsl")
    config.nodes.count, config.pipeline.cuts = 2, "1,2,3"
    config.nodes.overrides[2] = {"memory_mb": 3.0, "port": 4711, "cpus": "0,2-3"}
    hosts = hosts_of(resolve(config))
    assert tuple(hosts) == ("server", "n1", "n2", "d0", "d1")
    assert len(hosts) == 5
    assert all(name in hosts and hosts[name].name == name for name in hosts)
    assert [hosts[name].index for name in hosts] == [0, 1, 2, 0, 1]
    assert hosts["n2"].address == ("127.0.0.1", 4711)
    assert (hosts["n1"].memory_bytes, hosts["n2"].memory_bytes) == (None, 3e6)
    assert hosts["n2"].cores == {0, 2, 3}
    for name in ("d2", "n0", "n3", "d01", "d-1", "d\u0661", "D0", "d", "", "device"):
        assert name not in hosts
        with pytest.raises(ConfigError, match="there is no host"):
            hosts[name]
    assert hosts_of(Config()).nodes == ()


def test_own_data_have_the_device_in_their_name() -> None:
    config = Config()
    config.data.source = "npz:shard-{device}.npz"
    config.data.test_source = "npz:test.npz"
    config = resolve(config)
    assert hosts_of(config).device(1).data_source == (
        f"npz:{pathlib.Path('shard-1.npz').absolute()}"
    )


@pytest.mark.parametrize(
    ("every", "steps"), [("epoch", 0), ("1 step", 1), ("10 steps", 10), ("7", 7)]
)
def test_aggregate_steps(every: str, steps: int) -> None:
    config = Config()
    config.aggregation.every = every
    assert configuration.aggregate_steps(resolve(config).aggregation) == steps


def test_json_gives_the_same_configuration_back() -> None:
    config = Config(name="x", seed=3)
    config.optimizer.clip_norm = 1.5
    config.devices.overrides = {0: {"link": "4g"}, 1: {"cut": 2}}
    config = resolve(config)
    assert configuration.from_json(configuration.to_json(config)) == config
    assert configuration.from_dict(json.loads(json.dumps(configuration.to_dict(config)))) == config


def test_json_with_an_unknown_field_is_refused() -> None:
    values = configuration.to_dict(Config())
    values["data"]["batchsize"] = 3
    with pytest.raises(ConfigError, match=r"data.batchsize is not a field.*did you mean"):
        configuration.from_dict(values)
    with pytest.raises(ConfigError, match="not valid JSON"):
        configuration.from_json("{")


def test_a_token_is_read_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("PIPAR_TEST_SECRET", "open sesame")
    (tmp_path / "secret").write_text("open barley\n")
    for reference, secret in (
        ("env:PIPAR_TEST_SECRET", "open sesame"),
        (f"file:{tmp_path / 'secret'}", "open barley"),
        ("open wheat", "open wheat"),
    ):
        config = Config()
        config.network.token = reference
        config.server.host = "0.0.0.0"  # allowed with a token
        made = resolve(config)
        assert made.network.token == secret
        assert secret not in configuration.to_json(made)
        assert secret not in configuration.to_text(made)


def test_difference_names_what_must_agree_and_only_that() -> None:
    ours, theirs = Config(), Config()
    theirs.name, theirs.debug, theirs.server.port = "other", True, 7
    theirs.data.data_dir, theirs.run.dir = "elsewhere", "there"
    theirs.devices.defaults.link = "4g"
    assert difference(resolve(ours), resolve(theirs)) == []
    theirs.model.name, theirs.seed = "resnet18", 1
    theirs.devices.overrides[1] = {"micro_batches": 9}
    assert difference(resolve(ours), resolve(theirs)) == [
        "seed (0 here, 1 there)",
        "model.name ('vgg5' here, 'resnet18' there)",
        "devices.1.micro_batches (4 here, 9 there)",
    ]


def test_own_data_may_lie_anywhere_but_a_public_set_must_agree() -> None:
    ours, theirs = Config(), Config()
    ours.data.source, theirs.data.source = "npz:a.npz", "npz:b.npz"
    assert difference(resolve(ours), resolve(theirs)) == []
    theirs.data.source = "mnist"
    assert len(difference(resolve(ours), resolve(theirs))) == 1


def _set(config: Config, path: str, value: object) -> None:
    *groups, name = path.split(".")
    holder: object = config
    for group in groups:
        holder = getattr(holder, group)
    setattr(holder, name, value)


@pytest.mark.parametrize("value", [{"method": "fl"}, None, "digits", Config])
def test_what_is_not_a_configuration_is_told_so(value: object) -> None:
    says = r"expected a pipar_jax\.Config, got "
    with pytest.raises(ConfigError, match=says):
        resolve(value)  # type: ignore[arg-type]
    for model in (None, Config):
        with pytest.raises(ConfigError, match=says):
            pipar_jax.train(value, model)  # type: ignore[arg-type]


def test_a_field_that_does_not_exist_cannot_be_set() -> None:
    """A misspelt name would otherwise leave the field's default, and say nothing."""

    def sections(value: object) -> Iterator[object]:
        yield value
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            if dataclasses.is_dataclass(getattr(value, field.name)):
                yield from sections(getattr(value, field.name))

    of = list(sections(Config()))
    assert len(of) >= 20
    for section in of:
        with pytest.raises(AttributeError, match="no_such_field"):
            section.no_such_field = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_mini_batches_of_one_sample_fit_every_method(method: str) -> None:
    """The tuner's own list of numbers is no wish; a list of the user's is."""
    config = Config(method=method)
    config.data.batch_size = config.pipeline.micro_batches = 1
    if uses_nodes(method):
        config.nodes.count = 2
    config.pipeline.cuts = {"mpsl": "1,2,3", "accept": "1,2"}.get(method, "")
    if method == "accept":
        config.devices.count = 1
    resolve(config)
    config.tuner.micro_batches = "2,4"
    with pytest.raises(ConfigError, match=r"tuner\.micro_batches='2,4': all exceed"):
        resolve(config)
