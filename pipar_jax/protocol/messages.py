"""All control messages of a run, as values: sender, fields, and the valid values of each field.

Coordinator, devices, compute nodes and neighbours send no other control messages. A message is a
dataclass whose fields are annotated with their specifications (``wire_fields``); ``decode`` rejects
everything else with an error that names the peer, the message, the field, and the expected and the
actual value. The host in the coordinator's own process answers with the same values. ``VERSION``
covers all messages: hosts of another version are refused when they join.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pipar_jax.cost_model.profile import HostProfile, RuntimeOverhead, UnitFacts
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.protocol.registry import ControlMessage, Form, Sender, message
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
    MOST_STATES,
    MOST_UNITS,
    PLAN,
    SECONDS,
    SEEN,
    STATE_ROW,
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
    RunName,
    Seconds,
    Seen,
    Shape,
    StateRow,
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
from pipar_jax.schedule.plan import Boundary, Plan

#: Version of all these messages.
VERSION = 3

# --- joining ----------------------------------------------------------------------------------

_VARIABLES = Table(Table(Text(64), 10_000, Text(1024)), MOST_UNITS)


@dataclasses.dataclass(frozen=True, slots=True)
class Join(ControlMessage):
    """What every host says that asks to join.

    Attributes:
      control_version: Version of these messages.
      version: Version of the package.
      name: Name of the host.
      config: Its configuration, as written by ``config.to_json``.
    """

    control_version: Count
    version: Annotated[str, Text(64)]
    name: Annotated[str, Text(64)]
    config: Annotated[JsonObject, Free(8, 50_000, 4096)]


@message("join_device", Sender.HOST)
class JoinDevice(Join):
    """A device asks to join.

    Attributes:
      samples: Number of samples per epoch.
      steps: Number of steps per epoch.
      input_shape: Shape of a sample.
      classes: Number of classes.
      units: Dtype and shape of the variables of each unit.
      fingerprint: What tells its samples from others.
    """

    samples: Annotated[int, Whole(0, 2**53)]
    steps: Annotated[int, Whole(0, 2**53)]
    input_shape: Shape
    classes: Count
    units: Annotated[dict[str, dict[str, str]], _VARIABLES]
    fingerprint: Annotated[str, Text(64)]


@message("join_node", Sender.HOST)
class JoinNode(Join):
    """A compute node asks to join.

    Attributes:
      address: Address at which its neighbours reach it.
    """

    address: Address


@message("refused", Sender.COORDINATOR)
class Refused(ControlMessage):
    """A join is refused.

    Attributes:
      reason: The reason.
      again: Whether the host may be accepted later.
    """

    reason: Words
    again: Annotated[bool, Truth()]


@message("model", Sender.COORDINATOR)
class ModelFacts(ControlMessage):
    """Shape and classes of samples, for a node, which has none."""

    input_shape: Shape
    classes: Annotated[int, Whole(1)]


@message("meet", Sender.COORDINATOR)
class Meet(ControlMessage):
    """Asks neighbours to connect to each other; answered by ``Met``."""

    boundaries: Annotated[tuple[Boundary, ...], Many(BOUNDARY, MOST_HOSTS)]
    addresses: Annotated[dict[str, tuple[str, int]], Table(ADDRESS, MOST_HOSTS, HOST)]


@message("met", Sender.HOST)
class Met(ControlMessage):
    """All links requested by ``Meet`` are open."""


@message("neighbour", Sender.NEIGHBOUR)
class Neighbour(ControlMessage):
    """The first message on a link between neighbours: its purpose."""

    boundary: Place


# --- asking what hosts can do -----------------------------------------------------------------


@message("survey_profile", Sender.COORDINATOR)
class SurveyProfile(ControlMessage):
    """Asks for the times of units at micro-batch sizes; answered by ``Profiled``."""

    sizes: Annotated[tuple[int, ...], Many(Whole(1, MOST_BATCH), 1000, 1)]


@message("profiled", Sender.HOST)
class Profiled(ControlMessage):
    """Times of units on a host, their sizes, and the duration of the measurement."""

    host: Annotated[HostProfile, HOST_PROFILE]
    units: Annotated[tuple[UnitFacts, ...], Many(FACTS, MOST_UNITS, 1)]
    seconds: Seconds


@message("survey_reference", Sender.COORDINATOR)
class SurveyReference(ControlMessage):
    """Asks for the times of reference layers; answered by ``Referenced``."""


@message("referenced", Sender.HOST)
class Referenced(ControlMessage):
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
class SurveyEcho(ControlMessage):
    """Asks for an immediate ``Echoed``, to measure a delay."""


@message("echoed", Sender.HOST)
class Echoed(ControlMessage):
    """Answers ``SurveyEcho``."""


@message("survey_send", Sender.COORDINATOR)
class SurveySend(ControlMessage):
    """Asks for two ``SurveyBytes``, a small one and one of the given size."""

    nbytes: Annotated[int, Whole(1, 1 << 30)]


@message("survey_bytes", Sender.BOTH, Form.BUNDLE)
class SurveyBytes(ControlMessage):
    """Filler bytes; a host answers every second one by ``Took``."""


@message("took", Sender.HOST)
class Took(ControlMessage):
    """The time from the first to the second of two ``SurveyBytes``."""

    seconds: Seconds


# --- before the first round -------------------------------------------------------------------


@message("plan", Sender.COORDINATOR)
class Prepare(ControlMessage):
    """The plan, of which a host builds and compiles its share; answered by ``Prepared``.

    Attributes:
      plan: The plan.
      samples: Samples of each device's epoch.
      steps: Steps of each device in the whole run.
    """

    plan: Planned
    samples: PerDevice
    steps: PerDevice


@message("working", Sender.BOTH)
class Working(ControlMessage):
    """The sender is busy with long work, which suspends the deadline.

    Attributes:
      what: The work.
      done: Number of finished parts, such as programs or units.
      of: Total number of parts; 0 if unknown.
    """

    what: Annotated[str, OneOf(("compiling", "timing", "tuning", "evaluating"))]
    done: Count
    of: Count


@message("prepared", Sender.HOST)
class Prepared(ControlMessage):
    """A host has compiled its share of the plan."""

    compile_s: Seconds
    memory_bytes: Bytes


@message("calibrate", Sender.COORDINATOR)
class Calibrate(ControlMessage):
    """Asks a slowed host to time its functions while others idle; answered by ``Calibrated``."""


@message("calibrated", Sender.HOST)
class Calibrated(ControlMessage):
    """A host has timed its functions."""

    seconds: Seconds


# --- a round ----------------------------------------------------------------------------------


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


@message("drop", Sender.COORDINATOR)
class Drop(ControlMessage):
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
class Dropped(ControlMessage):
    """A device has stopped for this round and sends nothing more about it."""

    round: Count


@message("halt", Sender.COORDINATOR)
class Halt(ControlMessage):
    """Where gradients are summed: stop, a device has failed in mid-step; answered by ``Halted``.

    Attributes:
      round: Which round.
      without: The places that are lost.
    """

    round: Count
    without: Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS, 1)]


@message("halted", Sender.HOST)
class Halted(ControlMessage):
    """Nothing of the round is computed on the host any more.

    Attributes:
      round: Which round.
      step: The first step of which some update is missing here.
    """

    round: Count
    step: Count


@message("rewind", Sender.COORDINATOR)
class Rewind(ControlMessage):
    """After ``Halt``: forget everything from a step on; answered by ``Rewound``.

    Weights, statistics and optimiser states are those after the step before. A ``Release`` of the
    same round follows, from that step on and without those who are lost; its spans are empty if
    all steps were over.
    """

    round: Count
    step: Count


@message("rewound", Sender.HOST)
class Rewound(ControlMessage):
    """A host is back at the step that it was told."""

    round: Count
    step: Count


@message("commit", Sender.COORDINATOR)
class Commit(ControlMessage):
    """What these places have trained in a round counts, and nothing else; ``Stored`` follows.

    Until then nobody averages, so that all hosts average the same.

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
    accuracy: Annotated[float, Figure()]
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
      correct: Number of correctly classified samples among them.
      samples: Number of these samples.
      busy_s: Seconds of computation.
      link: Statistics of sending to the coordinator.
      direct: Statistics of sending to its neighbours.
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
class ClientModel(ControlMessage):
    """The client-side model after a device's turn (sequential order)."""

    device: Count
    step: Count


@message("trace", Sender.HOST, Form.BUNDLE)
class TraceRows(ControlMessage):
    """A host's timed actions of a round."""


# --- states of units --------------------------------------------------------------------------


@message("pull", Sender.COORDINATOR)
class PullState(ControlMessage):
    """Asks for what a host has of some units; answered by ``PulledState``."""

    wanted: Annotated[tuple[StateRow, ...], Many(STATE_ROW, MOST_STATES)]


@message("pulled", Sender.HOST, Form.EITHER)
class PulledState(ControlMessage):
    """What a host has of the units that it was asked for."""


@message("push", Sender.COORDINATOR, Form.BUNDLE)
class PushState(ControlMessage):
    """What a host has of some units from now on; at most one of the fields says why.

    Attributes:
      round: It is the average of this round, which is over then: answered by ``Stored``.
      step: In sequential order, the client-side model for the turn that opens with this step: not
        answered.
      plan: This plan holds from now on, and the states are of units that come to the host under
        it: answered by ``PushedState``.

    Without a reason the host begins from a state of the run, answered by ``PushedState`` too:
    ``optimizers`` says whether its optimiser states are with it, or stay as they are.
    """

    round: Annotated[int | None, Maybe(Whole())] = None
    step: Annotated[int | None, Maybe(Whole())] = None
    plan: Annotated[Plan | None, Maybe(PLAN)] = None
    optimizers: Annotated[bool, Truth()] = False


@message("pushed", Sender.HOST)
class PushedState(ControlMessage):
    """A host has taken what was pushed, and works by the plan that came with it."""


@message("keep", Sender.COORDINATOR)
class KeepState(ControlMessage):
    """A host writes its optimiser states to its own disk; answered by ``KeptState``.

    Attributes:
      run: The run's own name, which no other run has.
      rounds: Rounds that are over.
    """

    run: RunName
    rounds: Count


@message("kept", Sender.HOST)
class KeptState(ControlMessage):
    """A host's optimiser states are on its disk, or why they are not."""

    rounds: Count
    reason: Annotated[str | None, Maybe(Prose())]


@message("restore", Sender.COORDINATOR)
class RestoreState(ControlMessage):
    """A host goes back to its optimiser states on its own disk; answered by ``RestoredState``."""

    run: RunName
    rounds: Count


@message("restored", Sender.HOST)
class RestoredState(ControlMessage):
    """A host has its optimiser states back, or why they begin fresh."""

    rounds: Count
    missing: Annotated[str | None, Maybe(Prose())]


# --- changes of plan --------------------------------------------------------------------------


@message("look", Sender.COORDINATOR)
class Look(ControlMessage):
    """Asks for durations of computations and throughput of links; answered by ``LookSeen``."""

    look: Count


@message("seen", Sender.HOST)
class LookSeen(ControlMessage):
    """Durations of computations since the last query, and throughput of links so far."""

    look: Count
    rows: Annotated[tuple[Seen, ...], Many(SEEN, 100_000)]
    timed: Annotated[Timing, TIMING]
    direct: Annotated[tuple[DirectTiming, ...], Many(DIRECT, MOST_HOSTS)]


@message("ahead", Sender.COORDINATOR)
class CompileAhead(ControlMessage):
    """Asks to compile a candidate plan during training; answered by ``Compiled``."""

    number: Count
    plan: Planned


@message("compiled", Sender.HOST)
class Compiled(ControlMessage):
    """A host has compiled a candidate plan, or gives the reason why it refuses it."""

    number: Count
    refused: Annotated[str | None, Maybe(Prose())]


# --- the end ----------------------------------------------------------------------------------


@message("finish", Sender.COORDINATOR)
class Finish(ControlMessage):
    """The run has finished; answered by ``Bye``."""


@message("bye", Sender.HOST, Form.BUNDLE)
class Bye(ControlMessage):
    """The last message of a host, with its remaining timed actions."""


@message("abort", Sender.COORDINATOR)
class Abort(ControlMessage):
    """The run has ended early.

    Attributes:
      reason: The reason.
      again: Whether the coordinator is expected to continue it later.
    """

    reason: Words
    again: Annotated[bool, Truth()]


@message("failed", Sender.HOST)
class Failed(ControlMessage):
    """A host ends because of an error."""

    error: Words


@message("leave", Sender.HOST)
class Leave(ControlMessage):
    """A host was asked to end, and does not come back by itself."""

    reason: Words
