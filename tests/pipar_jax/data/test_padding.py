"""Samples of different lengths: how long they are, and to what mini-batches of them are padded."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from pipar_jax.config import Config, DataConfig
from pipar_jax.data import Dataset, Examples, Loader, admit, prepare
from pipar_jax.data.own import load_own
from pipar_jax.errors import DataError
from stages.tasks.registered import classification, language
from stages.tasks.targets import AnyTargets, TargetRule

LENGTHS = (1, 5, 2, 3)
PAD_TO = (2, 4, 6)
RULE = classification().targets


def sequences(dtype: str = "int64", rest: tuple[int, ...] = ()) -> list[np.ndarray]:
    return [np.full((n, *rest), i + 1, dtype) for i, n in enumerate(LENGTHS)]


def admitted(inputs: object, targets: object, rule: TargetRule = RULE) -> Dataset:
    return admit((inputs, targets), "train", "d0", rule, pad_to=PAD_TO)


def loader(dataset: Dataset, batch: int = 1) -> Loader:
    return Loader(dataset.train, None, batch, seed=0, device=0, padding=dataset.padding)


def test_a_list_tells_how_long_its_samples_are() -> None:
    made = admitted(sequences(rest=(3,)), [0, 1, 0, 1])
    assert made.train.lengths is not None
    assert made.train.lengths.tolist() == list(LENGTHS)
    assert made.input_shape == (6, 3)  # of the longest
    assert made.signature().input.shape == (6, 3)


def test_an_array_of_objects_is_a_list() -> None:
    objects = np.empty(4, object)
    objects[:] = sequences()
    made = admitted(objects, [0, 1, 0, 1])
    assert made.train.lengths is not None
    assert made.train.lengths.tolist() == list(LENGTHS)
    with pytest.raises(DataError, match=r"got object: .*samples of different lengths need data"):
        admit((objects, [0, 1, 0, 1]), "train", "d0", RULE)


def test_a_mini_batch_is_padded_to_the_smallest_length_that_holds_its_longest_sample() -> None:
    made = loader(admitted(sequences(), [0, 1, 0, 1]))
    for step in range(4):
        x = made.batch(step).x[0]
        length = LENGTHS[int(x[0]) - 1]
        assert len(x) == made.length(step) == {1: 2, 5: 6, 2: 2, 3: 4}[length]
        assert x.tolist() == [x[0]] * length + [0] * (len(x) - length)
    assert made.steps_by_length() == {2: 2, 4: 1, 6: 1}
    assert loader(admitted(sequences(), [0, 1, 0, 1]), 4).batch(0).x.shape == (4, 6)


def test_masks_lengths_and_a_list_say_the_same(tmp_path: pathlib.Path) -> None:
    x = np.zeros((4, 5), np.int64)
    mask = np.arange(5) < np.asarray(LENGTHS)[:, None]
    for inputs in ({"x": x, "mask": mask}, {"x": x, "lengths": np.asarray(LENGTHS)}):
        made = admitted(inputs, [0, 1, 0, 1])
        assert made.train.lengths is not None
        assert made.train.lengths.tolist() == list(LENGTHS)
    path = tmp_path / "own.npz"
    np.savez(path, x_train=x, y_train=np.zeros(4, int), lengths_train=LENGTHS)
    config = DataConfig(normalise="none", pad_to="2,4,6")
    made = load_own(f"npz:{path}", 0, config, part="train", rule=RULE)
    assert made.train.lengths is not None
    assert made.train.lengths.tolist() == list(LENGTHS)
    with pytest.raises(DataError, match=r"only data\.pad_to reads"):
        load_own(f"npz:{path}", 0, DataConfig(normalise="none"), part="train", rule=RULE)


def test_what_is_of_positions_is_padded_and_nothing_else() -> None:
    x = np.ones((4, 5, 5), np.float32)
    inputs = {"x": x, "lengths": np.asarray(LENGTHS), "bias": np.ones((4, 3))}
    following = np.where(np.arange(5) < np.asarray(LENGTHS)[:, None], 1, -1)
    made = admitted(inputs, following, language().targets)
    whole = made.at_full_length(made.train)
    shapes = {name: one.shape for name, one in {**whole.inputs, **whole.targets}.items()}
    assert shapes == {"x": (4, 6, 5), "lengths": (4,), "bias": (4, 3), "y": (4, 6)}
    assert whole.targets["y"][:, 5].tolist() == [-1] * 4
    signature = made.signature()
    assert signature.sides["bias"].shape == (3,)
    assert signature.targets["y"].shape == (6,)


def test_targets_as_lists_are_filled_with_what_does_not_count() -> None:
    made = admitted(sequences(), sequences(), language().targets)
    assert made.train.targets["y"][0].tolist() == [1, -1, -1, -1, -1]
    own = admitted(sequences(), {"tag": sequences()}, AnyTargets(padding=-9))
    assert own.train.targets["tag"][0].tolist() == [1, -9, -9, -9, -9]


def test_a_memory_map_is_cut_and_not_copied(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "x_train.npy", np.zeros((4, 9), np.int64))
    np.save(tmp_path / "y_train.npy", np.zeros(4, np.int64))
    np.save(tmp_path / "lengths_train.npy", LENGTHS)
    config = DataConfig(normalise="none", pad_to="2,4,6")
    made = load_own(f"npy:{tmp_path}", 0, config, part="train", rule=RULE)
    assert isinstance(made.train.x.base, np.memmap)
    assert made.signature().input.shape == (6,)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_unsigned_targets_take_a_fill_below_zero(dtype: str) -> None:
    x = sequences(dtype)
    made = admitted(x, x, language().targets)
    assert made.train.targets["y"][0].tolist() == [1, -1, -1, -1, -1]
    assert made.train.x.dtype == dtype
    padded = np.stack([np.resize(one, 5) for one in x])
    for targets in (x, padded):
        own = admit(
            ({"x": padded, "lengths": np.full(4, 5)} if targets is padded else x, targets),
            "train", "d0", AnyTargets(padding=-9), pad_to=PAD_TO,
        )  # fmt: skip
        assert own.at_full_length(own.train).targets["y"][0, 5] == -9
        assert own.signature().targets["y"].dtype == "int32"


def test_files_for_a_task_of_ones_own_are_looked_at_before_anything_starts(
    tmp_path: pathlib.Path,
) -> None:
    """What the task leaves out is known to its module alone, which is not called."""
    given = {"x": np.ones((4, 5), int), "y": np.where(np.eye(4, 5) > 0, 1, -7)}
    for part in ("train", "test"):
        arrays = {f"{name}_{part}": one for name, one in given.items()}
        np.savez(tmp_path / f"{part}.npz", **arrays, **{f"lengths_{part}": np.asarray(LENGTHS)})
    config = Config()
    config.task.name, config.devices.count = "module:elsewhere:task", 1
    config.data.source = f"npz:{tmp_path}/train.npz"
    config.data.test_source = f"npz:{tmp_path}/test.npz"
    config.data.normalise, config.data.pad_to = "none", "2,6"
    prepare(config)
    config.data.pad_to = "2,4"
    with pytest.raises(DataError, match=r"data\.pad_to goes to 4"):
        prepare(config)


def test_lengths_that_nothing_reads_are_refused() -> None:
    given = Examples({"x": np.zeros((4, 5))}, {"y": np.zeros(4, int)}, np.asarray(LENGTHS))
    with pytest.raises(DataError, match=r"only data\.pad_to reads"):
        admit(given, "train", "d0", RULE)


@pytest.mark.parametrize(
    ("inputs", "targets", "rule", "says"),
    [
        (sequences(), sequences(), RULE, "the loss of the task would count padded ones"),
        (sequences(), {"y": sequences()}, AnyTargets(), "AnyTargets"),
        (sequences(), sequences()[:3], language().targets, "is no list of 3"),
        (sequences(), sequences()[::-1], language().targets, "has 3 positions, expected 1"),
        (np.zeros((4, 5)), [0] * 4, RULE, "needs the length of each sample"),
        (np.zeros(4), [0] * 4, RULE, "is for sequences"),
        ({"x": np.zeros((4, 5)), "lengths": np.ones(4)}, [0] * 4, RULE, "whole numbers"),
        ({"x": np.zeros((4, 5)), "lengths": [1, 2, 6, 1]}, [0] * 4, RULE, "sample 2 is 6"),
        ({"x": np.zeros((4, 7)), "lengths": [1, 7, 6, 1]}, [0] * 4, RULE, "sample 1 has 7"),
        ({"x": sequences(), "bias": np.ones((4, 6))}, [0] * 4, RULE, "can be told apart"),
        (
            {"x": np.zeros((4, 5)), "lengths": LENGTHS}, np.zeros((4, 5), int), language().targets,
            "sample 0 has 0 at position 1, behind its end at 1: write -1",
        ),
        ([*sequences()[:3], np.ones((2, 2))], [0] * 4, RULE, "which alone may vary"),
        ({"x": sequences(), "lengths": [1, 6, 2, 3]}, [0] * 4, RULE, "is 6, and the sample has 5"),
        (
            {"x": np.zeros((4, 5)), "lengths": LENGTHS, "mask": np.ones((4, 5), bool)}, [0] * 4,
            RULE, "mask of sample 0 has True at position 1, behind its end at 1: write 0",
        ),
        (
            {"x": np.zeros((4, 5)), "mask": np.arange(5) >= np.asarray(LENGTHS)[:, None]}, [0] * 4,
            RULE, "mask hides all positions of sample 1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_padded_is_refused(
    inputs: object, targets: object, rule: TargetRule, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        admitted(inputs, targets, rule)


def test_without_lengths_to_pad_to_the_field_is_named() -> None:
    with pytest.raises(DataError, match=r"samples of different lengths need data\.pad_to"):
        admit((sequences(), [0, 1, 0, 1]), "train", "d0", RULE)


def test_lengths_tell_samples_from_others() -> None:
    x, y = np.zeros((4, 5), np.int64), np.zeros(4, np.int64)
    examples = [Examples({"x": x}, {"y": y}, np.asarray(n)) for n in (LENGTHS, (1, 5, 2, 4))]
    prints = {Loader(one, None, 2, seed=0, device=0).fingerprint() for one in examples}
    assert len(prints) == 2
