"""What comes from outside, looked at before anything is done with it: the one way in for arrays.

Arrays of an .npz file, of a function of the user's, of a ``Dataset`` that a program hands over, and
images to predict are refused here, by the same code in the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipar_jax.data.types import Dataset, Split, empty_split
from pipar_jax.errors import DataError

Part = Literal["train", "test"]

#: Samples looked at together, so that a check takes little memory beside the data.
_AT_ONCE = 1024
_PURPOSE = {"train": "train on", "test": "test with"}


def admit(data: Any, part: Part, where: str) -> Dataset:
    """Returns a dataset that a program hands over, checked and in the types that training takes.

    Args:
      data: A ``Dataset``; only the split named by ``part`` is looked at.
      part: ``train`` on a device, ``test`` on the server.
      where: Whose it is, for messages.

    Raises:
      DataError: It is not a dataset, holds no sample, or its arrays, classes or normalisation do
        not fit each other.
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
            f"{where}: input_shape={said}, but its images are {made.input_shape}: say what they are"
        )
    return made


def assemble(
    source: str,
    part: Part,
    images: Any,
    labels: Any,
    *,
    classes: Any,
    mean: Any,
    std: Any,
    where: str,
) -> Dataset:
    """Returns a dataset of somebody's arrays, the other split empty.

    Args:
      source: What the dataset is called.
      part: The split that the arrays are.
      images: See ``make_split``.
      labels: See ``make_split``.
      classes: Number of classes; 0: the highest label + 1.
      mean: A number or one per channel, in units of the stored images.
      std: A number or one per channel, in units of the stored images.
      where: Name of the source, for messages.

    Raises:
      DataError: There is no sample, or something does not fit.
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


def make_split(images: Any, labels: Any, where: str) -> Split:
    """Returns a split of somebody's arrays after looking at their shapes and numbers.

    Args:
      images: [samples, height, width] or [samples, height, width, channels], uint8 or float.
      labels: [samples], whole numbers from 0.
      where: Name of the source, for messages.

    Raises:
      DataError: Shapes or types do not fit, a label is negative or an image is not finite.
    """
    images, labels = make_images(images, where), as_array(labels, f"{where}: labels")
    labels = np.squeeze(labels, axis=1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise DataError(
            f"{where}: labels must be [{len(images)}] whole numbers, one per image, got shape "
            f"{labels.shape} of {labels.dtype}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"{where}: label {int(labels.min())} is negative: labels count from 0")
    if len(labels) and int(labels.max()) > np.iinfo(np.int32).max:
        raise DataError(f"{where}: label {int(labels.max())} does not fit 32 bits")
    return Split(images, labels.astype(np.int32, copy=False))


def make_images(images: Any, where: str) -> NDArray[Any]:
    """Returns somebody's images as [samples, height, width, channels], uint8 or finite float32.

    Args:
      images: [samples, height, width] or [samples, height, width, channels]; numbers.
      where: Name of the source, for messages.

    Raises:
      DataError: The shape or type does not fit, or a number is not finite.
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
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is refused
        made: NDArray[np.float32] = raw.astype(np.float32, copy=False)
    for first in range(0, len(made), _AT_ONCE):
        if not np.isfinite(made[first : first + _AT_ONCE]).all():
            raise DataError(f"{where}: an image holds a value that is not finite: clean the data")
    return made


def check_fits(dataset: Dataset, classes: int, input_shape: Sequence[int], host: str) -> None:
    """Checks that a host's data suit the model that all hosts train.

    Args:
      dataset: The host's data.
      classes: Classes of the model.
      input_shape: Height, width and channels that the model takes.
      host: The host's name, for the message.

    Raises:
      DataError: The images have another shape, or the model knows fewer classes.
    """
    if tuple(dataset.input_shape) != tuple(input_shape):
        raise DataError(
            f"{host}: images of {dataset.source!r} are {tuple(dataset.input_shape)}, but the model "
            f"takes {tuple(input_shape)}: bring them to one shape on every host, or build the "
            f"model with input_shape={tuple(dataset.input_shape)}"
        )
    highest = max(int(split.labels.max(initial=-1)) for split in (dataset.train, dataset.test))
    if highest >= classes or dataset.classes > classes:
        has = f"label {highest}" if highest >= classes else f"{dataset.classes} classes"
        raise DataError(
            f"{host}: {dataset.source!r} has {has}, but the model knows classes 0 to "
            f"{classes - 1}: build it with classes={max(dataset.classes, highest + 1)}; for own "
            "data set data.classes, or give `classes` beside the arrays"
        )


def check_alike(datasets: Iterable[tuple[str, Dataset]]) -> None:
    """Checks that hosts whose model is built from their own data would all build the same one.

    Args:
      datasets: Hosts' names with their data. One is held at a time, if the caller makes them so.

    Raises:
      DataError: Two differ in the shape of an image or in the number of classes.
    """
    first: tuple[str, str, tuple[int, ...], int] | None = None
    for host, one in datasets:
        here = host, one.source, tuple(one.input_shape), one.classes
        first = first or here
        if here[2] != first[2]:
            raise DataError(
                f"{host}: images of {one.source!r} are {here[2]}, but those of {first[1]!r} of "
                f"{first[0]} are {first[2]}: bring them to one shape on every host"
            )
        if here[3] != first[3]:
            raise DataError(
                f"{host}: {one.source!r} has {here[3]} classes, but {first[1]!r} of {first[0]} has "
                f"{first[3]}: set data.classes, or give `classes` beside the arrays of every host"
            )


def make_queries(images: Any, input_shape: Sequence[int], stored: str) -> NDArray[Any]:
    """Returns images to predict, [batch, height, width, channels], as those of the training were.

    Args:
      images: Raw images, not normalised: [batch, height, width(, channels)].
      input_shape: Height, width and channels that the model takes.
      stored: Type of the images that the run was tested with: ``uint8`` or ``float32``.

    Raises:
      DataError: There is none, or their shape, type or range is another.
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
                "predict: the run was trained on uint8 images, 0 to 255, and got "
                f"{raw.dtype} from {made.min():g} to {made.max():g}: give images as they are "
                "stored; they are normalised here"
            )
    elif raw.dtype == np.uint8:
        raise DataError(
            "predict: the run was trained on floats, and got uint8: scale images as the training "
            "data were, and give them as float32"
        )
    return made


def as_array(values: Any, what: str) -> NDArray[Any]:
    """Returns somebody's values as an array.

    Raises:
      DataError: They are not one, such as rows of different lengths.
    """
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} are not an array: {error}") from error


def _check_classes(classes: Any, highest: int, where: str) -> int:
    """Returns the number of classes; 0 stands for the highest label + 1."""
    made = as_array(classes, f"{where}: classes")
    if made.size != 1 or made.dtype.kind not in "iu" or int(made.item()) < 0:
        raise DataError(f"{where}: classes must be a whole number above 0, got {classes!r}")
    count = int(made.item()) or highest + 1
    if highest >= count:
        raise DataError(
            f"{where}: label {highest} is beyond classes={count}, counted from 0: raise "
            "data.classes, or `classes` beside the arrays"
        )
    return count


def _per_channel(value: Any, channels: int, what: str) -> NDArray[np.float32]:
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
