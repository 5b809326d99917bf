"""PiPar's cost model: its recurrence, its formula for N and its choice of the cut.

Zhang, Rodgers, Kilpatrick, Spence and Varghese, arXiv 2302.12803. One device and the server work
on N micro-batches; every function here is plain arithmetic on seconds. What the model leaves out
(delay, cost per message, cost of small micro-batches, a server shared by several devices) is the
simulator's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipar_jax.errors import PlanError


class StepTimes(NamedTuple):
    """Seconds of the parts of a whole mini-batch.

    Attributes:
      device_forward_s: ``cf``, forward of the client-side model.
      device_backward_s: ``cb``, backward of the client-side model.
      server_forward_s: ``sf``, forward of the server-side model.
      server_backward_s: ``sb``, backward of the server-side model.
      up_s: ``u``, all activations on the uplink.
      down_s: ``d``, all cotangents on the downlink.
    """

    device_forward_s: float
    device_backward_s: float
    server_forward_s: float
    server_backward_s: float
    up_s: float
    down_s: float


class MicroTimes(NamedTuple):
    """Seconds of each micro-batch's parts, in index order, and of the two updates.

    Attributes:
      device_forward_s: Forward of the client-side model, one value per micro-batch.
      up_s: The activation on the uplink.
      server_s: Forward, loss and backward of the server-side model, which our server fuses.
      down_s: The cotangent on the downlink.
      device_backward_s: Backward of the client-side model.
      device_update_s: The device's optimiser step after the last backward.
      server_update_s: The server's optimiser step after the last cotangent was sent.
    """

    device_forward_s: Sequence[float]
    up_s: Sequence[float]
    server_s: Sequence[float]
    down_s: Sequence[float]
    device_backward_s: Sequence[float]
    device_update_s: float = 0.0
    server_update_s: float = 0.0


class PaperChoice(NamedTuple):
    """The paper's selection.

    Attributes:
      cut: The cut, P.
      micro_batches: How many micro-batches, N.
      step_s: The predicted seconds of one step.
    """

    cut: int
    micro_batches: int
    step_s: float


def paper_micro_batches(times: StepTimes, batch_size: int) -> int:
    """Returns the paper's number of micro-batches, clamped to the mini-batch.

    ``N = ceil((u + sf + sb + d) / min(cf, cb)) + 1``: as many forwards as fit into the round trip
    of the first micro-batch. The formula can exceed the batch and is clamped.

    Args:
      times: Times of the whole mini-batch; only their ratios matter.
      batch_size: Samples in the mini-batch.

    Raises:
      PlanError: The mini-batch is empty.
    """
    if batch_size < 1:
        raise PlanError(f"a mini-batch needs at least one sample, got batch_size={batch_size}")
    away_s = times.up_s + times.server_forward_s + times.server_backward_s + times.down_s
    least_s = min(times.device_forward_s, times.device_backward_s)
    if away_s >= (batch_size - 1) * least_s:  # also if the client-side model has zero cost
        return batch_size
    return min(batch_size, math.ceil(away_s / least_s) + 1)


def paper_step_s(times: StepTimes, micro_batches: int) -> float:
    """Returns the seconds of one step by the paper's recurrence.

    With every part divided evenly among N micro-batches::

      CF_i = CF_{i-1} + cf/N                U_i  = max(CF_i, U_{i-1}) + u/N
      SF_i = max(U_i, SB_{i-1}) + sf/N      SB_i = SF_i + sb/N
      D_i  = max(SB_i, D_{i-1}) + d/N       CB_i = max(D_i, CB_{i-1}, CF_N) + cb/N

    and the step takes ``CB_N``.

    Args:
      times: Times of the whole mini-batch.
      micro_batches: N.

    Raises:
      PlanError: There is no micro-batch.
    """
    if micro_batches < 1:
        raise PlanError(f"a step needs at least one micro-batch, got {micro_batches}")
    part = StepTimes(*(value / micro_batches for value in times))
    server_s = part.server_forward_s + part.server_backward_s
    return measured_step_s(
        MicroTimes(
            device_forward_s=(part.device_forward_s,) * micro_batches,
            up_s=(part.up_s,) * micro_batches,
            server_s=(server_s,) * micro_batches,
            down_s=(part.down_s,) * micro_batches,
            device_backward_s=(part.device_backward_s,) * micro_batches,
        )
    )


def measured_step_s(times: MicroTimes) -> float:
    """Returns the seconds of one step by the same recurrence with each micro-batch's own times.

    The server's forward and backward are one term, since it fuses them, and the step ends when
    both updates are over: ``max(CB_N + device update, SB_N + server update)``.

    Args:
      times: Times of each micro-batch, measured at its size.

    Raises:
      PlanError: The parts name different numbers of micro-batches, or none.
    """
    counts = {len(part) for part in times[:5]}
    if len(counts) != 1 or 0 in counts:
        raise PlanError(
            "every part of a step needs one time per micro-batch, at least one; got "
            + ", ".join(f"{name} {len(part)}" for name, part in zip(times._fields, times[:5],
                                                                    strict=False))
        )  # fmt: skip
    all_forwards_s = sum(times.device_forward_s)
    forward_s = up_s = server_s = down_s = backward_s = 0.0
    for cf, u, s, d, cb in zip(*times[:5], strict=True):
        forward_s += cf
        up_s = max(forward_s, up_s) + u
        server_s = max(up_s, server_s) + s
        down_s = max(server_s, down_s) + d
        backward_s = max(down_s, backward_s, all_forwards_s) + cb
    return max(backward_s + times.device_update_s, server_s + times.server_update_s)


def paper_choice(candidates: Mapping[int, StepTimes], batch_size: int) -> PaperChoice:
    """Returns the paper's selection: one N for each cut, then the cut with the fastest step.

    Among equal cuts the smallest is chosen, which leaves the least work to the device.

    Args:
      candidates: Times of the whole mini-batch for each possible cut.
      batch_size: Samples in the mini-batch.

    Raises:
      PlanError: There is no candidate.
    """
    if not candidates:
        raise PlanError("no cut to choose from: a model of one unit cannot be split")
    choices = []
    for cut, times in sorted(candidates.items()):
        micro_batches = paper_micro_batches(times, batch_size)
        choices.append(PaperChoice(cut, micro_batches, paper_step_s(times, micro_batches)))
    return min(choices, key=lambda choice: choice.step_s)
