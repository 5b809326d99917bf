"""Messages of a round, from its release to what is stored."""

from __future__ import annotations

from typing import Annotated

from pipar_jax.protocol.registry import ControlMessage, Form, Sender, message
from pipar_jax.protocol.values import (
    METRIC,
    MOST_HOSTS,
    MOST_SPANS,
    MOST_UNITS,
    SECONDS,
    SPENT,
    SUMS,
    Count,
    LinkRow,
    Memory,
    PerDevice,
    Seconds,
    Waits,
)
from pipar_jax.protocol.wire_fields import (
    Figure,
    Many,
    Maybe,
    OneOf,
    Real,
    Table,
    Text,
    TupleOf,
    Whole,
    struct,
)
from pipar_jax.schedule.actions import Span
from stages.tasks.task import MOST_METRICS


@message("release", Sender.COORDINATOR)
class Release(ControlMessage):
    """Starts a round, or continues it after a ``Rewind``; answered by ``Trained``.

    Spans, steps and tensors refer to places of the round's cohort.

    Attributes:
      round: Index of the round.
      attempt: Attempt at a round, counted over the whole run; increases with
        each release, and tensors carry it.
      spans: Spans of the round.
      cohort: The device in each place.
      samples: Samples of an epoch of each place's device.
      holder: In sequential order, the place that holds the client-side model already.
      demand: Seconds per step that each place's device computed so far.
      clip: In a private run whose clip adapts, the norm to which updates are clipped; else 0.
    """

    round: Count
    attempt: Count
    spans: Annotated[
        tuple[Span, ...], Many(TupleOf(Span, (Whole(), Whole(), Whole())), MOST_SPANS, 1)
    ]
    cohort: Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS, 1)]
    samples: PerDevice
    holder: Annotated[int | None, Maybe(Whole())]
    demand: Annotated[tuple[float, ...], Many(SECONDS, MOST_HOSTS, 1)]
    clip: Annotated[float, Real()] = 0.0


@message("drop", Sender.COORDINATOR, Form.EITHER)
class Drop(ControlMessage):
    """A place is out of the round from a step on; answered by its own device, by ``Dropped``.

    Everyone else goes on without it. What of its steps from that one on is here is forgotten, and
    what still arrives of them is discarded. In sequential order it comes to its own device as a
    bundle, behind the client-side model that may be on its way there.

    Attributes:
      round: Which round.
      place: Which place of its cohort.
      step: With a copy of the weights for each device, and so for the whole of the round, the
        round's first; in sequential order the first of the turn that is undone.
    """

    round: Count
    place: Count
    step: Count


@message("dropped", Sender.HOST, Form.EITHER)
class Dropped(ControlMessage):
    """A device has stopped for this round and sends nothing more about it.

    It comes as a bundle, behind the weights that may be on their way: a control message would
    overtake them.
    """

    round: Count


@message("halt", Sender.COORDINATOR)
class Halt(ControlMessage):
    """Where gradients are summed: stop, a host has failed in mid-step; answered by ``Halted``.

    Attributes:
      round: Which round.
      without: The places that are lost; none if it was a compute node.
    """

    round: Count
    without: Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS)]


@message("halted", Sender.HOST)
class Halted(ControlMessage):
    """Nothing of the round is computed on the host any more.

    Attributes:
      round: Which round.
      step: The first step of which some update is missing here.
      least: The earliest step to which the host can go back.
    """

    round: Count
    step: Count
    least: Count


@message("rewind", Sender.COORDINATOR)
class Rewind(ControlMessage):
    """After ``Halt``: forget everything from a step on; answered by ``Rewound``.

    Weights, statistics and optimiser states are those after the step before. A ``Release`` of the
    same round follows, from that step on and without those who are lost; its spans are empty if
    all steps were over.
    """

    round: Count
    step: Count


@message("rewound", Sender.HOST, Form.EITHER)
class Rewound(ControlMessage):
    """A host is back at the step that it was told; a bundle for the reason of ``Dropped``."""

    round: Count
    step: Count


@message("commit", Sender.COORDINATOR)
class Commit(ControlMessage):
    """What these places have trained in a round counts, and nothing else; ``Stored`` follows.

    No host averages before it, so that all average the same.

    Attributes:
      round: Which round.
      places: The places; with none of them the round was in vain and weights stay as they were.
    """

    round: Count
    places: Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS)]


@message("progress", Sender.HOST)
class Progress(ControlMessage):
    """A device's step has finished at its last stage; sent occasionally."""

    device: Count
    step: Count
    loss: Annotated[float, Figure()]
    metrics: Annotated[dict[str, float], Table(Figure(), MOST_METRICS, METRIC)]
    round: Count


@message("nonfinite", Sender.HOST)
class NonFinite(ControlMessage):
    """Numbers on a host are not finite; sent once for each device, step and kind.

    Attributes:
      what: The ``loss`` of a step; the ``weights`` after a round's steps, with their statistics
        and optimiser state; or the ``average`` of a round.
      device: The device; None for what serves all devices.
      round: Index of the round.
      step: The device's step, from 0 over the whole run; of weights the last of the round.
      units: The affected units.
    """

    what: Annotated[str, OneOf(("loss", "weights", "average"))]
    device: Annotated[int | None, Maybe(Whole())]
    round: Count
    step: Count
    units: Annotated[tuple[str, ...], Many(Text(64), MOST_UNITS)] = ()


@message("pulse", Sender.BOTH)
class Pulse(ControlMessage):
    """The sender makes progress: its number of finished actions, or of waits."""

    actions: Annotated[int, Whole(0, 2**53)]


@message("trained", Sender.HOST, Form.EITHER)
class Trained(ControlMessage):
    """A host has finished its steps of a round; with the weights for the average, if any.

    ``Commit`` is awaited.
    """

    round: Count


@message("stored", Sender.HOST)
class Stored(ControlMessage):
    """A round has finished on a host.

    Attributes:
      round: Index of the round.
      overruns: Computations that exceeded their emulated duration.
      longest_s: Duration of the longest action.
      memory: Peak memory of the host.
      loss: Sum of the losses of samples whose last stage ran here.
      samples: Number of these samples.
      metrics: For each metric the sums over them of its numerators and of its denominators.
      busy_s: Seconds of computation.
      link: Statistics of sending to the coordinator.
      direct: Statistics of sending to its neighbours.
      spent: What the releases of a private device's ledger come to, as mu**2.
      epsilon: Their epsilon.
      within: In a private run whose clip adapts, whether a user's update was within the clip: one
        half, or minus one half; with noise where devices add it.
    """

    round: Count
    overruns: Count
    longest_s: Seconds
    memory: Annotated[Memory, struct(Memory)]
    loss: Annotated[float, Figure()]
    samples: Annotated[int, Whole(0, 2**53)]
    metrics: Annotated[dict[str, tuple[float, float]], Table(SUMS, MOST_METRICS, METRIC)]
    busy_s: Seconds = 0.0
    link: Annotated[Waits, struct(Waits)] = Waits()
    direct: Annotated[tuple[LinkRow, ...], Many(struct(LinkRow), MOST_HOSTS)] = ()
    spent: Annotated[float, SPENT] = 0.0
    epsilon: Annotated[float, SPENT] = 0.0
    within: Annotated[float, Real(-1e9, 1e9)] = 0.0


@message("part", Sender.HOST, Form.BUNDLE)
class ClientModel(ControlMessage):
    """The client-side model after a device's turn (sequential order)."""

    device: Count
    step: Count


@message("trace", Sender.HOST, Form.BUNDLE)
class TraceRows(ControlMessage):
    """A host's timed actions of a round."""
