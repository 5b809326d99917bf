"""Messages of evaluations on devices, on test data of their own."""

from __future__ import annotations

from typing import Annotated

from pipar_jax.protocol.registry import ControlMessage, Form, Sender, message
from pipar_jax.protocol.values import METRIC, SUMS, Count
from pipar_jax.protocol.wire_fields import Figure, Table, Whole
from stages.tasks.task import MOST_METRICS


@message("evaluate", Sender.COORDINATOR, Form.BUNDLE)
class Evaluate(ControlMessage):
    """The weights of the whole network after a round, to be scored on the device's test data.

    Answered by ``Evaluated``; what the device trains stays as it is.
    """

    round: Count


@message("evaluated", Sender.HOST)
class Evaluated(ControlMessage):
    """Sums over a device's test data.

    Attributes:
      round: Which round's weights.
      loss: Sum of the samples' losses.
      samples: Number of samples.
      metrics: For each metric the sums over them of its numerators and of its denominators.
    """

    round: Count
    loss: Annotated[float, Figure()]
    samples: Annotated[int, Whole(1, 2**53)]
    metrics: Annotated[dict[str, tuple[float, float]], Table(SUMS, MOST_METRICS, METRIC)]
