"""Every preset is a configuration, names itself, and its docstring's command names it too."""

from __future__ import annotations

import pathlib

import pytest

import configs
from pipar_jax.launch.flags import load_preset
from pipar_jax.methods.registry import server_methods
from pipar_jax.methods.resolution import resolve

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
    resolve(config)
    text = (FOLDER / f"{name}.py").read_text()
    assert f"--config={name}" in text or f"pipar {name}" in text


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", server_methods())
def test_a_preset_takes_every_method(name: str, method: str) -> None:
    config = load_preset(name, FOLDER)
    config.method = method
    resolve(config)
