"""Actions: what schedules, partial orders held as data, consist of.

An action is the unit of everything that is executed, simulated, traced or drawn. Its text, such as
``d1.2F0@17`` (device 1, stage 2, forward of micro-batch 0 in step 17), can be parsed. A step's
actions are generated in ``steps.py``, those of a round in ``rounds.py``; the policy chooses which
of a host's ready actions runs next (``dispatch.py``).
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from pipar_jax.errors import PlanError
from pipar_jax.schedule.plan import COORDINATOR, Plan


class ActionKind(enum.StrEnum):
    """What an action does; the value is its text in a schedule.

    Sends and receives are named after the computation whose result they transfer.
    """

    FORWARD = "F"
    BACKWARD = "B"
    #: Fused last stage: forward, loss and backward in one computation.
    LOSS = "L"
    UPDATE = "U"
    AGGREGATE = "A"
    SEND_CLIENT_MODEL = "H"
    EVALUATE = "E"
    SEND_FORWARD = "SF"
    RECEIVE_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECEIVE_BACKWARD = "RB"
    #: The client-side model with its optimiser state arrives (sequential order).
    RECEIVE_CLIENT_MODEL = "RH"
    #: Weights leave a host for aggregation, and return to it.
    SEND_WEIGHTS = "SA"
    RECEIVE_WEIGHTS = "RA"


# Names of the module: an attribute of a class costs more to look up, and every action needs some.
FORWARD, BACKWARD, LOSS = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.LOSS
UPDATE, AGGREGATE, EVALUATE = ActionKind.UPDATE, ActionKind.AGGREGATE, ActionKind.EVALUATE
SEND_FORWARD, RECEIVE_FORWARD = ActionKind.SEND_FORWARD, ActionKind.RECEIVE_FORWARD
SEND_BACKWARD, RECEIVE_BACKWARD = ActionKind.SEND_BACKWARD, ActionKind.RECEIVE_BACKWARD
SEND_CLIENT_MODEL = ActionKind.SEND_CLIENT_MODEL
RECEIVE_CLIENT_MODEL = ActionKind.RECEIVE_CLIENT_MODEL
SEND_WEIGHTS, RECEIVE_WEIGHTS = ActionKind.SEND_WEIGHTS, ActionKind.RECEIVE_WEIGHTS

#: Kinds that occupy a host's processor.
COMPUTE = frozenset((FORWARD, BACKWARD, LOSS, UPDATE, AGGREGATE))
#: Kinds that a host awaits instead of performing.
RECEIVES = frozenset((RECEIVE_FORWARD, RECEIVE_BACKWARD, RECEIVE_CLIENT_MODEL, RECEIVE_WEIGHTS))
#: Kinds that belong to one micro-batch.
MICRO = frozenset((FORWARD, BACKWARD, LOSS, SEND_FORWARD, RECEIVE_FORWARD, SEND_BACKWARD,
                   RECEIVE_BACKWARD))  # fmt: skip
KINDS = frozenset(ActionKind)
#: Names of the kinds in traces and reports.
KIND_NAMES: Mapping[ActionKind, str] = {
    FORWARD: "forward", BACKWARD: "backward", LOSS: "forward, loss, backward", UPDATE: "update",
    AGGREGATE: "average", EVALUATE: "evaluate",
    SEND_FORWARD: "send activation", RECEIVE_FORWARD: "receive activation",
    SEND_BACKWARD: "send cotangent", RECEIVE_BACKWARD: "receive cotangent",
    SEND_CLIENT_MODEL: "send client model", RECEIVE_CLIENT_MODEL: "receive client model",
    SEND_WEIGHTS: "send weights", RECEIVE_WEIGHTS: "receive weights",
}  # fmt: skip

#: Device number of an action that serves all devices at once.
ALL = -1

#: Number of the attempt at a round while there is none; attempts are counted over a run.
NO_ATTEMPT = -1

_TEXT = re.compile(r"d(\d+|\*)\.(\d+)([A-Z]{1,2})(\d*)@(\d+)")


class Action(NamedTuple):
    """One action of a schedule.

    Attributes:
      stage: Index of the stage in the device's chain.
      kind: One of ``KINDS``.
      device: Device whose data it processes; ``ALL`` for all devices.
      step: Step of the device, counted over the whole run.
      micro_batch: Index in the mini-batch; 0 for kinds without one.
    """

    stage: int
    kind: ActionKind
    device: int
    step: int
    micro_batch: int = 0

    def __str__(self) -> str:
        """Returns the text that ``parse`` reads."""
        device = "*" if self.device == ALL else self.device
        micro_batch = self.micro_batch if self.kind in MICRO else ""
        return f"d{device}.{self.stage}{self.kind}{micro_batch}@{self.step}"


def parse(text: str) -> Action:
    """Parses the text of an action, such as ``d1.2F0@17``.

    Raises:
      PlanError: The text is not that of an action.
    """
    match = _TEXT.fullmatch(text)
    if match is None or match[3] not in KINDS or (match[3] in MICRO) != bool(match[4]):
        raise PlanError(
            f"{text!r} is not an action: expected d<device>.<stage><kind><micro-batch>@<step> "
            f"such as d1.2F0@17, with a kind of {', '.join(sorted(KINDS))}"
        )
    device = ALL if match[1] == "*" else int(match[1])
    return Action(int(match[2]), ActionKind(match[3]), device, int(match[5]), int(match[4] or 0))


class Span(NamedTuple):
    """Consecutive steps ``[first, stop)`` of one device within a round."""

    device: int
    first: int
    stop: int


@functools.lru_cache(maxsize=4096)
def micro_batch_sizes(samples: int, micro_batches: int) -> tuple[int, ...]:
    """Returns the sizes of the micro-batches of a mini-batch, which differ by at most one.

    Args:
      samples: Samples in the mini-batch.
      micro_batches: Maximum number of micro-batches; each has at least one sample.
    """
    parts = max(1, min(micro_batches, samples))
    size, larger = divmod(samples, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)


def batch_samples(samples: int, batch_size: int, step: int) -> int:
    """Returns the number of samples in a device's mini-batch; the last of an epoch may be smaller.

    Args:
      samples: Samples in the device's shard.
      batch_size: Samples in a full mini-batch.
      step: The device's step, counted over the whole run.
    """
    full, rest = divmod(samples, batch_size)
    in_epoch = step % (full + (rest > 0))
    return batch_size if in_epoch < full else rest


def host_of(plan: Plan, action: Action) -> str:
    """Returns the host that performs (or, for a receive, awaits) an action."""
    if action.kind == EVALUATE or (action.kind == AGGREGATE and action.stage == 0):
        return COORDINATOR
    return plan.host(0 if action.device == ALL else action.device, action.stage)
