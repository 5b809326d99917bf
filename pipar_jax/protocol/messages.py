"""Every control message of a run, as a value: what is said, by whom, and what each field may hold.

Coordinator, devices, compute nodes and neighbours say nothing but these. A message is a dataclass;
its fields are annotated with what they may hold (``wire_fields``), and ``decode`` refuses all else
at the boundary by an error that names the peer, the message, the field, what was expected and what
was there. The host in the coordinator's own process answers with the same values. ``VERSION``
covers all of them: hosts of another one are refused when they join.
"""

from __future__ import annotations

from typing import Annotated, Any

from pipar_jax.cost_model.profile import HostProfile, RuntimeOverhead, UnitFacts
from pipar_jax.protocol.registry import Form, Sender, message
from pipar_jax.protocol.values import (
    ADDRESS,
    BOUNDARY,
    DIRECT,
    FACTS,
    HANDLING,
    HOST,
    HOST_PROFILE,
    MOST_BATCH,
    MOST_HOSTS,
    MOST_SPANS,
    MOST_UNITS,
    SECONDS,
    SEEN,
    TIMING,
    Address,
    Bytes,
    Count,
    DirectTiming,
    LinkRow,
    Memory,
    PerDevice,
    PerLayer,
    Place,
    Planned,
    Seconds,
    Seen,
    Shape,
    Timing,
    Waits,
    Words,
)
from pipar_jax.protocol.wire_fields import (
    Figure,
    Free,
    Many,
    Maybe,
    OneOf,
    Prose,
    Real,
    Table,
    Text,
    Truth,
    TupleOf,
    Whole,
    struct,
)
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import Boundary

#: Version of all these messages.
VERSION = 2

# --- joining ----------------------------------------------------------------------------------

_VARIABLES = Table(Table(Text(64), 10_000, Text(1024)), MOST_UNITS)


@message("join_device", Sender.HOST)
class JoinDevice:
    """A device wants to take part.

    Attributes:
      control_version: Of these messages.
      version: Of the package.
      name: Its name.
      config: Its configuration, as ``config.to_json`` writes it.
      samples: Samples of its epoch.
      steps: Steps of its epoch.
      input_shape: Shape of a sample.
      classes: Classes of its labels.
      units: For each unit its variables with dtype and shape.
    """

    control_version: Count
    version: Annotated[str, Text(64)]
    name: Annotated[str, Text(64)]
    config: Annotated[dict[str, Any], Free(8, 50_000, 4096)]
    samples: Annotated[int, Whole(0, 2**53)]
    steps: Annotated[int, Whole(0, 2**53)]
    input_shape: Shape
    classes: Count
    units: Annotated[dict[str, dict[str, str]], _VARIABLES]


@message("join_node", Sender.HOST)
class JoinNode:
    """A compute node wants to take part.

    Attributes:
      control_version: Of these messages.
      version: Of the package.
      name: Its name.
      config: Its configuration.
      address: Where its neighbours reach it.
    """

    control_version: Count
    version: Annotated[str, Text(64)]
    name: Annotated[str, Text(64)]
    config: Annotated[dict[str, Any], Free(8, 50_000, 4096)]
    address: Address


@message("refused", Sender.COORDINATOR)
class Refused:
    """The run goes on without the host that wanted to join, for a reason.

    Attributes:
      reason: Why.
      again: Whether it may be taken later.
    """

    reason: Words
    again: Annotated[bool, Truth()]


@message("model", Sender.COORDINATOR)
class ModelFacts:
    """What samples look like, for a node, which has none."""

    input_shape: Shape
    classes: Annotated[int, Whole(1)]


@message("meet", Sender.COORDINATOR)
class Meet:
    """Neighbours are to connect to each other; answered by ``Met``."""

    boundaries: Annotated[tuple[Boundary, ...], Many(BOUNDARY, MOST_HOSTS)]
    addresses: Annotated[dict[str, tuple[str, int]], Table(ADDRESS, MOST_HOSTS, HOST)]


@message("met", Sender.HOST)
class Met:
    """All links that ``Meet`` asked for are there."""


@message("neighbour", Sender.NEIGHBOUR)
class Neighbour:
    """The first message on a link between neighbours: what it is for."""

    boundary: Place


# --- asking what hosts can do -----------------------------------------------------------------


@message("survey_profile", Sender.COORDINATOR)
class SurveyProfile:
    """Asks for units' times at some micro-batch sizes; answered by ``Profiled``."""

    sizes: Annotated[tuple[int, ...], Many(Whole(1, MOST_BATCH), 1000, 1)]


@message("profiled", Sender.HOST)
class Profiled:
    """Units' times on a host, what they take anywhere, and how long it took to find out."""

    host: Annotated[HostProfile, HOST_PROFILE]
    units: Annotated[tuple[UnitFacts, ...], Many(FACTS, MOST_UNITS, 1)]
    seconds: Seconds


@message("survey_reference", Sender.COORDINATOR)
class SurveyReference:
    """Asks for the times of reference layers; answered by ``Referenced``."""


@message("referenced", Sender.HOST)
class Referenced:
    """Times of reference layers on a host, as ``ReferenceTimes``, and the memory it may use."""

    forward_s: PerLayer
    backward_s: PerLayer
    update_s: PerLayer
    parameter_bytes: PerLayer
    call_s: Seconds
    average_s_per_byte: Seconds
    handling: Annotated[RuntimeOverhead, HANDLING]
    seconds: Seconds
    prepared_s: Seconds
    memory_bytes: Annotated[float | None, Maybe(Real())]


@message("survey_echo", Sender.COORDINATOR)
class SurveyEcho:
    """Asks for an ``Echoed`` at once, to find a delay."""


@message("echoed", Sender.HOST)
class Echoed:
    """Answers ``SurveyEcho``."""


@message("survey_send", Sender.COORDINATOR)
class SurveySend:
    """Asks for two ``SurveyBytes``, a small one and one of so many bytes."""

    nbytes: Annotated[int, Whole(1, 1 << 30)]


@message("survey_bytes", Sender.BOTH, Form.BUNDLE)
class SurveyBytes:
    """Bytes that stand for nothing; a host answers every second one by ``Took``."""


@message("took", Sender.HOST)
class Took:
    """What the second of two ``SurveyBytes`` took after the first."""

    seconds: Seconds


# --- before the first round -------------------------------------------------------------------


@message("plan", Sender.COORDINATOR)
class Prepare:
    """The plan: a host builds and compiles its share; answered by ``Prepared``.

    Attributes:
      plan: The plan.
      samples: Samples of each device's epoch.
      steps: Steps of each device in the whole run.
    """

    plan: Planned
    samples: PerDevice
    steps: PerDevice


@message("working", Sender.BOTH)
class Working:
    """The sender is busy with what may take long: nobody counts its silence.

    Attributes:
      what: With what.
      done: How many parts of it are over: programs, or units.
      of: How many there are; 0 if nobody knows.
    """

    what: Annotated[str, OneOf(("compiling", "timing", "tuning", "evaluating"))]
    done: Count
    of: Count


@message("prepared", Sender.HOST)
class Prepared:
    """A host has compiled its share of the plan."""

    compile_s: Seconds
    memory_bytes: Bytes


@message("calibrate", Sender.COORDINATOR)
class Calibrate:
    """An emulated slow host times its functions, all else idle; answered by ``Calibrated``."""


@message("calibrated", Sender.HOST)
class Calibrated:
    """A host has timed its functions."""

    seconds: Seconds


# --- a round ----------------------------------------------------------------------------------


@message("release", Sender.COORDINATOR)
class Release:
    """A round begins, or goes on after a ``Rewind``; answered by ``Trained``.

    Spans, and whatever is said of steps and tensors, speak of places of the round's cohort.

    Attributes:
      round: Which.
      attempt: Which attempt at a round, over the whole run; rises with each release, and tensors
        carry it.
      spans: Its spans.
      cohort: The device in each place.
      holder: In sequential order, the place that holds the client-side model already.
      demand: Seconds per step that each place's device computed so far.
    """

    round: Count
    attempt: Count
    spans: Annotated[
        tuple[Span, ...], Many(TupleOf(Span, (Whole(), Whole(), Whole())), MOST_SPANS, 1)
    ]
    cohort: Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS, 1)]
    holder: Annotated[int | None, Maybe(Whole())]
    demand: Annotated[tuple[float, ...], Many(SECONDS, MOST_HOSTS, 1)]


@message("drop", Sender.COORDINATOR)
class Drop:
    """A place is out of the round from a step on; answered by its own device, by ``Dropped``.

    Everyone else goes on without it. What of its steps from that one on is here is forgotten, and
    what still arrives of them is discarded.

    Attributes:
      round: Which round.
      place: Which place of its cohort.
      step: With a copy of the weights for each device, and so for the whole of the round, the
        round's first; in sequential order the first of the turn that is undone.
    """

    round: Count
    place: Count
    step: Count


@message("dropped", Sender.HOST)
class Dropped:
    """A device has stopped for this round, and says nothing more of it."""

    round: Count


@message("halt", Sender.COORDINATOR)
class Halt:
    """Where gradients are summed: stop, a device has failed in mid-step; answered by ``Halted``.

    Attributes:
      round: Which round.
      without: The places that are lost.
    """

    round: Count
    without: Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS, 1)]


@message("halted", Sender.HOST)
class Halted:
    """Nothing of the round is computed on the host any more.

    Attributes:
      round: Which round.
      step: The first step of which some update is missing here.
    """

    round: Count
    step: Count


@message("rewind", Sender.COORDINATOR)
class Rewind:
    """After ``Halt``: forget everything from a step on; answered by ``Rewound``.

    Weights, statistics and optimiser states are those after the step before. A ``Release`` of the
    same round follows, from that step on and without those who are lost.
    """

    round: Count
    step: Count


@message("rewound", Sender.HOST)
class Rewound:
    """A host is back at the step that it was told."""

    round: Count
    step: Count


@message("commit", Sender.COORDINATOR)
class Commit:
    """What these places have trained in a round counts, and nothing else; ``Stored`` follows.

    Until then nobody averages, so that all hosts average the same.

    Attributes:
      round: Which round.
      places: The places; with none of them the round was in vain and weights stay as they were.
    """

    round: Count
    places: Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS)]


@message("progress", Sender.HOST)
class Progress:
    """A device's step is over at its last stage; told now and then."""

    device: Count
    step: Count
    loss: Annotated[float, Figure()]
    accuracy: Annotated[float, Figure()]
    round: Count


@message("nonfinite", Sender.HOST)
class NonFinite:
    """Something is not finite on a host; told once for each device, step and kind.

    Attributes:
      what: The ``loss`` of a step; the ``weights`` after a round's steps, with their statistics
        and optimiser state; or the ``average`` of a round.
      device: Whose it is; None for what serves all devices.
      round: Number of the round, from 0.
      step: The device's step, from 0 over the whole run; of weights the last of the round.
      units: The units whose weights it is about.
    """

    what: Annotated[str, OneOf(("loss", "weights", "average"))]
    device: Annotated[int | None, Maybe(Whole())]
    round: Count
    step: Count
    units: Annotated[tuple[str, ...], Many(Text(64), MOST_UNITS)] = ()


@message("pulse", Sender.BOTH)
class Pulse:
    """The sender goes on: so many actions are over there, or so many waits."""

    actions: Annotated[int, Whole(0, 2**53)]


@message("trained", Sender.HOST, Form.EITHER)
class Trained:
    """A host's steps of a round are over; with the weights that are to be averaged, if any.

    ``Commit`` is awaited.
    """

    round: Count


@message("store", Sender.COORDINATOR, Form.BUNDLE)
class Store:
    """The averaged weights; answered by ``Stored``."""


@message("stored", Sender.HOST)
class Stored:
    """A round is over on a host.

    Attributes:
      round: Which.
      overruns: Computations that lasted longer than the slowness emulated.
      longest_s: The longest action of the round.
      memory: What the host held at most.
      loss: Sum of the losses of samples whose last stage ran here.
      correct: Of them, those whose largest logit is the label's.
      samples: How many they were.
      busy_s: Seconds that it computed.
      link: What its sending to the coordinator waited for.
      direct: What it sent its neighbours.
    """

    round: Count
    overruns: Count
    longest_s: Seconds
    memory: Annotated[Memory, struct(Memory)]
    loss: Annotated[float, Figure()]
    correct: Annotated[float, Figure()]
    samples: Annotated[int, Whole(0, 2**53)]
    busy_s: Seconds = 0.0
    link: Annotated[Waits, struct(Waits)] = Waits()
    direct: Annotated[tuple[LinkRow, ...], Many(struct(LinkRow), MOST_HOSTS)] = ()


@message("part", Sender.HOST, Form.BUNDLE)
class ClientModel:
    """The device part after a device's turn (sequential order)."""

    device: Count
    step: Count


@message("take_part", Sender.COORDINATOR, Form.BUNDLE)
class TakeClientModel:
    """The device part for the device whose turn it is, from a step on."""

    step: Count


@message("trace", Sender.HOST, Form.BUNDLE)
class TraceRows:
    """A host's timed actions of a round."""


@message("fetch", Sender.COORDINATOR)
class Fetch:
    """Asks a node for the weights that live on it; answered by ``Fetched``."""


@message("fetched", Sender.HOST, Form.BUNDLE)
class Fetched:
    """Weights that live on a node."""


# --- changes of plan --------------------------------------------------------------------------


@message("look", Sender.COORDINATOR)
class Look:
    """Asks what computations lasted and links brought; answered by ``LookSeen``."""

    look: Count


@message("seen", Sender.HOST)
class LookSeen:
    """What computations lasted since the last look, and what links brought so far."""

    look: Count
    rows: Annotated[tuple[Seen, ...], Many(SEEN, 100_000)]
    timed: Annotated[Timing, TIMING]
    direct: Annotated[tuple[DirectTiming, ...], Many(DIRECT, MOST_HOSTS)]


@message("ahead", Sender.COORDINATOR)
class CompileAhead:
    """A plan that may follow is to be compiled beside training; answered by ``Compiled``."""

    number: Count
    plan: Planned


@message("compiled", Sender.HOST)
class Compiled:
    """A host has compiled a plan that may follow, or says why it refuses it."""

    number: Count
    refused: Annotated[str | None, Maybe(Prose())]


@message("give", Sender.COORDINATOR)
class Give:
    """Asks for what leaves a host under a new plan; answered by ``Given``."""

    plan: Planned


@message("given", Sender.HOST, Form.EITHER)
class Given:
    """What leaves a host under a new plan."""


@message("adopt", Sender.COORDINATOR, Form.BUNDLE)
class Adopt:
    """The new plan holds, and what comes to the host under it; answered by ``Adopted``."""

    plan: Planned


@message("adopted", Sender.HOST)
class Adopted:
    """A host works by the new plan."""


# --- the end ----------------------------------------------------------------------------------


@message("finish", Sender.COORDINATOR)
class Finish:
    """The run is over; answered by ``Bye``."""


@message("bye", Sender.HOST, Form.BUNDLE)
class Bye:
    """The last a host says, with the rest of its timed actions."""


@message("abort", Sender.COORDINATOR)
class Abort:
    """The run has ended for a reason.

    Attributes:
      reason: Why.
      again: Whether the coordinator is expected to go on with it later.
    """

    reason: Words
    again: Annotated[bool, Truth()]


@message("failed", Sender.HOST)
class Failed:
    """A host ends for a reason."""

    error: Words


@message("leave", Sender.HOST)
class Leave:
    """A host was asked to end, and does not come back by itself."""

    reason: Words
