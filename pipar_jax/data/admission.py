"""Validation of arrays from outside, before they are used.

Arrays of files, of the user's function, of a ``Dataset`` or a pair of arrays passed by a program,
and samples to predict (``queries``) are all checked here, with the same messages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array
from pipar_jax.data.padding import find_padding, stack_all
from pipar_jax.data.types import Dataset, Examples
from pipar_jax.errors import DataError
from stages.errors import StageError
from stages.signature import INPUT, TARGET, computed_dtype
from stages.tasks.targets import TargetRule

Part = Literal["train", "test"]

#: Number of samples checked at a time, so that a check takes little memory.
_AT_ONCE = 1024
_PURPOSE = {"train": "train on", "test": "test with"}
#: Maximum number of side inputs, and of targets.
MOST_NAMES = 16
_NAME = re.compile(r"[A-Za-z_]\w{0,63}")


def admit(
    data: object,
    part: Part,
    where: str,
    rule: TargetRule,
    classes: int = 0,
    *,
    pad_to: tuple[int, ...] = (),
) -> Dataset:
    """Returns data passed by a program, checked.

    Args:
      data: A ``Dataset``, of which only the split named by ``part`` is checked, ``Examples``, or a
        pair of inputs and targets, each an array or a dictionary of arrays. Only a ``Dataset`` is
        normalised: by its mean and std.
      part: ``train`` on a device, ``test`` on the server.
      where: Owner of the data, for messages.
      rule: What the task needs targets to be.
      classes: Number of classes where a ``Dataset`` does not say it; 0: as the targets tell.
      pad_to: Lengths to which mini-batches are padded; none: all samples are equally long.

    Raises:
      DataError: It is not data, has no sample, or its arrays, classes and normalisation are not
        consistent.
    """
    if isinstance(data, Dataset):
        given: Examples = getattr(data, part)
        return assemble(
            data.source, part, given.inputs, given.targets, classes=data.classes or classes,
            mean=data.mean, std=data.std, rule=rule, where=f"{where}: {data.source!r}",
            pad_to=pad_to, lengths=given.lengths,
        )  # fmt: skip
    lengths = None
    if isinstance(data, Examples):
        lengths, data = data.lengths, (data.inputs, data.targets)
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise DataError(
            f"{where}: expected a pair (inputs, targets) or a pipar_jax.data.Dataset, got "
            f"{type(data).__name__}: give one for each device and, last, the one for the test"
        )
    inputs, targets = data
    return assemble(
        "arrays", part, inputs, targets, classes=classes, mean=None, std=None, rule=rule,
        where=f"{where}: its data", pad_to=pad_to, lengths=lengths,
    )  # fmt: skip


def admit_device(
    data: object,
    where: str,
    rule: TargetRule,
    classes: int = 0,
    *,
    tests: bool,
    pad_to: tuple[int, ...] = (),
) -> Dataset:
    """Returns data of a device passed by a program, checked.

    Args:
      data: See ``admit``.
      where: Owner of the data, for messages.
      rule: What the task needs targets to be.
      classes: See ``admit``.
      tests: Whether the device evaluates test data of its own: the test split of a ``Dataset``.
      pad_to: See ``admit``.

    Raises:
      DataError: See ``admit``; or there are no test data.
    """
    train = admit(data, "train", where, rule, classes, pad_to=pad_to)
    if not tests:
        return train
    if not isinstance(data, Dataset):
        raise DataError(
            f"{where}: run.evaluate_on needs test data of the device's own: pass a "
            "pipar_jax.data.Dataset with both splits, or set run.evaluate_on=server"
        )
    test = admit(data, "test", where, rule, classes, pad_to=pad_to)
    return with_tests(train, test, where)


def with_tests(train: Dataset, test: Dataset, where: str) -> Dataset:
    """Returns the training split of one dataset with the test split of another.

    Raises:
      DataError: Their samples differ in shape, or the test split has more classes.
    """
    here, there = test.signature(), train.signature()
    if (here.input, here.sides, here.targets) != (there.input, there.sides, there.targets):
        raise DataError(f"{where}: test samples are {here}, but training samples {there}")
    if test.classes > train.classes > 0:
        raise DataError(
            f"{where}: the test data have {test.classes} classes, the training data "
            f"{train.classes}: set data.classes, or give `classes` with the arrays"
        )
    return dataclasses.replace(train, test=test.test)


def assemble(
    source: str,
    part: Part,
    inputs: object,
    targets: object,
    *,
    classes: object,
    mean: object,
    std: object,
    rule: TargetRule,
    where: str,
    pad_to: tuple[int, ...] = (),
    lengths: object = None,
) -> Dataset:
    """Returns a dataset of the user's arrays, with the other split empty.

    Args:
      source: Name of the dataset.
      part: The split of the arrays.
      inputs: See ``make_examples``.
      targets: See ``make_examples``.
      classes: Number of classes, or of outputs; 0: as the targets tell.
      mean: A number or one per channel, in units of the stored input; None: not normalised.
      std: A number or one per channel, in units of the stored input; None likewise.
      rule: What the task needs targets to be.
      where: Name of the source, for messages.
      pad_to: Lengths to which mini-batches are padded; none: all samples are equally long.
      lengths: [samples] how long each is; None: as lists, or a side input, tell.

    Raises:
      DataError: There is no sample, or an argument is not valid.
    """
    padding = None
    if lengths is not None and not pad_to:
        raise DataError(
            f"{where}: lengths come with the arrays, and only data.pad_to reads them: set it, or "
            "leave them out"
        )
    if pad_to:
        given = by_name(inputs, INPUT, where), by_name(targets, TARGET, where)
        inputs, targets, said = stack_all(*given, rule.padding or 0, where)
        lengths = said if lengths is None else lengths
    examples = _with_targets(make_examples(inputs, targets, where), rule, where)
    if not len(examples):
        raise DataError(f"{where}: there is no sample to {_PURPOSE[part]}: x_{part} is empty")
    if pad_to:
        known = None if lengths is None else as_array(lengths, f"{where}: the lengths")
        examples, padding = find_padding(
            dataclasses.replace(examples, lengths=known), pad_to, rule.padding, where
        )
    scaled = mean is not None or std is not None
    channels = examples.x.shape[-1] if examples.x.ndim > 1 else 1
    empty = examples.empty()
    return Dataset(
        source=source,
        train=examples if part == "train" else empty,
        test=examples if part == "test" else empty,
        classes=_width(classes, examples.targets, rule, where),
        mean=_per_channel(0 if mean is None else mean, channels, f"{where}: mean")
        if scaled
        else None,
        std=_per_channel(1 if std is None else std, channels, f"{where}: std") if scaled else None,
        padding=padding,
    )


def make_examples(inputs: object, targets: object, where: str) -> Examples:
    """Returns examples of the user's arrays after checking their shapes and values.

    Args:
      inputs: An array [samples, …], or arrays by name: ``x``, and side inputs.
      targets: An array [samples, …], or arrays by name.
      where: Name of the source, for messages.

    Raises:
      DataError: Names, lengths or dtypes are not valid, or a number is not finite or too large.
    """
    made = [
        {name: check_array(one, f"{where}: {what} {name}") for name, one in given.items()}
        for what, given in (("input", by_name(inputs, INPUT, where)),
                            ("target", by_name(targets, TARGET, where)))
    ]  # fmt: skip
    if INPUT not in made[0]:
        raise DataError(
            f"{where}: the inputs {sorted(made[0])} have no {INPUT!r}: name the one that flows "
            f"through the network {INPUT!r}; all others are side inputs"
        )
    examples = Examples(made[0], made[1])
    for what, arrays in (("input", examples.inputs), ("target", examples.targets)):
        for name, one in arrays.items():
            if len(one) != len(examples):
                raise DataError(
                    f"{where}: {what} {name} has {len(one)} samples, expected {len(examples)} as "
                    f"input {INPUT}: the first axis of every array are the samples"
                )
    return examples


def check_array(values: object, what: str) -> Array:
    """Returns the user's values as an array [samples, …] of finite numbers.

    Args:
      values: An array, possibly memory-mapped; it is read in parts and not copied.
      what: Name of the array, for messages.

    Raises:
      DataError: They are not numbers, have no axis of samples, or a number is not finite, not
        within float32 or not within int32.
    """
    made = as_array(values, what)
    if made.ndim < 1 or 0 in made.shape[1:]:
        raise DataError(f"{what} must be [samples, …], got shape {made.shape}")
    kind = computed_dtype(made.dtype.name, "float32")
    if made.dtype.kind not in "fiub" and made.dtype.name != "bfloat16":
        number = ": number the classes, alike on every host" if made.dtype.kind in "USO" else ""
        if made.dtype.kind == "O":
            number += "; samples of different lengths need data.pad_to"
        raise DataError(f"{what} must be numbers or truth values, got {made.dtype}{number}")
    if made.dtype.itemsize < 4 and kind != "float32":
        return made
    limits = np.iinfo(np.int32)
    for first in range(0, len(made), _AT_ONCE):
        some = made[first : first + _AT_ONCE]
        if kind == "int32":
            if some.size and not limits.min <= int(some.min()) <= int(some.max()) <= limits.max:
                raise DataError(f"{what} has a number that exceeds 32 bits")
            continue
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite
            finite = np.isfinite(some.astype(np.float32, copy=False)).all()
        if not finite:
            raise DataError(f"{what} has a value that is not finite: clean the data")
    return made


def by_name(arrays: object, name: str, where: str) -> dict[str, object]:
    """Returns the user's arrays by name.

    Args:
      arrays: An array, or arrays by name.
      name: The name of a single array.
      where: Name of the source, for messages.

    Raises:
      DataError: A name is not valid, or there is none or too many.
    """
    if not isinstance(arrays, Mapping):
        return {name: arrays}
    wrong = [one for one in arrays if not (isinstance(one, str) and _NAME.fullmatch(one))]
    if wrong or not 0 < len(arrays) <= MOST_NAMES:
        raise DataError(
            f"{where}: arrays must have 1 to {MOST_NAMES} names such as 'mask', got "
            f"{wrong[:3] or len(arrays)}"
        )
    return {str(key): value for key, value in arrays.items()}


def as_array(values: object, what: str) -> Array:
    """Returns the user's values as an array.

    Raises:
      DataError: The values are not an array, such as rows of different lengths.
    """
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        hint = "; samples of different lengths need data.pad_to" if isinstance(values, list) else ""
        raise DataError(f"{what} are not an array: {error}{hint}") from error


def _with_targets(examples: Examples, rule: TargetRule, where: str) -> Examples:
    """Returns examples with the targets as a task trains on them.

    Raises:
      DataError: They are not what the task needs.
    """
    only = examples.targets.get(TARGET)
    if rule.takes_dict:
        return examples
    if only is None or len(examples.targets) > 1:
        raise DataError(
            f"{where}: the targets are {sorted(examples.targets)}, but the task takes a single "
            f"array: name it y (y_train, y_test), or set task.name to a task of your own"
        )
    try:
        admitted = {TARGET: rule.admit(np.asarray(only), where)}
        return dataclasses.replace(examples, targets=admitted)
    except StageError as error:
        raise DataError(str(error)) from error


def _width(classes: object, targets: Mapping[str, Array], rule: TargetRule, where: str) -> int:
    """Returns the size of the outputs' last axis, such as the number of classes.

    Args:
      classes: The number that is configured or came with the data; 0: as the targets tell.
      targets: The targets, as the task trains on them.
      rule: What they have to be.
      where: Name of the source, for messages.

    Raises:
      DataError: The number is not valid, or a label is beyond it.
    """
    made = as_array(classes, f"{where}: classes")
    if made.size != 1 or made.dtype.kind not in "iu" or int(made.item()) < 0:
        raise DataError(f"{where}: classes must be a whole number above 0, got {classes!r}")
    if rule.takes_dict:
        return int(made.item())
    width = rule.width(targets[TARGET], int(made.item()))
    if rule.counts_classes and (highest := int(targets[TARGET].max(initial=-1))) >= width:
        raise DataError(
            f"{where}: label {highest} is out of range for classes={width}, counted from 0: raise "
            "data.classes, or `classes` with the arrays"
        )
    return width


def _per_channel(value: object, channels: int, what: str) -> NDArray[np.float32]:
    try:
        made = np.asarray(value, np.float32).reshape(-1)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} must be numbers, got {value!r}") from error
    if made.size not in (1, channels) or not np.isfinite(made).all():
        raise DataError(
            f"{what} must be one finite number, or one for each of {channels} channels, got "
            f"{made.size} of which {np.count_nonzero(~np.isfinite(made))} are not finite"
        )
    if what.endswith("std"):
        with np.errstate(divide="ignore", over="ignore"):
            if (made <= 0).any() or not np.isfinite(np.float32(1) / made).all():
                raise DataError(f"{what} must be above 0, got {made.tolist()}")
    return np.broadcast_to(made, (channels,)).copy()
