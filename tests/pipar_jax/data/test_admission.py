"""What is wrong with data or model is refused at every entry, by the same code and words."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax import nnx

import pipar_jax
import stages
from configs import digits
from pipar_jax import data
from pipar_jax.config import Config, DataConfig
from pipar_jax.data import Dataset, Examples
from pipar_jax.errors import ConfigError, DataError, RunError
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.participants import run_device
from pipar_jax.roles.server import run_server
from stages.signature import ArrayType, Signature
from stages.tasks.targets import ClassTargets
from tests.conftest import Within
from tests.pipar_jax.runtime import support

SHAPE = (4, 4, 1)
SIGNATURE = Signature.labelled(SHAPE, 3)


def arrays(part: str, **changes: Any) -> dict[str, Any]:
    """Six samples as npz files and functions hold them; None leaves an array out."""
    images = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
    made = {"x": images, "y": np.array([0, 1, 2, 0, 1, 2]), "classes": 3, "mean": 0.0, "std": 1.0}
    made.update(changes)
    return {
        f"{name}_{part}" if name in "xy" else name: value
        for name, value in made.items()
        if value is not None
    }


def dataset(part: str, **changes: Any) -> Dataset:
    """The same as a program hands it over."""
    made = arrays(part, **changes)
    split = Examples.of(made[f"x_{part}"], made[f"y_{part}"])
    empty = Examples.of(np.zeros((0, *SHAPE), np.float32), np.zeros(0, np.int32))
    train, test = (split, empty) if part == "train" else (empty, split)
    mean, std = made["mean"], made["std"]
    return Dataset("mine", train, test, made["classes"], mean, std)


#: What is wrong, and the words that say so, at every entry.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"y": np.array([0, 1, 2, 0, 1, -1])}, "label -1 is negative"),
    ({"y": np.array([0, 1, 2, 0, 1, 3])}, "label 3 is out of range for classes=3"),
    ({"y": np.array([0, 1, 2, 0, 1, 2**32])}, "target y has a number that exceeds 32 bits"),
    ({"y": np.array([0, 1, 2])}, "target y has 3 samples, expected 6 as input x"),
    (
        {"y": np.full(6, "cat")},
        "target y must be numbers .*, got <U3: number the classes, alike on",
    ),
    ({"y": np.full(6, 1.0)}, r"labels must be \[samples, …\] whole numbers"),
    ({"y": np.array(["a"] * 6)}, "target y must be numbers"),
    ({"x": np.full((6, *SHAPE), np.nan)}, "not finite"),
    ({"x": np.full((6, *SHAPE), np.inf, np.float32)}, "not finite"),
    ({"x": np.full((6, *SHAPE), 1e300)}, "not finite"),
    ({"x": np.full((6, *SHAPE), "a")}, "input x must be numbers"),
    ({"x": np.ones((6, *SHAPE), complex)}, "input x must be numbers"),
    ({"x": np.ones((6, 4, 0, 1))}, r"got shape \(6, 4, 0, 1\)"),
    (
        {"x": np.ones((0, *SHAPE)), "y": np.ones(0, int)},
        "there is no sample to (train on|test with)",
    ),
    ({"classes": 2}, "out of range for classes=2"),
    ({"classes": 2.5}, "classes must be a whole number"),
    ({"classes": -3}, "classes must be a whole number"),
    ({"mean": [1.0, 2.0]}, "one for each of 1 channels"),
    ({"mean": np.nan}, "one for each of 1 channels"),
    ({"std": 0.0}, "std must be above 0"),
    ({"std": 1e-45}, "std must be above 0"),
    ({"std": "wide"}, "std must be numbers"),
]


def _train_device(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    pipar_jax.train(_config(folder), data=[dataset("train", **changes), dataset("test")])


def _train_server(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    pipar_jax.train(_config(folder), data=[dataset("train"), dataset("test", **changes)])


def _device(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    run_device(_config(folder), 0, ("127.0.0.1", 1), data=dataset("train", **changes))


def _server(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    run_server(_config(folder), on_event=_no_event, data=dataset("test", **changes))


def _npz(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    np.savez(folder / "mine.npz", **arrays("train", **changes), **{
        name: value for name, value in arrays("test").items() if name.endswith("_test")
    })  # fmt: skip
    config = _config(folder)
    config.data.source = f"npz:{folder}/mine.npz"
    pipar_jax.train(config)  # would start processes


def _function(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    module = types.ModuleType("own_arrays")
    module.load = lambda index: arrays("train", **changes)  # type: ignore[attr-defined]
    sys.modules["own_arrays"] = module
    try:
        config = _config(folder)
        config.data.source = "module:own_arrays:load"
        data.load_device(resolve(config), 0)
    finally:
        del sys.modules["own_arrays"]


ENTRIES: dict[str, Callable[[pathlib.Path, dict[str, Any]], None]] = {
    "train, a device's": _train_device,
    "train, the test set": _train_server,
    "run_device": _device,
    "run_server": _server,
    "npz": _npz,
    "function": _function,
}


def _config(folder: pathlib.Path) -> Config:
    config = Config(name="refused")
    config.model.name = "mlp"
    config.devices.count = 1
    config.run.dir = str(folder / "runs")
    return config


def _no_event(event: dict[str, Any]) -> None:
    pytest.fail(f"{event['event']} happened")


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_wrong_is_refused_at_once_and_in_the_same_words(
    entry: str, tmp_path: pathlib.Path
) -> None:
    before = threading.active_count()
    for changes, says in WRONG:
        with pytest.raises(DataError, match=says) as caught:
            ENTRIES[entry](tmp_path, changes)
        assert "\n" not in str(caught.value)
    # Nothing was started, and nothing is left behind.
    assert threading.active_count() == before
    assert not (tmp_path / "runs").exists()


def test_what_is_right_is_taken_in_the_types_of_training() -> None:
    given = dataset("train", y=np.array([[0], [1], [2], [0], [1], [2]], np.uint64), mean=[0.5])
    given = dataclasses.replace(given, train=Examples.of(given.train.x, given.train.labels))
    made = data.admit(given, "train", "d0", ClassTargets())
    assert made.train.x.shape == (6, *SHAPE) and made.train.x.dtype == np.float32
    assert made.train.labels.shape == (6,) and made.mean.tolist() == [0.5]
    whole = data.admit(
        dataset("test", x=np.full((6, *SHAPE), 7, np.uint8)), "test", "server", ClassTargets()
    )
    assert whole.test.x.dtype == np.uint8
    assert whole.normalise(whole.test.x).max() == 7  # a type says nothing about a scale


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": 4}, "d0: 'mine' has 4 classes, but 'mine' of server has 3"),
    ],
)
def test_datasets_that_contradict_themselves_or_each_other_are_refused(
    change: dict[str, Any], says: str, tmp_path: pathlib.Path
) -> None:
    odd = dataclasses.replace(dataset("train"), **change)
    with pytest.raises(DataError, match=says):
        pipar_jax.train(_config(tmp_path), data=[odd, dataset("test")])


def test_shapes_that_differ_between_hosts_are_refused(tmp_path: pathlib.Path) -> None:
    small = Examples.of(np.ones((6, 2, 2, 1), np.float32), np.array([0, 1, 2, 0, 1, 2]))
    odd = dataclasses.replace(dataset("train"), train=small)
    with pytest.raises(DataError, match=r"d0: input of 'mine' is float32.2, 2, 1., but .* server"):
        pipar_jax.train(_config(tmp_path), data=[odd, dataset("test")])
    for index, edge in enumerate((4, 2)):
        np.savez(tmp_path / f"{index}.npz", **arrays("train", x=np.ones((6, edge, edge, 1))))
    np.savez(tmp_path / "test.npz", **arrays("test"))
    config = _config(tmp_path)
    config.devices.count = 2
    config.data.source = f"npz:{tmp_path}/{{device}}.npz"
    config.data.test_source = f"npz:{tmp_path}/test.npz"
    with pytest.raises(DataError, match=r"d1: input of .* is float32\[2, 2, 1\]"):
        pipar_jax.train(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "given",
    [[], [dataset("train")], dataset("train"), 3 * [dataset("test")], {"x": 1, "y": 2}, "ab", 5,
     (dataset("train") for _ in range(2))],
)  # fmt: skip
def test_another_number_of_datasets_is_refused(given: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(RunError, match="give one per device and the one for the test last"):
        pipar_jax.train(_config(tmp_path), data=given)


def test_what_is_no_dataset_or_no_model_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        DataError,
        match=r"d0: expected a pair \(inputs, targets\) or a pipar_jax\.data\.Dataset, got ndarray",
    ):
        pipar_jax.train(_config(tmp_path), data=[np.ones(3), dataset("test")])  # type: ignore[list-item]
    with pytest.raises(RunError, match=r"got a Net as model: convert it to a stages\.Model"):
        pipar_jax.train(_config(tmp_path), Net(nnx.Rngs(0)))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"load\(\) got a \w+ as model: convert it to a stages"):
        pipar_jax.load(tmp_path, Net)  # type: ignore[arg-type]


def test_predict_refuses_a_side_input_of_other_samples() -> None:
    """One mask for two samples would be broadcast."""
    signature = dataclasses.replace(SIGNATURE, sides={"mask": ArrayType((3,), "float32")})
    x, mask = np.ones((2, *SIGNATURE.input.shape), np.float32), np.ones((2, 3), np.float32)
    assert len(data.make_queries({"x": x, "mask": mask}, signature, "float32")["mask"]) == 2
    with pytest.raises(DataError, match="side input mask has 1 samples, expected 2 as input x"):
        data.make_queries({"x": x, "mask": mask[:1]}, signature, "float32")
    with pytest.raises(DataError, match="the network takes x, mask, and got 'masks': leave it out"):
        data.make_queries({"x": x, "mask": mask, "masks": mask}, signature, "float32")


class Net(nnx.Module):
    """The network that README shows."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body = nnx.List([nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, rngs=rngs)])
        self.head = nnx.Linear(64, 10, rngs=rngs)


def test_a_network_that_does_not_fit_digits_is_told_so_within_a_second(
    tmp_path: pathlib.Path, within: Within
) -> None:
    model = stages.Model.from_module(
        "net", Net, units=("body/0", "body/1", "head"), input_shape=(64,), classes=10
    )
    config = digits.get_config()
    config.run.dir, config.data.cache_dir = str(tmp_path / "runs"), str(tmp_path / "cache")
    data.load(config.data)  # decoded once per machine
    says = r"input of 'digits' is \(8, 8, 1\), but the model expects"
    with within(1.0, time.process_time), pytest.raises(DataError, match=says):
        pipar_jax.train(config, model)
    with pytest.raises(DataError, match=r"classes 0 to 4: build it with classes=10"):
        pipar_jax.train(config, _model(5, (8, 8, 1)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("entry", [run_device, run_server])
def test_a_model_with_too_few_classes_is_refused_by_each_role(
    entry: Any, tmp_path: pathlib.Path
) -> None:
    config, model = _config(tmp_path), _model(2, SHAPE)
    with pytest.raises(DataError, match="'mine' has 3 classes, but the model has classes 0 to 1"):
        if entry is run_device:
            run_device(config, 0, ("127.0.0.1", 1), model=model, data=dataset("train"))
        else:
            run_server(config, on_event=_no_event, model=model, data=dataset("test"))


def _model(classes: int, shape: tuple[int, ...]) -> stages.Model:
    return stages.build("mlp", input_shape=shape, classes=classes, norm="group")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pipar_jax.Run:
    """A finished run on floats."""
    config = support.config(tmp_path_factory.mktemp("run"), (17, 33), dtype="float32")
    return support.trained(config, (17, 33), support.model(dtype="float32"))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.ones((0, 8, 8, 1), np.float32), "there is no sample"),
        ([], r"got shape \(0,\)"),
        (np.ones((8, 8, 1), np.float32), r"write x\[None\]"),
        (
            np.ones((3, 8, 9, 1), np.float32),
            r"must be \[batch, 8, 8, 1\], got shape \(3, 8, 9, 1\)",
        ),
        (np.ones((3, 64), np.float32), r"got shape \(3, 64\)"),
        (np.full((3, 8, 8, 1), np.nan), "not finite"),
        (np.full((3, 8, 8, 1), "a"), "must be numbers"),
        ([[1.0], [1.0, 2.0]], "not an array"),
        (np.ones((3, 8, 8, 1), np.uint8), "was trained on floats, and got uint8"),
    ],
)
def test_predicting_nothing_or_something_else_is_refused(
    run: pipar_jax.Run, images: Any, says: str
) -> None:
    for ask in (run.predict, run.outputs):
        with pytest.raises(DataError, match=says):
            ask(images)


def test_a_batch_is_predicted(run: pipar_jax.Run) -> None:
    images = np.zeros((3, 8, 8, 1))
    assert run.predict(images).shape == (3,) and run.outputs({"x": images}).shape == (3, 10)


def test_a_run_on_uint8_takes_whole_numbers_of_its_range_and_no_scaled_ones() -> None:
    whole = np.full((2, 4, 4, 1), 200)
    assert data.make_queries(whole, SIGNATURE, "uint8")["x"] is whole
    for wrong in (whole / 255, whole * 2, -whole):
        with pytest.raises(DataError, match="trained on uint8, 0 to 255"):
            data.make_queries(wrong, SIGNATURE, "uint8")


@pytest.mark.parametrize("stored", [np.uint8, np.int64, np.uint16])
def test_whole_numbers_say_how_they_are_scaled_or_are_refused(
    stored: Any, tmp_path: pathlib.Path
) -> None:
    def scaled(scale: float = 0.0, **said: Any) -> np.ndarray:
        given = {"mean": None, "std": None, **said}
        np.savez(
            tmp_path / "mine.npz", **arrays("train", x=np.full((6, *SHAPE), 51, stored), **given)
        )
        config = resolve(_config(tmp_path))
        config.data.source, config.data.scale = f"npz:{tmp_path}/mine.npz", scale
        config.devices.defaults.data_source = config.data.source
        made = data.load_device(config, 0)
        return np.unique(made.normalise(made.train.x))

    for silent in ({}, {"mean": 3.0}):
        with pytest.raises(DataError, match=r"its scale is unknown: give `scale`"):
            scaled(**silent)
    assert scaled(scale=1.0) == [51] and scaled(1.0) == [51]  # a field, or a key, never the type
    np.testing.assert_allclose(scaled(255.0), [0.2], rtol=1e-6)
    np.testing.assert_allclose(scaled(255.0, mean=0.1, std=0.5), [0.2], rtol=1e-5)
    np.testing.assert_allclose(scaled(mean=1.0, std=25.0), [2.0], rtol=1e-6)
    with pytest.raises(DataError, match=r"contradicts data\.scale=1"):
        _contradict(tmp_path, stored)


def _contradict(folder: pathlib.Path, stored: Any) -> None:
    np.savez(folder / "mine.npz", scale=255, **arrays("train", x=np.ones((6, *SHAPE), stored)))
    config = resolve(_config(folder))
    config.data.source, config.data.scale = f"npz:{folder}/mine.npz", 1.0
    config.devices.defaults.data_source = config.data.source
    data.load_device(config, 0)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, [1.0, 2.0], "x"])
def test_a_scale_is_one_number_above_0(scale: Any, tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "mine.npz", scale=scale, **arrays("train"))
    with pytest.raises(DataError, match=r"scale must be|std must be"):
        data.own.load_own(
            f"npz:{tmp_path}/mine.npz", 0, DataConfig(), part="train", rule=ClassTargets()
        )


def test_floats_are_taken_as_they_are(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays("train", mean=None, std=None))
    made = data.own.load_own(
        f"npz:{tmp_path}/mine.npz", 0, DataConfig(), part="train", rule=ClassTargets()
    )
    assert np.array_equal(made.normalise(made.train.x), arrays("train")["x_train"])


def test_a_scale_is_for_own_data() -> None:
    config = Config()
    config.data.scale = 255.0
    with pytest.raises(ConfigError, match=r"data\.scale=255 is for your own data"):
        resolve(config)
