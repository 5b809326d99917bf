"""Timed actions as two arrays, as in bundles over a link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

Tensors = dict[str, Array]

#: Kinds of actions by their number in a trace, and those that carry a tensor between stages.
ROW_KINDS = sorted(KINDS)
TENSOR_KINDS = frozenset((SEND_FORWARD, RECEIVE_FORWARD, SEND_BACKWARD, RECEIVE_BACKWARD))


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
      RunError: The arrays are not valid.
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
