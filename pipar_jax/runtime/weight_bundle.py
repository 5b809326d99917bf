"""Weights, device parts and traces as named tensors, the way bundles carry them over a link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from comms.arrays import Array
from pipar_jax.errors import RunError
from pipar_jax.schedule.actions import (
    KINDS,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
)
from pipar_jax.schedule.trace import Timed
from stages.trees import PyTree

Tensors = dict[str, Array]

#: Kinds of actions by their number in a trace, and those that carry a tensor between stages.
ROW_KINDS = sorted(KINDS)
TENSOR_KINDS = frozenset((SEND_FORWARD, RECEIVE_FORWARD, SEND_BACKWARD, RECEIVE_BACKWARD))


def pack(groups: Mapping[str, Mapping[str, Mapping[str, PyTree]]]) -> Tensors:
    """Flattens arrays to names ``group/part/unit/path``.

    Args:
      groups: For each group (a device, say) its parts (``params``, ``state``, ``opt``), for each
        part its units, for each unit a dictionary of arrays by path, or any pytree, whose leaves
        are numbered.
    """
    tensors: Tensors = {}
    for group, parts in groups.items():
        for part, units in parts.items():
            for unit, values in units.items():
                if not isinstance(values, Mapping):
                    leaves = jax.tree.leaves(values)
                    values = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
                for path, array in values.items():
                    tensors[f"{group}/{part}/{unit}/{path}"] = np.asarray(array)
    return tensors


def unpack(tensors: Mapping[str, Array], peer: str) -> dict[str, PyTree]:
    """Returns groups, parts and units again; numbered leaves become a dictionary in their order.

    Args:
      tensors: What arrived.
      peer: Who sent it, for the message.

    Raises:
      RunError: A name is not of the form that ``pack`` writes.
    """
    groups: dict[str, PyTree] = {}
    for name, array in tensors.items():
        words = name.split("/", 3)
        if len(words) != 4:
            raise RunError(
                f"{peer} sent a bundle with a tensor named {name[:80]!r}, which is no weight"
            )
        group, part, unit, path = words
        groups.setdefault(group, {}).setdefault(part, {}).setdefault(unit, {})[path] = array
    return groups


def part_of(groups: Mapping[str, PyTree], name: str) -> dict[str, PyTree]:
    """Returns ``params``, ``state`` and ``opt`` of a part, each by unit.

    A part that has nothing of a kind sends no array of it, nor does a unit: a unit that came with
    weights or batch statistics has both here, be they empty.

    Args:
      groups: What ``unpack`` returned.
      name: The part's.
    """
    found = groups.get(name, {})
    params, state, opt = (dict(found.get(kind, {})) for kind in ("params", "state", "opt"))
    for unit in [*params, *state]:
        params.setdefault(unit, {})
        state.setdefault(unit, {})
    return {"params": params, "state": state, "opt": opt}


def pack_rows(rows: Sequence[Timed]) -> Tensors:
    """Returns timed actions as two arrays: whole numbers [rows, 7] and seconds [rows, 2]."""
    numbers = np.array(
        [
            (
                row.action.stage,
                ROW_KINDS.index(row.action.kind),
                row.action.device,
                row.action.step,
                row.action.micro_batch,
                row.nbytes,
                row.samples,
            )
            for row in rows
        ],
        np.int64,
    ).reshape(-1, 7)
    times = np.array([(row.start_s, row.end_s) for row in rows], np.float64).reshape(-1, 2)
    return {"numbers": numbers, "times": times}


def unpack_rows(tensors: Mapping[str, Array], peer: str) -> list[Timed]:
    """Returns the timed actions that ``pack_rows`` wrote.

    Raises:
      RunError: The arrays are not such.
    """
    try:
        numbers, times = tensors["numbers"], tensors["times"]
        return [
            Timed(Action(stage, ROW_KINDS[kind], device, step, micro), start, end, nbytes, samples)
            for (stage, kind, device, step, micro, nbytes, samples), (start, end) in zip(
                numbers.tolist(), times.tolist(), strict=True
            )
        ]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise RunError(f"{peer} sent a trace that cannot be read: {error}") from error
