"""Validation of arrays from outside, before they are used.

Arrays of an .npz file, of the user's function, of a ``Dataset`` passed by a program, and images to
predict are all checked here, with the same messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array
from pipar_jax.data.types import Dataset, Split, empty_split
from pipar_jax.errors import DataError

Part = Literal["train", "test"]

#: Number of samples checked at a time, so that a check takes little memory.
_AT_ONCE = 1024
_PURPOSE = {"train": "train on", "test": "test with"}


def admit(data: object, part: Part, where: str) -> Dataset:
    """Returns a dataset passed by a program, checked and converted to the types of training.

    Args:
      data: A ``Dataset``; only the split named by ``part`` is checked.
      part: ``train`` on a device, ``test`` on the server.
      where: Owner of the data, for messages.

    Raises:
      DataError: It is not a dataset, has no sample, or its arrays, classes and normalisation are
        not consistent.
    """
    if not isinstance(data, Dataset):
        raise DataError(
            f"{where}: expected a pipar_jax.data.Dataset, got {type(data).__name__}: give one for "
            "each device and, last, the one with the test split"
        )
    where = f"{where}: {data.source!r}"
    given: Split = getattr(data, part)
    made = assemble(
        data.source, part, given.images, given.labels,
        classes=data.classes, mean=data.mean, std=data.std, where=where,
    )  # fmt: skip
    said = tuple(data.input_shape)
    if said not in (made.input_shape, np.shape(given.images)[1:]):
        raise DataError(
            f"{where}: input_shape={said}, but its images are {made.input_shape}: set input_shape "
            "to that of the images"
        )
    return made


def assemble(
    source: str,
    part: Part,
    images: object,
    labels: object,
    *,
    classes: object,
    mean: object,
    std: object,
    where: str,
) -> Dataset:
    """Returns a dataset of the user's arrays, with the other split empty.

    Args:
      source: Name of the dataset.
      part: The split of the arrays.
      images: See ``make_split``.
      labels: See ``make_split``.
      classes: Number of classes; 0: the highest label + 1.
      mean: A number or one per channel, in units of the stored images.
      std: A number or one per channel, in units of the stored images.
      where: Name of the source, for messages.

    Raises:
      DataError: There is no sample, or an argument is not valid.
    """
    split = make_split(images, labels, where)
    if not len(split):
        raise DataError(f"{where}: there is no sample to {_PURPOSE[part]}: x_{part} is empty")
    height, width, channels = split.images.shape[1:]
    shape = (height, width, channels)
    return Dataset(
        source=source,
        train=split if part == "train" else empty_split(shape),
        test=split if part == "test" else empty_split(shape),
        classes=_check_classes(classes, int(split.labels.max()), where),
        input_shape=shape,
        mean=_per_channel(mean, channels, f"{where}: mean"),
        std=_per_channel(std, channels, f"{where}: std"),
    )


def make_split(images: object, labels: object, where: str) -> Split:
    """Returns a split of the user's arrays after checking their shapes and values.

    Args:
      images: [samples, height, width] or [samples, height, width, channels], uint8 or float.
      labels: [samples], whole numbers from 0.
      where: Name of the source, for messages.

    Raises:
      DataError: Shapes or dtypes are not valid, a label is negative or an image is not finite.
    """
    images, labels = make_images(images, where), as_array(labels, f"{where}: labels")
    labels = np.squeeze(labels, axis=1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise DataError(
            f"{where}: labels must be [{len(images)}] whole numbers, one per image, got shape "
            f"{labels.shape} of {labels.dtype}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"{where}: label {int(labels.min())} is negative: labels start at 0")
    if len(labels) and int(labels.max()) > np.iinfo(np.int32).max:
        raise DataError(f"{where}: label {int(labels.max())} exceeds 32 bits")
    return Split(images, labels.astype(np.int32, copy=False))


def make_images(images: object, where: str) -> Array:
    """Returns the user's images as [samples, height, width, channels], uint8 or finite float32.

    Args:
      images: [samples, height, width] or [samples, height, width, channels]; numbers.
      where: Name of the source, for messages.

    Raises:
      DataError: The shape or dtype is not valid, or a number is not finite.
    """
    raw = as_array(images, f"{where}: images")
    if raw.ndim == 3:
        raw = raw[..., None]
    if raw.ndim != 4 or 0 in raw.shape[1:]:
        raise DataError(
            f"{where}: images must be [samples, height, width] or [samples, height, width, "
            f"channels], got shape {raw.shape}"
        )
    if raw.dtype == np.uint8:
        return raw
    if raw.dtype.kind not in "fiub":
        raise DataError(f"{where}: images must be uint8 or float, got {raw.dtype}")
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite and are rejected
        made: NDArray[np.float32] = raw.astype(np.float32, copy=False)
    for first in range(0, len(made), _AT_ONCE):
        if not np.isfinite(made[first : first + _AT_ONCE]).all():
            raise DataError(f"{where}: an image has a value that is not finite: clean the data")
    return made


def check_fits(dataset: Dataset, classes: int, input_shape: Sequence[int], host: str) -> None:
    """Checks that the data of a host match the model.

    Args:
      dataset: The host's data.
      classes: Classes of the model.
      input_shape: Height, width and channels of the model's input.
      host: The host's name, for the message.

    Raises:
      DataError: The images have another shape, or the model has fewer classes.
    """
    if tuple(dataset.input_shape) != tuple(input_shape):
        raise DataError(
            f"{host}: images of {dataset.source!r} are {tuple(dataset.input_shape)}, but the "
            f"model expects {tuple(input_shape)}: use the same shape on every host, or build the "
            f"model with input_shape={tuple(dataset.input_shape)}"
        )
    highest = max(int(split.labels.max(initial=-1)) for split in (dataset.train, dataset.test))
    if highest >= classes or dataset.classes > classes:
        has = f"label {highest}" if highest >= classes else f"{dataset.classes} classes"
        raise DataError(
            f"{host}: {dataset.source!r} has {has}, but the model has classes 0 to {classes - 1}: "
            f"build it with classes={max(dataset.classes, highest + 1)}; for own data set "
            "data.classes, or give `classes` with the arrays"
        )


def check_alike(datasets: Iterable[tuple[str, Dataset]]) -> None:
    """Checks that hosts that build their model from their own data build the same model.

    Args:
      datasets: Names of hosts with their data; consumed one by one.

    Raises:
      DataError: Two hosts differ in the shape of images or the number of classes.
    """
    first: tuple[str, str, tuple[int, ...], int] | None = None
    for host, one in datasets:
        here = host, one.source, tuple(one.input_shape), one.classes
        first = first or here
        if here[2] != first[2]:
            raise DataError(
                f"{host}: images of {one.source!r} are {here[2]}, but those of {first[1]!r} of "
                f"{first[0]} are {first[2]}: use the same shape on every host"
            )
        if here[3] != first[3]:
            raise DataError(
                f"{host}: {one.source!r} has {here[3]} classes, but {first[1]!r} of {first[0]} has "
                f"{first[3]}: set data.classes, or give `classes` with the arrays of every host"
            )


def make_queries(images: object, input_shape: Sequence[int], stored: str) -> Array:
    """Returns images to predict, [batch, height, width, channels], like the training data.

    Args:
      images: Raw images, not normalised: [batch, height, width(, channels)].
      input_shape: Height, width and channels of the model's input.
      stored: Dtype of the run's test images: ``uint8`` or ``float32``.

    Raises:
      DataError: There is no image, or shape, dtype or range differs.
    """
    raw = as_array(images, "predict: images")
    given = raw.shape
    expected = "[batch, " + ", ".join(map(str, input_shape)) + "]"
    if given == tuple(input_shape):
        raise DataError(
            f"predict: images must be {expected}, got one of shape {given}: write images[None]"
        )
    made = make_images(raw, "predict")
    if not len(made):
        raise DataError(f"predict: there is no image: expected {expected}, got shape {given}")
    if made.shape[1:] != tuple(input_shape):
        raise DataError(f"predict: images must be {expected}, got shape {given}")
    if stored == "uint8":
        if raw.dtype.kind not in "iu" or made.min() < 0 or made.max() > 255:
            raise DataError(
                f"predict: the run was trained on uint8 images, 0 to 255, and got {raw.dtype} "
                f"from {made.min():g} to {made.max():g}: pass images as stored; they are "
                "normalised here"
            )
    elif raw.dtype == np.uint8:
        raise DataError(
            "predict: the run was trained on floats, and got uint8: scale images like the "
            "training data, and pass them as float32"
        )
    return made


def as_array(values: object, what: str) -> Array:
    """Returns the user's values as an array.

    Raises:
      DataError: The values are not an array, such as rows of different lengths.
    """
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} are not an array: {error}") from error


def _check_classes(classes: object, highest: int, where: str) -> int:
    """Returns the number of classes; 0 stands for the highest label + 1."""
    made = as_array(classes, f"{where}: classes")
    if made.size != 1 or made.dtype.kind not in "iu" or int(made.item()) < 0:
        raise DataError(f"{where}: classes must be a whole number above 0, got {classes!r}")
    count = int(made.item()) or highest + 1
    if highest >= count:
        raise DataError(
            f"{where}: label {highest} is out of range for classes={count}, counted from 0: raise "
            "data.classes, or `classes` with the arrays"
        )
    return count


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
