"""Whether the data of hosts match the model, and each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipar_jax.data.types import Dataset
from pipar_jax.errors import DataError
from stages.signature import Signature


def check_fits(dataset: Dataset, model: Signature, host: str) -> None:
    """Checks that the data of a host match the model.

    Args:
      dataset: The host's data.
      model: What the model takes; its targets are not compared.
      host: The host's name, for the message.

    Raises:
      DataError: The input has another shape or kind of numbers, a side input is missing or has
        another shape, or the model has fewer classes.
    """
    has = dataset.signature()
    where = f"{host}: input of {dataset.source!r}"
    if has.input.shape != model.input.shape:
        raise DataError(
            f"{where} is {has.input.shape}, but the model expects {model.input.shape}: use the "
            f"same shape on every host, or build the model with input_shape={has.input.shape}"
        )
    kind, wanted = _kind(has.input.dtype), _kind(model.input.dtype)
    if kind != wanted and (kind, wanted) != ("bool", "float"):
        remedy = {
            "float": "give `scale` with the arrays or set data.scale",
            "whole": "give whole numbers",
            "bool": "give truth values",
        }[wanted]
        raise DataError(
            f"{where} is {dataset.train.x.dtype}, but the model expects {model.input.dtype}: "
            f"{remedy}"
        )
    extra = sorted(has.sides.keys() - model.sides.keys())
    if extra:
        raise DataError(
            f"{host}: the model takes no side input {extra[0]!r} (it takes: "
            f"{', '.join(model.sides) or 'none'}), but {dataset.source!r} has it: leave it out"
        )
    for name, one in model.sides.items():
        given = has.sides.get(name)
        if given is None or (given.shape, _kind(given.dtype)) != (one.shape, _kind(one.dtype)):
            raise DataError(
                f"{host}: the model takes the side input {name!r} {one}, but {dataset.source!r} "
                f"has {'none of this name' if given is None else str(given)}: give it as "
                f"x_train.{name} and x_test.{name}, or as inputs={{'x': …, {name!r}: …}}"
            )
    if dataset.classes > model.classes > 0:
        raise DataError(
            f"{host}: {dataset.source!r} has {dataset.classes} classes, but the model has classes "
            f"0 to {model.classes - 1}: build it with classes={dataset.classes}; for own data set "
            "data.classes, or give `classes` with the arrays"
        )


def _kind(dtype: str) -> str:
    """Returns the kind of numbers of a dtype; how wide they are is the computation's business."""
    if dtype == "bool":
        return dtype
    return "whole" if dtype.startswith(("int", "uint")) else "float"


def check_alike(datasets: Iterable[tuple[str, Dataset]]) -> None:
    """Checks that hosts that build their model from their own data build the same model.

    Args:
      datasets: Names of hosts with their data; consumed one by one.

    Raises:
      DataError: Two hosts differ in the shape of inputs, side inputs, or targets, or the number of
        classes.
    """
    first: tuple[str, str, Signature] | None = None
    for host, one in datasets:
        has = one.signature()
        if first is None:
            first = host, one.source, has
        other, source, expected = first
        for what, here, there in (
            ("input", has.input, expected.input),
            *_pairs("side input", has.sides, expected.sides),
            *_pairs("target", has.targets, expected.targets),
        ):
            if here != there:
                raise DataError(
                    f"{host}: {what} of {one.source!r} is {here}, but that of {source!r} of "
                    f"{other} is {there}: use the same shape on every host"
                )
        if has.classes != expected.classes:
            raise DataError(
                f"{host}: {one.source!r} has {has.classes} classes, but {source!r} of {other} has "
                f"{expected.classes}: set data.classes, or give `classes` with the arrays of every "
                "host"
            )


def _pairs(
    what: str, here: Mapping[str, object], there: Mapping[str, object]
) -> list[tuple[str, object, object]]:
    names = sorted(here.keys() | there.keys())
    return [(f"{what} {name}", here.get(name), there.get(name)) for name in names]
