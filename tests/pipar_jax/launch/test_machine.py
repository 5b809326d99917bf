"""What a configuration names on this machine: told by its field if it cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipar_jax.config import Config
from pipar_jax.config.checkpoints import check_resume
from pipar_jax.errors import ConfigError
from pipar_jax.launch import flags, machine
from pipar_jax.methods.resolution import resolve
from tests.disks import forbidden

#: Fields that name a file or folder which is looked for before anything starts.
FIELDS = (
    "network.authority", "network.certificate", "network.key", "cohort.script", "run.dir",
    "run.resume", "data.data_dir", "data.cache_dir", "model.base", "model.weights",
)  # fmt: skip


def check(config: Config) -> None:
    """Checks a configuration as a run does before it reads data."""
    resolved = resolve(config)
    machine.check(resolved)
    check_resume(resolved)


@pytest.mark.parametrize("field", FIELDS)
def test_what_this_user_may_not_look_for_is_told_by_its_field(field: str, tmp_path: Path) -> None:
    config = Config()
    config.run.dir = str(tmp_path / "runs")
    group, name = field.split(".")
    setattr(getattr(config, group), name, str(tmp_path / "forbidden" / "x"))
    with (
        forbidden(tmp_path / "forbidden"),
        pytest.raises(ConfigError, match=f"^{re.escape(field)}=") as caught,
    ):
        check(config)
    assert "\n" not in str(caught.value)


def test_a_preset_that_this_user_may_not_look_for_is_none(tmp_path: Path) -> None:
    name = tmp_path / "forbidden" / "mine.py"
    with forbidden(tmp_path / "forbidden"), pytest.raises(ConfigError, match="is not a preset"):
        flags.load_preset(str(name), tmp_path)


@pytest.mark.parametrize("field", ["run.dir", "data.data_dir", "data.cache_dir"])
def test_a_file_in_place_of_a_folder_is_told_by_its_field(field: str, tmp_path: Path) -> None:
    config = Config()
    config.run.dir = str(tmp_path / "runs")
    group, name = field.split(".")
    (file := tmp_path / "file").touch()
    for place, says in ((file, "is a file: name a folder"), (file / "x", "Not a directory")):
        setattr(getattr(config, group), name, str(place))
        with pytest.raises(ConfigError, match=f"^{re.escape(field)}=.*{says}"):
            machine.check(resolve(config))
