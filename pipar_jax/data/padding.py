"""Samples of different lengths: how long each is, and to what a mini-batch of them is padded.

The length of a sample is the extent of its input's first axis, such as its number of tokens. An
array of a sample is *of positions* if its first axis is as long as that of the input: a mask, or
the target of each token. Arrays of positions are stored padded to any one length, and a mini-batch
of them is cut or padded to the smallest configured length that holds its longest sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array, DType
from pipar_jax.data.types import Examples, Padding
from pipar_jax.errors import DataError
from stages.signature import INPUT

#: Names of the side inputs that say how long samples are.
LENGTHS, MASK = "lengths", "mask"
#: Samples that are looked at at a time.
_AT_ONCE = 1024


class Stacked(NamedTuple):
    """Samples of different lengths in one array.

    Attributes:
      array: [samples, longest, …], filled up behind each sample's end.
      lengths: [samples] the length of each.
    """

    array: Array
    lengths: NDArray[np.intp]


def stack_all(
    inputs: Mapping[str, object], targets: Mapping[str, object], fill: float, where: str
) -> tuple[dict[str, object], dict[str, object], NDArray[np.intp] | None]:
    """Returns inputs and targets with lists of sequences as arrays, and how long the inputs are.

    Args:
      inputs: Arrays, or lists with an array [positions, …] for each sample, by name.
      targets: Likewise.
      fill: What is put behind the end of a sample's targets; inputs get zeros.
      where: Name of the source, for messages.

    Raises:
      DataError: A sample's arrays differ in length, or samples differ in more than that.
    """
    lengths: NDArray[np.intp] | None = None
    made: list[dict[str, object]] = []
    for what, arrays, empty in (("input", inputs, 0.0), ("target", targets, fill)):
        stacked = dict(arrays)
        for name in sorted(arrays, key=lambda name: name != INPUT):  # the input tells the lengths
            sequences = _stack(arrays[name], empty, f"{where}: {what} {name}")
            if sequences is None:
                continue
            stacked[name] = sequences.array
            if what == "input" and name == INPUT:
                lengths = sequences.lengths
            elif len(set(sequences.lengths.tolist())) > 1:
                _check_alike(sequences.lengths, lengths, f"{where}: {what} {name}")
        made.append(stacked)
    return made[0], made[1], lengths


def _check_alike(lengths: NDArray[np.intp], inputs: NDArray[np.intp] | None, what: str) -> None:
    """Checks that the sequences of samples are as long as their inputs.

    Raises:
      DataError: They are not.
    """
    if inputs is None or len(inputs) != len(lengths):
        raise DataError(
            f"{what} is a list of sequences of different lengths, but input {INPUT} is no list of "
            f"{len(lengths)}: give {INPUT} as such a list, too"
        )
    wrong = np.flatnonzero(lengths != inputs)
    if wrong.size:
        first = int(wrong[0])
        raise DataError(
            f"{what} of sample {first} has {lengths[first]} positions, expected {inputs[first]} "
            f"as input {INPUT}"
        )


def _stack(values: object, fill: float, what: str) -> Stacked | None:
    """Returns a list of sequences as one array, or None if the values are something else.

    Args:
      values: A list, or an array of objects, with an array [positions, …] for each sample; numbers
        have no positions.
      fill: What is put behind the end of a sample.
      what: Name of the array, for messages.

    Raises:
      DataError: Samples differ in more than their lengths.
    """
    if isinstance(values, np.ndarray) and values.dtype == object and values.ndim == 1:
        values = list(values)
    if not isinstance(values, list | tuple) or not values:
        return None
    try:
        samples = [np.asarray(one) for one in values]
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} are not an array: {error}") from error
    if not all(one.ndim for one in samples):
        return None
    shapes = {one.shape[1:] for one in samples}
    if len(shapes) > 1:
        raise DataError(
            f"{what}: samples are {sorted(shapes)[0]} and {sorted(shapes)[1]} behind their first "
            "axis, which alone may vary (data.pad_to)"
        )
    lengths = np.asarray([len(one) for one in samples], np.intp)
    (rest,) = shapes
    dtype = _holding(np.result_type(*{one.dtype for one in samples}), fill)
    made = np.full((len(samples), int(lengths.max()), *rest), fill, dtype)
    for row, one in zip(made, samples, strict=True):
        row[: len(one)] = one
    return Stacked(made, lengths)


def _holding(dtype: DType, fill: float) -> DType:
    """Returns a dtype for the numbers of another one and for a fill: unsigned ones lack -1."""
    whole = float(fill).is_integer()
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        fits = whole and limits.min <= fill <= limits.max
    else:
        fits = dtype.kind != "b" or fill in (0, 1)
    if fits:
        return dtype
    return np.dtype(np.int64 if whole else np.float64)


def find_padding(
    examples: Examples, pad_to: tuple[int, ...], fill: float | None, where: str
) -> tuple[Examples, Padding]:
    """Returns samples with their lengths, and what mini-batches of them are padded to.

    Args:
      examples: The samples. Without ``lengths`` they have a side input ``lengths`` or ``mask``.
      pad_to: The lengths, rising.
      fill: Target of a position that does not count; None: the task has none. With nan it is not
        known, and targets are not checked.
      where: Name of the source, for messages.

    Raises:
      DataError: It is not known how long samples are, one is too long, or their loss would count
        padded positions.
    """
    if examples.x.ndim < 2:
        raise DataError(
            f"{where}: data.pad_to is for sequences [samples, length, …], and the input is "
            f"{list(examples.x.shape)}: leave it empty"
        )
    stored = examples.x.shape[1]
    inputs, targets = (
        frozenset(name for name, one in arrays.items() if one.shape[1:2] == (stored,))
        for arrays in (examples.inputs, examples.targets)
    )
    padding = Padding(pad_to, inputs, targets, 0 if fill is None else fill)
    for names, arrays in ((padding.inputs, examples.inputs), (padding.targets, examples.targets)):
        for name, one in arrays.items():
            if name not in names and one.shape[1:2] == (padding.longest,):
                raise DataError(
                    f"{where}: {name} has {padding.longest} entries per sample, as many as the "
                    f"longest of data.pad_to, and the input {stored} positions: name another "
                    "longest length, so that both can be told apart"
                )
    if padding.targets and fill is None:
        raise DataError(
            f"{where}: target {sorted(padding.targets)[0]} has an entry for each of {stored} "
            "positions, and the loss of the task would count padded ones, too: use "
            "task.name=language, or a task of your own with targets=AnyTargets(padding=…), whose "
            "loss leaves such positions out"
        )
    lengths = _lengths(examples, stored, where)
    _check_sides(examples.sides, lengths, stored, where)
    if int(lengths.max(initial=0)) > padding.longest:
        index = int(lengths.argmax())
        raise DataError(
            f"{where}: sample {index} has {int(lengths[index])} positions, and data.pad_to goes to "
            f"{padding.longest}: add a length, or cut the sample"
        )
    made = dict(examples.targets)
    for name in padding.targets if not math.isnan(padding.fill) else ():
        _check_masked(made[name], lengths, padding.fill, f"{where}: target {name}")
        made[name] = made[name].astype(_holding(made[name].dtype, padding.fill), copy=False)
    return dataclasses.replace(examples, targets=made, lengths=lengths), padding


def _lengths(examples: Examples, stored: int, where: str) -> NDArray[np.intp]:
    """Returns how long each sample is.

    Raises:
      DataError: Nothing says it, or what does is not valid.
    """
    sides: Mapping[str, Array] = examples.sides
    given, what = examples.lengths, "the lengths"
    if given is None and LENGTHS in sides:
        given, what = sides[LENGTHS], f"side input {LENGTHS}"
    if given is None and MASK in sides and sides[MASK].shape[1:] == (stored,):
        return _mask_lengths(sides[MASK], where)
    if given is None:
        raise DataError(
            f"{where}: data.pad_to needs the length of each sample: give x as a list of arrays of "
            "different lengths, a side input 'lengths' [samples] or 'mask' [samples, length], or, "
            "where the network takes neither, lengths_train and lengths_test with the arrays"
        )
    made = np.asarray(given)
    if made.shape != (len(examples),) or made.dtype.kind not in "iu":
        raise DataError(
            f"{where}: {what} must be [samples] whole numbers, got {made.dtype}{list(made.shape)}"
        )
    if made.size and not (made.min() >= 1 and made.max() <= stored):
        wrong = int(np.flatnonzero((made < 1) | (made > stored))[0])
        raise DataError(
            f"{where}: {what} of sample {wrong} is {int(made[wrong])}, expected 1 to {stored}, the "
            "positions that are stored"
        )
    return made.astype(np.intp)


def _mask_lengths(mask: Array, where: str) -> NDArray[np.intp]:
    """Returns the last position of each sample that its mask does not hide, counted from 1.

    Raises:
      DataError: A mask hides all positions, as the opposite of a mask may.
    """
    lengths = np.ones(len(mask), np.intp)
    for first in range(0, len(mask), _AT_ONCE):
        some = np.asarray(mask[first : first + _AT_ONCE]) != 0
        if not (seen := some.any(axis=1)).all():
            raise DataError(
                f"{where}: side input {MASK} hides all positions of sample "
                f"{first + int(np.argmin(seen))}: write true or 1 where a position counts"
            )
        lengths[first : first + len(some)] = some.shape[1] - np.argmax(some[:, ::-1], axis=1)
    return lengths


def _check_sides(
    sides: Mapping[str, Array], lengths: NDArray[np.intp], stored: int, where: str
) -> None:
    """Checks that the network is told of no position behind a sample's end, which may be cut off.

    Raises:
      DataError: It is.
    """
    said = sides.get(LENGTHS)
    if said is not None and said.shape == lengths.shape and (np.asarray(said) > lengths).any():
        wrong = int(np.argmax(np.asarray(said) > lengths))
        raise DataError(
            f"{where}: side input {LENGTHS} of sample {wrong} is {said[wrong]}, and the sample has "
            f"{int(lengths[wrong])} positions: let both say the same"
        )
    if MASK in sides and sides[MASK].shape[1:] == (stored,):
        _check_masked(sides[MASK], lengths, 0, f"{where}: side input {MASK}")


def _check_masked(targets: Array, lengths: NDArray[np.intp], fill: float, what: str) -> None:
    """Checks that the targets of padded positions do not count.

    Raises:
      DataError: One does.
    """
    positions = np.arange(targets.shape[1])
    for first in range(0, len(targets), _AT_ONCE):
        some = np.asarray(targets[first : first + _AT_ONCE])
        beyond = positions >= lengths[first : first + len(some), None]
        wrong = beyond & (some != fill).reshape(*beyond.shape, -1).any(axis=-1)
        if wrong.any():
            sample, position = (int(one) for one in np.argwhere(wrong)[0])
            raise DataError(
                f"{what} of sample {first + sample} has {some[sample, position]} at position "
                f"{position}, behind its end at {int(lengths[first + sample])}: write {fill:g} "
                "there, so that it does not count"
            )
