"""The command line: overrides, absl's spellings, the nearest right flag, and complete help."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap

import pytest

from pipar_jax.config import Config, DeviceConfig, schema
from pipar_jax.config.schema import option
from pipar_jax.errors import ConfigError
from pipar_jax.launch import flags


@dataclasses.dataclass
class Own:
    index: int = option(-1, "which one", at_least=0)


@pytest.fixture
def presets(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "small.py").write_text(
        textwrap.dedent(
            """
            from pipar_jax.config import Config

            def get_config():
                config = Config(name="small", epochs=3)
                config.devices.overrides[1] = {"link": "wifi", "slowdown": 2.0}
                config.optimizer.clip_norm = 1.0
                return config
            """
        )
    )
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "other.py").write_text("def get_config():\n    return {'epochs': 3}\n")
    (tmp_path / "empty.py").write_text("")
    return tmp_path


def parse(presets: pathlib.Path, *arguments: str) -> flags.Parsed[Own]:
    return flags.parse(list(arguments), Own, doc="Trains.", name="train", presets=presets)


def test_a_preset_is_taken_by_name_or_by_path(presets: pathlib.Path) -> None:
    for name in ("small", "small.py", str(presets / "small.py")):
        parsed = parse(presets, f"--config={name}")
        assert parsed.config.name == "small" and parsed.config.epochs == 3
        assert parsed.extra == Own() and parsed.text == ""


def test_overrides_of_every_kind(presets: pathlib.Path) -> None:
    config = parse(
        presets,
        "--config=small",
        "--config.epochs=7",
        "--config.model.norm=group",
        "--config.data.drop_last",
        "--config.optimizer.learning_rate=1e-3",
        "--config.optimizer.clip_norm=none",
        "--config.pipeline.cut=conv2",
        "--config.devices.1.link=4g",
        "--config.devices.0.cut=2",
        "--config.devices.defaults.micro_batches=8",
        "--config.network.token=env:X",
    ).config
    assert (config.epochs, config.model.norm, config.data.drop_last) == (7, "group", True)
    assert config.optimizer.learning_rate == 1e-3 and config.optimizer.clip_norm is None
    assert config.pipeline.cut == "conv2" and config.devices.defaults.micro_batches == 8
    assert config.devices.overrides == {1: {"link": "4g", "slowdown": 2.0}, 0: {"cut": 2}}
    assert config.network.token == "env:X"


def test_a_number_is_a_position_where_both_may_stand(presets: pathlib.Path) -> None:
    assert parse(presets, "--config=small", "--config.pipeline.cut=3").config.pipeline.cut == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.run.compile_cache=false"],
        ["--noconfig.run.compile_cache"],
        ["--config.run.compile_cache", "--noconfig.run.compile_cache"],
        ["-config.run.compile_cache=0"],
    ],
)
def test_the_spellings_of_false(presets: pathlib.Path, arguments: list[str]) -> None:
    assert parse(presets, "--config=small", *arguments).config.run.compile_cache is False


def test_a_value_may_be_an_argument_of_its_own(presets: pathlib.Path) -> None:
    parsed = parse(presets, "--config", "small", "--config.epochs", "4", "--index", "2", "--debug")
    assert parsed.config.epochs == 4 and parsed.extra.index == 2 and parsed.config.debug


def test_debugging_is_turned_off_as_well(presets: pathlib.Path) -> None:
    (presets / "debugged.py").write_text(
        "from pipar_jax.config import Config\ndef get_config():\n    return Config(debug=True)\n"
    )
    assert parse(presets, "--config=debugged").config.debug
    for flag in ("--nodebug", "--debug=false", "--noconfig.debug"):
        assert not parse(presets, "--config=debugged", flag).config.debug


@pytest.mark.parametrize("said", ["--server", "server"])
def test_an_address_that_is_none_is_called_what_it_was_given_as(said: str) -> None:
    assert flags.parse_address("[::1]:7000", said) == ("::1", 7000)
    for text in ("", "here", "here:0", "here:70000"):
        with pytest.raises(ConfigError, match=f"^{said}='{text}' .*: write {said}=HOST:PORT$"):
            flags.parse_address(text, said)


def test_a_value_may_hold_anything(presets: pathlib.Path) -> None:
    source = "--config.data.source=npz:/a b/c=d,e.npz"
    assert parse(presets, "--config=small", source).config.data.source == "npz:/a b/c=d,e.npz"


def test_the_last_of_equal_flags_counts(presets: pathlib.Path) -> None:
    parsed = parse(presets, "--config=small", "--config.epochs=4", "--config.epochs=5")
    assert parsed.config.epochs == 5


@pytest.mark.parametrize("one", list(schema.options(Config)), ids=lambda one: one.path)
def test_every_field_is_a_flag(presets: pathlib.Path, one: schema.ConfigField) -> None:
    text = "7" if one.types[0] in (int, float) else str(one.default).lower()
    if one.types == (str,) and not one.field.metadata["choices"]:
        text = "some text"
    if one.field.metadata["at_most"] is None and one.field.metadata["below"] == 1:
        text = "0.25"
    config = parse(presets, "--config=small", f"--config.{one.path}={text}").config
    value: object = config
    for name in one.path.split("."):
        value = getattr(value, name)
    assert value == schema.parse(one, text)


WRONG = [
    ([], "--config is missing"),
    (["--config=smal"], "--config=smal is not a preset: did you mean 'small'?"),
    (["--config=no/such/file.py"], "is not a preset"),
    (["--config=broken"], "fails: ZeroDivisionError"),
    (["--config=other"], "must return a pipar_jax.config.Config, got dict"),
    (["--config=empty"], "fails: AttributeError"),
    (["--config=small", "--config.epoch=3"], "did you mean '--config.epochs'"),
    (["--config=small", "--epochs=3"], "did you mean '--config.epochs'"),
    (["--config=small", "--batch_size=3"], "did you mean '--config.data.batch_size'"),
    (["--config=small", "--config.model.batch_size=3"], "did you mean '--config.data.batch_size'"),
    (["--config=small", "--config.devices.1.lnk=4g"], "did you mean 'link'"),
    (["--config=small", "--indx=3"], "did you mean '--index'"),
    (["--config=small", "--config.epochs=three"], "--config.epochs='three' is not valid"),
    (["--config=small", "--config.epochs=0"], "a whole number ≥ 1"),
    (["--config=small", "--config.run.compile_cache=maybe"], "true or false"),
    (["--config=small", "--config.method=pipr"], "did you mean 'pipar'"),
    (["--config=small", "--config.devices.0.slowdown=0.5"], "≥ 1"),
    (["--config=small", "--index=-1"], "--index=-1 is out of range"),
    (["--config=small", "--config.epochs"], "lacks its value"),
    (["--config=small", "--config.epochs", "--debug"], "lacks its value"),
    (["--config=small", "epochs=3"], "is not a flag"),
    (["--config=small", "--noconfig.epochs"], "is not a flag"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[" ".join(one[0]) for one in WRONG])
def test_a_wrong_command_line_is_refused_in_one_line(
    presets: pathlib.Path, arguments: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(presets, *arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preset_whose_name_is_too_long_is_refused_in_one_line(presets: pathlib.Path) -> None:
    for name in ("a" * 300, f"./{'a' * 300}.py", f"{presets}/{'a' * 300}"):
        with pytest.raises(ConfigError, match=r"^--config=.* is not a preset"):
            parse(presets, f"--config={name}")


@pytest.mark.parametrize("asked", ["--help", "-h", "--helpfull"])
def test_help_names_every_field_and_flag(presets: pathlib.Path, asked: str) -> None:
    text = parse(presets, asked).text
    assert text.startswith("Trains.")
    assert "usage: pipar train --config=PRESET" in text
    assert "presets: broken, empty, other, small" in text
    for one in schema.options(Config):
        assert f"--config.{one.path}=" in text, one.path
    for name in ("--index", "--config", "--debug", "--help"):
        assert f"  {name} " in text
    assert "--config.devices.1.link=4g" in text
    assert max(map(len, text.splitlines())) <= 110


def test_help_is_as_wide_as_the_terminal(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (tmp_path / f"preset_{number}.py").touch()
    monkeypatch.setenv("COLUMNS", "70")
    doc = flags.make_help(Config(), flags.NoFlags, doc="x", name="train", presets=tmp_path)
    long = [line for line in doc.splitlines() if len(line) > 70 and " " in line.strip()]
    assert not [line for line in long if not line.lstrip().startswith("--config.")]


def test_help_shows_the_values_of_the_preset_and_no_secret(presets: pathlib.Path) -> None:
    text = parse(presets, "--config=small", "--config.network.token=abc123", "--help").text
    assert "--config.epochs=3 " in text and "--config.optimizer.clip_norm=1.0 " in text
    assert "abc123" not in text


def test_overrides_leave_the_preset_of_the_next_call_alone(presets: pathlib.Path) -> None:
    parse(presets, "--config=small", "--config.devices.1.link=4g", "--config.epochs=9")
    config = parse(presets, "--config=small").config
    assert config.epochs == 3 and config.devices.overrides[1]["link"] == "wifi"


def test_a_devices_fields_are_those_of_the_defaults(presets: pathlib.Path) -> None:
    for one in schema.options(DeviceConfig):
        text = "2" if {int, float} & set(one.types) else str(one.default).lower()
        flag = f"--config.devices.0.{one.path}={text}"
        assert one.path in parse(presets, "--config=small", flag).config.devices.overrides[0]
