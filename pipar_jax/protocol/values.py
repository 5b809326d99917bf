"""Values in several messages: plans, boundaries, seconds, and rows of statistics."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, NamedTuple, get_args

from comms import CodecError, parse_codec
from pipar_jax.cost_model.profile import HostProfile, RuntimeOverhead, UnitFacts
from pipar_jax.errors import PlanError
from pipar_jax.protocol.wire_fields import (
    Figure,
    Many,
    Maybe,
    OneOf,
    Prose,
    Real,
    Struct,
    Table,
    Text,
    TupleOf,
    Whole,
)
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS, UPDATE, ActionKind
from pipar_jax.schedule.plan import (
    Boundary,
    Codecs,
    DevicePlan,
    Dispatch,
    HandOn,
    Order,
    Plan,
    WeightPolicy,
)
from stages.signature import ArrayType, Signature
from stages.tasks.task import METRIC_NAME

#: Maximum number of hosts, units, stages and spans in a message.
MOST_HOSTS, MOST_UNITS, MOST_STAGES, MOST_SPANS = 100_000, 10_000, 1_000, 1_000_000
#: The most copies of units.
MOST_STATES = 10_000_000
#: The most samples of a mini-batch, and bytes of anything.
MOST_BATCH, MOST_BYTES = 2**24, 2**53
#: Maximum number of seconds.
MOST_S = 1e9


def _known_codec(name: str) -> None:
    try:
        parse_codec(name)
    except CodecError as error:
        raise ValueError(str(error)) from error


METRIC = Text(40, METRIC_NAME)
HOST = Text(16, r"server|[dn](0|[1-9]\d{0,6})")
CODEC = Text(40, r"[a-z0-9_:.,=+-]+", _known_codec)
CODECS = Struct(Codecs, {"activation": CODEC, "cotangent": CODEC})
DEVICE_PLAN = Struct(
    DevicePlan,
    {
        "cuts": Many(Whole(1, MOST_UNITS), MOST_STAGES),
        "hosts": Many(Text(16, r"device|server|[dn](0|[1-9]\d{0,6})"), MOST_STAGES, 1),
        "micro_batches": Whole(1, MOST_BATCH),
        "codecs": Many(CODECS, MOST_STAGES),
    },
    (PlanError,),
)
PLAN = Struct(
    Plan,
    {
        "devices": Many(DEVICE_PLAN, MOST_HOSTS, 1),
        "order": OneOf(tuple(Order)),
        "weights": OneOf(tuple(WeightPolicy)),
        "in_flight": Whole(),
        "dispatch": OneOf(tuple(Dispatch)),
        "aggregate_every": Whole(),
        "hand_on": OneOf(tuple(HandOn)),
    },
    (PlanError,),
)
BOUNDARY = TupleOf(Boundary, (HOST, HOST, Whole(0, MOST_STAGES)))
ADDRESS = TupleOf(lambda host, port: (host, port), (Text(255, r"[\x21-\x7e]+"), Whole(1, 65535)))
#: A sum of numerators, and that of their denominators.
SUMS = TupleOf(lambda value, weight: (value, weight), (Figure(), Figure()))
SECONDS, BYTES = Real(0.0, MOST_S), Whole(0, MOST_BYTES)
#: What private devices have released; noise that is too small makes it very large.
SPENT = Real(0.0, 1e300)
#: Element types of samples.
_DTYPES = ("bool", "int32", "float32", "float64", "float16", "bfloat16")
ARRAY_TYPE = TupleOf(ArrayType, (Many(Whole(1, 2**24), 15), OneOf(_DTYPES)))
ARRAY_TYPES = Table(ARRAY_TYPE, 16, Text(64, r"[A-Za-z_]\w{0,63}"))
SIGNATURE = Struct(
    Signature,
    {"input": ARRAY_TYPE, "sides": ARRAY_TYPES, "targets": ARRAY_TYPES, "classes": Whole()},
)
FACTS = Struct(
    UnitFacts,
    {"name": Text(256)} | {
        name: Real() for name in ("parameter_bytes", "state_bytes", "optimizer_bytes",
                                  "output_bytes", "residual_bytes", "personal_bytes")
    } | {"sides": Many(Text(64), 16)},
)  # fmt: skip
HANDLING = Struct(RuntimeOverhead, {"call_s": SECONDS, "byte_s": SECONDS})
TIMES = Many(Many(SECONDS, 1000, 1), MOST_UNITS, 1)
AFTER_REST = Many(TupleOf(lambda *seconds: seconds, (SECONDS, SECONDS, SECONDS)), MOST_UNITS)
HOST_PROFILE = Struct(
    HostProfile,
    {
        "sizes": Many(Whole(1, MOST_BATCH), 1000, 1),
        "forward_s": TIMES,
        "backward_s": TIMES,
        "update_s": Many(SECONDS, MOST_UNITS, 1),
        "call_s": SECONDS,
        "average_s_per_byte": SECONDS,
        "memory_bytes": Maybe(Real()),
        "handling": HANDLING,
        "after_rest_s": AFTER_REST,
    },
    (PlanError,),
)

Count = Annotated[int, Whole()]
Bytes = Annotated[int, BYTES]
Seconds = Annotated[float, SECONDS]
Name = Annotated[str, HOST]
Words = Annotated[str, Prose()]
RunName = Annotated[str, Text(32, r"[0-9a-f]{1,32}")]
Planned = Annotated[Plan, PLAN]
PerDevice = Annotated[tuple[int, ...], Many(Whole(), MOST_HOSTS, 1)]
Address = Annotated[tuple[str, int], ADDRESS]
Sampled = Annotated[Signature, SIGNATURE]
Place = Annotated[Boundary, BOUNDARY]
PerLayer = Annotated[tuple[float, ...], Many(Real(), MOST_UNITS, 1)]


#: What a unit's state is made of: weights, batch statistics, the state of its optimiser, and that
#: of the rule that averages it.
Part = Literal["params", "state", "opt", "rule"]
PARTS: tuple[Part, ...] = get_args(Part)
#: A copy's number where all copies of a unit are equal, or any will do.
EVERY = -2


class StateRow(NamedTuple):
    """What is asked for of one copy of a unit.

    Attributes:
      copy: Whose: a place's number, ``ALL`` or ``EVERY``.
      unit: The unit's name.
      parts: The parts of its state.
    """

    copy: int
    unit: str
    parts: tuple[Part, ...]


STATE_ROW = TupleOf(StateRow, (Whole(EVERY), Text(64), Many(OneOf(PARTS), len(PARTS), 1)))


class Seen(NamedTuple):
    """Observations of one kind of computation.

    Attributes:
      device: Device whose data it processed.
      stage: Its stage under the plan of that time.
      kind: F, B, L or U.
      samples: Samples in its micro-batch; 0 for U.
      times: Number of observations.
      median_s: Median of its seconds.
    """

    device: int
    stage: int
    kind: ActionKind
    samples: int
    times: int
    median_s: float


class Timing(NamedTuple):
    """Throughput of consecutive frames of a link so far.

    Attributes:
      nbytes: Number of bytes.
      seconds: Their duration.
    """

    nbytes: int
    seconds: float


class DirectTiming(NamedTuple):
    """Throughput of a link between neighbours.

    Attributes:
      boundary: The boundary of the link.
      timed: Its throughput.
    """

    boundary: Boundary
    timed: Timing


SEEN = TupleOf(
    Seen,
    (Whole(-1), Whole(0, MOST_STAGES), OneOf((FORWARD, BACKWARD, LOSS, UPDATE)),
     Whole(0, MOST_BATCH), Whole(1), SECONDS),
)  # fmt: skip
TIMING = TupleOf(Timing, (BYTES, SECONDS))
DIRECT = TupleOf(DirectTiming, (BOUNDARY, TIMING))


@dataclasses.dataclass(frozen=True, slots=True)
class Waits:
    """Waiting times of sending over a link in a round; see ``comms.LinkStats``."""

    queue_s: Seconds = 0.0
    credit_wait_s: Seconds = 0.0
    blocked_s: Seconds = 0.0
    encode_s: Seconds = 0.0
    repeated_frames: Bytes = 0
    repeated_bytes: Bytes = 0
    queued_peak_bytes: Bytes = 0


@dataclasses.dataclass(frozen=True, slots=True)
class LinkRow:
    """Traffic from one host to another in a round; see ``pipar_jax.roles.link_stats``."""

    source: Name
    target: Name
    bytes: Bytes
    raw_bytes: Bytes
    payload_bytes: Bytes
    messages: Bytes
    frames: Bytes
    queue_s: Seconds
    credit_wait_s: Seconds
    blocked_s: Seconds
    encode_s: Seconds
    repeated_frames: Bytes
    repeated_bytes: Bytes
    queued_peak_bytes: Bytes
    reconnects: Count
    rtt_s: Annotated[float | None, Maybe(SECONDS)]
    rate_mbps: Annotated[float | None, Maybe(Real())]


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of a host in bytes, as in ``runtime.memory.Used``."""

    arrays: Bytes
    temporary: Bytes
    resident: Bytes
