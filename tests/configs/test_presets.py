"""Every preset is a configuration, names itself, and its docstring says how it is run.

The docstring also says whether the setting is the paper's, and if not, where it differs.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Callable

import pytest

import configs
from pipar_jax.config import Config, from_json, to_json
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


CLAIM, DENIAL = "This is the paper's setting:", "Not the paper's setting:"
#: What makes up the PiPar paper's setting, by the word with which a docstring names it.
PAPERS: dict[str, Callable[[Config], bool]] = {
    "network": lambda made: made.model.name in (
        "vgg5", "vgg16", "resnet18", "resnet101", "mobilenetv3_small", "mobilenetv3_large",
    ),
    "stem": lambda made: not made.model.name.startswith("resnet") or made.model.stem == "imagenet",
    "normalisation": lambda made: made.model.norm == "batch" or made.model.name == "cnn",
    "data": lambda made: made.data.source in ("mnist", "cifar10", "cifar100", "svhn"),
    "batch": lambda made: made.data.batch_size == 100,
    "link": lambda made: made.devices.defaults.link in ("4g", "4g+", "wifi"),
}  # fmt: skip
#: Further parts of it, which a docstring of another method's preset need not name.
CHOICES: dict[str, Callable[[Config], bool]] = {
    "cut and N": lambda made: made.method == "auto" and made.tuner.select == "paper",
    "optimiser": lambda made: (
        (made.optimizer.name, made.optimizer.learning_rate, made.optimizer.momentum,
         made.optimizer.weight_decay, made.optimizer.schedule)
        == ("sgd", 0.01, 0.9, 0.0, "constant")
    ),
}  # fmt: skip


def said(name: str) -> str:
    """Returns a preset's docstring on one line."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return " ".join(docstring.split())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_papers_setting_or_says_where_it_differs(name: str) -> None:
    config, text = load_preset(name, FOLDER), said(name)
    assert (CLAIM in text) != (DENIAL in text)
    differs = {word for word, holds in (PAPERS | CHOICES).items() if not holds(config)}
    if CLAIM in text:
        assert not differs
        return
    _, differences = text.split(DENIAL)
    assert differs
    assert {word for word in differs & set(PAPERS) if word not in differences} == set()


def test_some_presets_are_the_papers_setting() -> None:
    assert {"cifar10_vgg5_paper", "cifar10_resnet18_paper"} <= {
        name for name in PRESETS if CLAIM in said(name)
    }
