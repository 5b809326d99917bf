"""Arrays of any shape, by name: from files, folders and functions; and augmentation."""

from __future__ import annotations

import pathlib
import sys
import types
from typing import Any

import numpy as np
import pytest

from pipar_jax import data
from pipar_jax.config import Config
from pipar_jax.data import Dataset, Examples, Loader
from pipar_jax.data.augmentation import find_augmentation
from pipar_jax.errors import ConfigError, DataError
from pipar_jax.methods.resolution import resolve
from stages.signature import ArrayType

LENGTH = 5


def arrays(part: str) -> dict[str, Any]:
    """Six sequences of tokens with a mask and positions."""
    draw = np.random.default_rng(0)
    return {
        f"x_{part}": draw.integers(0, 9, (6, LENGTH)),
        f"x_{part}.mask": np.ones((6, LENGTH), bool),
        f"x_{part}.positions": np.zeros((6, LENGTH, 2), np.float16),
        f"y_{part}": np.arange(6) % 3,
    }


def _npz(folder: pathlib.Path, values: dict[str, Any]) -> str:
    np.savez(folder / "mine.npz", **values)
    return f"npz:{folder}/mine.npz"


def _npy(folder: pathlib.Path, values: dict[str, Any]) -> str:
    (folder / "mine").mkdir(exist_ok=True)
    for name, array in values.items():
        np.save(folder / "mine" / f"{name}.npy", array)
    return f"npy:{folder}/mine"


def _module(folder: pathlib.Path, values: dict[str, Any]) -> str:
    module = types.ModuleType("own_examples")
    module.load = lambda device: values  # type: ignore[attr-defined]
    sys.modules["own_examples"] = module
    return "module:own_examples:load"


SOURCES = {"npz": _npz, "npy": _npy, "module": _module}


def loaded(source: str, **fields: Any) -> Dataset:
    config = Config()
    config.model.name, config.devices.count = "mlp", 1
    config.data.source = source
    for name, value in {"normalise": "none", **fields}.items():
        setattr(config.data, name, value)
    return data.load_device(resolve(config), 0)


@pytest.mark.parametrize("source", SOURCES)
def test_side_inputs_come_with_their_names_from_every_source(
    source: str, tmp_path: pathlib.Path
) -> None:
    given = arrays("train")
    made = loaded(SOURCES[source](tmp_path, {**given, **arrays("test")}))
    assert len(made.train) == 6 and not len(made.test)
    assert np.array_equal(made.train.x, given["x_train"])
    assert sorted(made.train.sides) == ["mask", "positions"]
    # As it is computed with: whole numbers in 32 bits, others in the precision of the computation.
    signature = made.signature("float64")
    assert signature.input == ArrayType((LENGTH,), "int32")
    assert signature.sides == {
        "mask": ArrayType((LENGTH,), "bool"), "positions": ArrayType((LENGTH, 2), "float64"),
    }  # fmt: skip
    assert signature.classes == 3 and signature.sides["positions"].nbytes == 80


def test_a_folder_is_mapped_and_read_sample_by_sample(tmp_path: pathlib.Path) -> None:
    given = arrays("train")
    made = loaded(_npy(tmp_path, given))
    assert all(isinstance(one.base, np.memmap) for one in made.train.inputs.values())
    x, sides, targets = Loader(made.train, None, 4, seed=0, device=0).batch(0)
    rows = [np.flatnonzero((given["x_train"] == row).all(1))[0] for row in x]
    assert x.dtype == np.int32 and not isinstance(x, np.memmap)
    assert sides["mask"].shape == (4, LENGTH)
    assert targets["y"].tolist() == given["y_train"][rows].tolist()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_train": None}, "have no 'x': name the one that flows through the network 'x'"),
        ({"x_train.mask": np.ones((5, 2))}, "input mask has 5 samples, expected 6"),
        ({"x_train.mask": np.full((6, 2), np.nan)}, "input mask has a value that is not finite"),
        ({"x_train.lengths": np.full(6, 2**40)}, "input lengths has a number that exceeds 32 bits"),
        ({"x_train.a b": np.ones(6)}, "must have 1 to 16 names such as 'mask'"),
        ({f"x_train.n{i}": np.ones(6) for i in range(20)}, "must have 1 to 16 names"),
        ({"x_train.names": np.array(["a"] * 6)}, "must be numbers or truth values"),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_arrays_that_do_not_fit_are_told_in_one_line(
    source: str, change: dict[str, Any], says: str, tmp_path: pathlib.Path
) -> None:
    values = {**arrays("train"), **change}
    where = SOURCES[source](tmp_path, {k: v for k, v in values.items() if v is not None})
    with pytest.raises(DataError, match=says) as caught:
        loaded(where)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_or_holds_objects_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        loaded(f"npy:{tmp_path}/nowhere")
    where = _npy(tmp_path, arrays("train"))
    np.save(tmp_path / "mine" / "x_train.npy", np.array([{}] * 6, object), allow_pickle=True)
    with pytest.raises(DataError, match=r"x_train\.npy cannot be read") as caught:
        loaded(where)
    assert "pickle" not in str(caught.value)


def test_whole_numbers_are_used_unchanged_where_that_is_said(tmp_path: pathlib.Path) -> None:
    where = _npz(tmp_path, arrays("train"))
    with pytest.raises(DataError, match=r"its scale is unknown: .* data\.normalise=none"):
        loaded(where, normalise="given")
    assert loaded(where, normalise="given", scale=2.0).signature().input.dtype == "float32"
    assert loaded(where).signature().input.dtype == "int32"


EXAMPLES = Examples.of(
    {"x": np.arange(24.0).reshape(12, 2), "weight": np.arange(12.0)}, np.arange(12)
)
TABLE = Examples.of(np.arange(24.0).reshape(12, 2), np.arange(12))


def shifted(sample: Any, draw: np.random.Generator) -> Any:
    if isinstance(sample, dict):
        return {**sample, "x": sample["x"] + draw.normal()}
    return sample + draw.normal()


@pytest.mark.parametrize("examples", [EXAMPLES, TABLE])
def test_own_augmentation_depends_on_seed_device_epoch_and_sample_only(examples: Examples) -> None:
    def epoch(number: int, batch: int, seed: int = 0, device: int = 0) -> dict[int, bytes]:
        loader = Loader(examples, None, batch, seed=seed, device=device, augment=shifted)
        steps = loader.steps_per_epoch
        batches = [loader.batch(number * steps + step) for step in range(steps)]
        rows = (zip(one.targets["y"], one.x, strict=True) for one in batches)
        return {int(label): x.tobytes() for some in rows for label, x in some}

    assert epoch(0, 4) == epoch(0, 5) == epoch(0, 12)
    others = [epoch(1, 4), epoch(0, 4, seed=1), epoch(0, 4, device=1)]
    assert all(one[0] != epoch(0, 4)[0] for one in others)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, draw: x[:1], r"returned x float64\[1\] for a sample of x float64\[2\]"),
        (lambda x, draw: x.astype(np.float32), "keep names, shapes and dtypes"),
        (lambda x, draw: {"x": x, "y": x}, "keep names, shapes and dtypes"),
    ],
)
def test_augmentation_that_changes_shapes_is_refused(function: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Loader(TABLE, None, 4, seed=0, device=0, augment=function).batch(0)


def test_augmentation_is_named_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_augmentation")
    module.shifted = shifted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_augmentation", module)
    config = Config()
    config.data.augment = "module:own_augmentation:shifted"
    found = find_augmentation(resolve(config).data.augment)
    assert callable(found)
    with pytest.raises(DataError, match="has no function 'gone'"):
        find_augmentation("module:own_augmentation:gone")
    config.data.augment = "crop_flop"
    with pytest.raises(ConfigError, match=r"is not an augmentation.*crop_flip"):
        resolve(config)
    with pytest.raises(DataError, match="crop_flip is for images"):
        Loader(TABLE, None, 4, seed=0, device=0, augment="crop_flip")
