"""Every preset is a configuration, names itself, and its docstring's command names it too."""

from __future__ import annotations

import pathlib

import pytest

import configs
from pipar_jax.config import from_json, to_json
from pipar_jax.launch.flags import load_preset
from pipar_jax.methods.registry import METHODS, plan_for, server_methods
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.feasibility import check_executable
from stages.names import UNITS

FOLDER = pathlib.Path(configs.__file__).parent
PRESETS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def test_the_presets_that_the_documents_name_exist() -> None:
    assert {
        "digits",
        "quickstart",
        "cifar10_vgg5",
        "cifar10_resnet18",
        "mnist_vgg5",
        "mnist_resnet18",
    } <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_and_says_how_to_run_it(name: str) -> None:
    config = load_preset(name, FOLDER)
    assert config.name == name
    assert from_json(to_json(resolve(config))) == resolve(config)
    text = (FOLDER / f"{name}.py").read_text()
    assert f"--config={name}" in text or f"pipar {name}" in text


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", server_methods())
def test_a_preset_takes_every_method(name: str, method: str) -> None:
    config = load_preset(name, FOLDER)
    config.method = method
    resolved, units = resolve(config), UNITS[config.model.name]
    plan = plan_for(resolved, units)
    check_executable(plan)
    assert len(plan.devices) == config.devices.count
    assert plan.order == METHODS[method].order
    assert {len(device.cuts) for device in plan.devices} == {int(METHODS[method].cuts)}
    assert all(0 < cut < len(units) for device in plan.devices for cut in device.cuts)
