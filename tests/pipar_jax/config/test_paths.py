"""Paths: absolute once, for every field that the schema marks, whoever reads the configuration."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from pipar_jax import config as configuration
from pipar_jax.config import Config, DeviceConfig, NodeConfig, difference, paths, schema
from pipar_jax.errors import ConfigError
from pipar_jax.methods.resolution import resolve

PATHS = {one.path: one for one in schema.options(Config) if paths.is_path(one)}


def prefixes(option: schema.ConfigField) -> tuple[str, ...]:
    """Returns what may come before the path in a field's text."""
    marked = option.field.metadata["path"]
    return (marked,) if isinstance(marked, str) else marked


#: Each field that names a file or folder, with each prefix of it.
CASES = [(path, prefix) for path, option in PATHS.items() for prefix in prefixes(option)]
TIMETABLES = {
    "link": "time_s,up_mbps,down_mbps\n0,1,1\n",
    "slowdown_trace": "time_s,slowdown\n0,2\n",
}
#: Words by which a field's help says that it takes a path.
WORDS = ("folder", "file", "FILE", "PATH", "CSV", "own data", "PEM")


@pytest.fixture
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    return tmp_path


def holder_of(config: Config, path: str) -> tuple[Any, str]:
    holder: Any = config
    *groups, name = path.split(".")
    for group in groups:
        holder = getattr(holder, group)
    return holder, name


def with_a_node() -> Config:
    """Returns a configuration in which the fields of nodes count, and each host reads own data."""
    config = Config(method="mpsl")
    config.nodes.count, config.data.source = 1, "npz:/elsewhere"
    return config


def configured(path: str, prefix: str, text: str, home: pathlib.Path) -> Config:
    """Returns a configuration with a path in a field, and in the file what the field wants."""
    config = with_a_node()
    name = path.rpartition(".")[2]
    (home / "x").write_text(TIMETABLES.get(name, "a long enough secret"))
    if name in ("data_dir", "cache_dir", "dir"):
        (home / "x").unlink()
    if name in ("certificate", "key"):
        config.network.certificate = config.network.key = text
    holder, name = holder_of(config, path)
    setattr(holder, name, prefix + text)
    return config


def test_every_field_whose_help_speaks_of_a_file_is_marked() -> None:
    for one in schema.options(Config):
        takes_text = str in one.types and not one.field.metadata["choices"]
        if takes_text and any(word in one.text for word in WORDS) and one.path != "name":
            assert paths.is_path(one), f"{one.path}: option(..., path=...)"
    links = [p for p in PATHS if p.endswith("link")]
    assert links == ["devices.defaults.link", "nodes.defaults.link"]
    assert len(PATHS) > 10


@pytest.mark.parametrize("text", ["~/x", "../x", "../sub/../x"])
def test_every_path_is_absolute_once_resolved(text: str, home: pathlib.Path) -> None:
    for path, prefix in CASES:
        made = resolve(configured(path, prefix, text, home))
        holder, name = holder_of(made, path)
        if path == "network.token":  # read from there at once
            assert holder.token == "a long enough secret"
            continue
        found = getattr(holder, name)
        assert found.startswith(prefix)
        place = pathlib.Path(found.removeprefix(prefix))
        assert place.is_absolute() and place.resolve() == home / "x", path
        assert resolve(made) == made  # as children do


def test_every_path_of_one_host_is_absolute_too(home: pathlib.Path) -> None:
    for group, kind in (("devices", DeviceConfig), ("nodes", NodeConfig)):
        for one in schema.options(kind):
            if not paths.is_path(one):
                continue
            (home / "x").write_text(TIMETABLES.get(one.path, ""))
            for prefix in prefixes(one):
                config = with_a_node()
                getattr(config, group).overrides = {1: {one.path: f"{prefix}~/x"}}
                made = getattr(resolve(config), group).overrides
                assert made == {1: {one.path: f"{prefix}{home / 'x'}"}}


def test_hosts_agree_wherever_their_files_lie(home: pathlib.Path) -> None:
    ours = with_a_node()
    for path, prefix in CASES:
        theirs = resolve(configured(path, prefix, "~/x", home))
        assert difference(resolve(ours), theirs) == [], path
        assert difference(theirs, resolve(ours)) == [], path


def test_a_saved_configuration_means_the_same_in_another_folder(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config()
    config.run.dir = "runs"
    text = configuration.to_json(resolve(config))
    monkeypatch.chdir(home)
    assert resolve(configuration.from_json(text)).run.dir == str(home / "sub" / "runs")


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "a\0b", "x" * 5000])
def test_what_cannot_be_a_path_is_refused_by_the_fields_name(text: str, home: pathlib.Path) -> None:
    for path, prefix in CASES:
        with pytest.raises(ConfigError) as caught:
            resolve(configured(path, prefix, text, home))
        name = path.rpartition(".")[2]
        assert name in str(caught.value) or name in ("certificate", "key")


def test_paths_are_shown_from_the_present_folder_on(home: pathlib.Path) -> None:
    assert paths.shown(home / "sub" / "runs" / "a") == "runs/a"
    assert paths.shown(home / "runs") == str(home / "runs")
