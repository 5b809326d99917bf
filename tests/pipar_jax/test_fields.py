"""Every field of the configuration, and every rule between fields, is checked before a process.

The list of fields is the schema's: one that is added without a bad value here fails the test.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pipar_jax.config import Config, DeviceConfig, NodeConfig, schema
from pipar_jax.config.schema import ConfigField
from pipar_jax.errors import ConfigError
from pipar_jax.launch import launcher, machine
from pipar_jax.launch.certificates import make_authority
from pipar_jax.methods.resolution import resolve
from tests.conftest import Within
from tests.patience import PROCESS_S

FIELDS = {one.path: one for one in schema.options(Config)}
#: Values that no field survives: whatever takes them, it takes them as a text and looks closer.
NASTY = ("9" * 5000, "²", "x" * 100_000, "~nobody-of-this-name/x", "a\0b")
#: For each field that takes a text without choices, values that cannot work.
TEXTS: dict[str, tuple[str, ...]] = {
    "name": ("", "..", "a/b", "a" * 300),
    "model.name": ("vgg55", "decoder_small", "gpt2"),
    "model.args": ("width=16", "'", "x" * 3000),
    "model.base": ("/no/such.safetensors", "a\0b", "~nobody-of-this-name"),
    "lora.match": ("(", "*", "(" * 5000),
    "model.trainable": ("(", "*", "[z-a]", "a{2,1}", "a{" + "9" * 30 + "}", "(" * 5000),
    "optimizer.name": ("", "sdg", "module:x", "module:a:b:c"),
    "optimizer.args": ("decay=0.9", "'", "x" * 3000),
    "optimizer.groups": ("head", "head=x", "=1", "(=1", "head=-1", "a=nan", "'", "(" * 5000 + "=1"),
    "optimizer.schedule": ("", "cosin", "module:x"),
    "optimizer.schedule_args": ("power=0.5", "'"),
    "aggregation.rule": ("", "fedavgg", "module:x"),
    "aggregation.args": ("trim=1", "'"),
    "aggregation.personal": ("(", "*", "(" * 5000),
    "cohort.select": ("", "unifrom", "module:x"),
    "cohort.script": ("/no/such.jsonl", "a\0b", "~nobody-of-this-name"),
    "data.source": ("digit", "npz:", "module:x", "npz:~nobody-of-this-name/x", "npz:a\0b"),
    "data.augment": ("", "crop", "module:x"),
    "data.pad_to": ("x", "0,4", "64,32", "8,8", "8", "9" * 5000, "²"),
    "task.name": ("", "clasification", "module:x"),
    "task.args": ("'", "nosuch=1", "top_k"),
    "task.metrics": ("nosuch", "f1,x"),
    "stop.metric": ("accurcy", "a b"),
    "checkpoint.best": ("accurcy", "a b"),
    "data.test_source": ("digits", "npz:x.npz", "npz:a\0b"),
    "data.data_dir": ("~nobody-of-this-name", "a\0b", __file__),
    "data.cache_dir": ("~nobody-of-this-name", "a\0b", __file__),
    "aggregation.every": ("", "0 steps", "9" * 5000, "² steps"),
    "aggregation.codec": ("", "int99", "bits:99", "int8:" + "9" * 5000, "bits:²"),
    "pipeline.activation_codec": ("", "int99", "bits:99", "int8:" + "9" * 5000, "bits:²"),
    "pipeline.cotangent_codec": ("", "int99", "bits:99", "int8:" + "9" * 5000, "bits:²"),
    "pipeline.cut": ("", "conv9", "99", "²", "9" * 5000),
    "pipeline.cuts": ("1,2",),  # for chains alone; see RULES
    "devices.defaults.link": ("5g", "0/1", "1/0", "1e9/1", "9" * 400 + "/1", "trace:", "trace:/no"),
    "devices.defaults.slowdown_trace": ("/no/such.csv", __file__, "a\0b"),
    "devices.defaults.cpus": ("x", "2-1", "0-999999999999", "99999", "²"),
    "devices.defaults.cut": ("", "conv9", "99", "²"),
    "devices.defaults.data_source": ("digit", "npz:x.npz", "npz:a\0b"),
    "nodes.defaults.host": ("", "a b", "0.0.0.0"),
    "nodes.defaults.link": ("5g", "trace:/no"),
    "nodes.defaults.cpus": ("x", "0-999999999999", "99999"),
    "server.host": ("", "a b", "http://x", "0.0.0.0"),
    "server.cpus": ("x", "0-999999999999", "99999"),
    "network.token": ("", "short", "env:PIPAR_NO_SUCH", "file:/no/such", "file:a\0b"),
    "network.authority": ("/no/such.pem", __file__, "a\0b"),
    "network.certificate": ("/no/such.pem", "a\0b"),
    "network.key": ("/no/such.pem", "a\0b"),
    "tuner.methods": ("", "fl,pipr", "mpsl"),
    "tuner.micro_batches": ("", "0", "two", "200,300", "9" * 5000, "²"),
    "tuner.dispatch": ("", "fcsf"),
    "tuner.codecs": ("int99", "bits:99", "int8:" + "9" * 5000),
    "tuner.sizes": ("", "0", "5,x", "1000", "9" * 5000),
    "run.dir": ("", "~nobody-of-this-name", "a\0b", __file__),
    "model.weights": ("a\0b", "~nobody-of-this-name"),
    "model.weights_match": ("conv*",),
    "run.resume": ("a\0b", "~nobody-of-this-name"),
    "stop.when": ("mine", "a:b:c"),
    "run.sinks": ("tensorbord", "no_such_module_here:f", "a:b:c"),
}


def bad_values(one: ConfigField) -> list[Any]:
    """Returns values that a field must refuse: of another type, out of bounds, not a choice."""
    limits = one.field.metadata
    found: list[Any] = [object(), [1]]
    if str not in one.types:
        found.append("x")
    if float in one.types:
        found += [float("nan"), float("inf"), -float("inf")]
    if int in one.types or float in one.types:
        found.append(2**70 if int in one.types else "1")
        found += [limits["at_least"] - 1] if limits["at_least"] is not None else []
        found += [limits["above"], limits["above"] - 1] if limits["above"] is not None else []
        found += [limits["at_most"] + 1] if limits["at_most"] is not None else []
        found += [limits["below"]] if limits["below"] is not None else []
    if str in one.types:
        found.append("x\udce9")  # a byte of a command line that is not UTF-8
    if str in one.types and limits["choices"]:
        found.append("no-such-choice")
    return found


def put(config: Config, path: str, value: Any) -> None:
    """Sets a field; chains and nodes are there where it is one of theirs."""
    if path.startswith("nodes.defaults."):
        config.method, config.nodes.count = "mpsl", 2
    holder: Any = config
    *groups, name = path.split(".")
    for group in groups:
        holder = getattr(holder, group)
    setattr(holder, name, value)


@pytest.fixture(autouse=True)
def _in_time(within: Within) -> Iterator[None]:
    """Whatever is refused is refused in bounded time."""
    with within(20.0):
        yield


def refuse(config: Config) -> str:
    """Returns the one line by which a configuration is refused before anything is started."""
    with pytest.raises(ConfigError) as caught:
        resolved = resolve(config)
        machine.check(resolved)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 2000
    return text


def test_every_field_for_texts_has_bad_values_here() -> None:
    texts = {
        p for p, one in FIELDS.items() if str in one.types and not one.field.metadata["choices"]
    }
    assert texts == set(TEXTS)


def test_every_field_refuses_bad_values_by_its_name() -> None:
    for path, one in FIELDS.items():
        for value in [*bad_values(one), *TEXTS.get(path, ())]:
            config = Config()
            put(config, path, value)
            assert path in refuse(config), (path, repr(value)[:80])


def test_no_text_is_answered_by_anything_but_a_sentence() -> None:
    for path in TEXTS:
        for value in NASTY:
            config = Config()
            put(config, path, value)
            try:
                resolved = resolve(config)
                machine.check(resolved)
            except ConfigError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("group", "kind"), [("devices", DeviceConfig), ("nodes", NodeConfig)], ids=["devices", "nodes"]
)
def test_what_a_field_refuses_one_host_is_refused_too(group: str, kind: type) -> None:
    for one in schema.options(kind):
        for value in [*bad_values(one), *TEXTS.get(f"{group}.defaults.{one.path}", ())]:
            config = Config()
            if group == "nodes":
                config.method, config.nodes.count = "mpsl", 2
            getattr(config, group).overrides = {1: {one.path: value}}
            assert f"{group}.1.{one.path}" in refuse(config), (one.path, repr(value)[:80])


def test_what_nodes_would_be_is_checked_where_there_are_none() -> None:
    for path, values in TEXTS.items():
        if path.startswith("nodes.defaults."):
            for value in values:
                config = Config()
                setattr(config.nodes.defaults, path.rpartition(".")[2], value)
                if "999" not in value:  # cores of this machine are looked for by whoever needs them
                    assert path in refuse(config)


def test_seconds_and_counts_end_where_systems_end() -> None:
    for path, one in FIELDS.items():
        if path.endswith("_s"):
            assert one.field.metadata["at_most"] is not None, path
    config = Config()
    config.devices.count = 10_000  # the most: checking them takes no time that is seen
    resolve(config)


def changed(**values: Any) -> Config:
    config = Config()
    for path, value in values.items():
        put(config, path.replace("__", "."), value)
    return config


CHAIN = {"method": "mpsl", "nodes__count": 2}
#: Rules between fields, which only a process that was started found before.
RULES: list[tuple[str, Config]] = [
    ("pipeline.cut=99", changed(pipeline__cut=99)),
    ("pipeline.cut='cnv2'", changed(pipeline__cut="cnv2")),
    ("devices.1.cut=5", changed(devices__overrides={1: {"cut": 5}})),
    ("share one client-side model", changed(method="sl", devices__overrides={1: {"cut": 2}})),
    ("pipeline.cuts", changed(**CHAIN, pipeline__cuts="1,2")),
    ("pipeline.cuts", changed(**CHAIN, pipeline__cuts="1,3,2")),
    ("pipeline.cuts", changed(**CHAIN, pipeline__cuts="1,2,conv9")),
    ("pipeline.cuts", changed(**CHAIN, pipeline__cuts="1,2,9")),
    ("pipeline.micro_batches=101", changed(pipeline__micro_batches=101)),
    ("devices.defaults.micro_batches=101", changed(devices__defaults__micro_batches=101)),
    ("devices.1.micro_batches=101", changed(devices__overrides={1: {"micro_batches": 101}})),
    ("pipeline.weights='shared'", changed(pipeline__weights="shared",
                                          devices__overrides={1: {"cut": 2}})),
    ("nodes.2.port", changed(**CHAIN, nodes__defaults__port=7000)),
    ("nodes.1.port", changed(**CHAIN, server__port=7000, nodes__overrides={1: {"port": 7000}})),
    ("tuner.codecs", changed(tuner__codecs="bits:1")),
    ("network.certificate is empty", changed(network__authority="{pem}")),
    ("server.platform", changed(server__platform="tpu")),
    ("devices.1.platform", changed(devices__overrides={1: {"platform": "tpu"}})),
    ("nodes.defaults.platform", changed(**CHAIN, nodes__defaults__platform="tpu")),
    ("data.pad_to", changed(data__source="module:json:loads", data__pad_to="2,4",
                            data__augment="crop_flip")),
    ("lengths are at most 10,000,000",
     changed(data__source="module:json:loads", data__pad_to="4,99999999")),
    ("add positions=4", changed(data__source="module:json:loads", data__pad_to="2,4",
                                task__name="language", task__args="weighting=token")),
    ("cannot be combined with privacy", changed(
        data__source="module:json:loads", data__pad_to="2,4", privacy__epsilon=1.0)),
    ("data.source", changed(data__source="module:no_such_module_here:f")),
    ("devices.defaults.data_source", changed(
        data__source="module:json:loads", devices__defaults__data_source="module:no_such.a:f")),
    ("data.test_source", changed(data__source="module:json:loads",
                                 data__test_source="module:json.no_such:f")),
]  # fmt: skip


def test_every_rule_between_fields_is_checked_before_a_process(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_authority(tmp_path)
    monkeypatch.setattr(machine, "has_plugin", lambda starts: False)
    monkeypatch.setattr(launcher, "hold_folder", lambda config: pytest.fail("a folder was made"))
    for says, config in RULES:
        if config.network.authority:
            config.network.authority = str(tmp_path / "authority.pem")
        with pytest.raises(ConfigError) as caught:
            launcher.launch(config)
        assert says in str(caught.value)


def test_rules_hold_only_where_they_matter() -> None:
    for config in (
        changed(method="fl", pipeline__micro_batches=101),
        changed(method="auto", pipeline__cut=99),
        changed(**CHAIN, pipeline__cuts="1,2,fc1"),
        changed(**CHAIN),
        changed(method="fl", pipeline__weights="shared"),
    ):
        resolved = resolve(config)
        machine.check(resolved)


def test_a_command_line_that_cannot_work_ends_with_2_and_starts_nothing(
    tmp_path: pathlib.Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--config=digits",
         "--config.devices.1.cpus=99999", f"--config.run.dir={tmp_path}"],
        capture_output=True, text=True, timeout=PROCESS_S, cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: devices.1.cpus='99999' includes cores")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
