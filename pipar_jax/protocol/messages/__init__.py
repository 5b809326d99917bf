"""All control messages of a run, as values: sender, fields, and the valid values of each field.

Coordinator, devices, compute nodes and neighbours send no other control messages. A message is a
dataclass whose fields are annotated with their specifications (``wire_fields``); ``decode`` rejects
everything else with an error that names the peer, the message, the field, and the expected and the
actual value. The host in the coordinator's own process answers with the same values. ``VERSION``
covers all messages: hosts of another version are refused when they join.
"""

from pipar_jax.protocol.messages.ending import Abort, Bye, Failed, Finish, Leave
from pipar_jax.protocol.messages.evaluation import Evaluate, Evaluated
from pipar_jax.protocol.messages.joining import (
    Join,
    JoinDevice,
    JoinNode,
    Meet,
    Met,
    ModelFacts,
    Neighbour,
    NeighbourLost,
    Refused,
)
from pipar_jax.protocol.messages.preparation import (
    Calibrate,
    Calibrated,
    Prepare,
    Prepared,
    Working,
)
from pipar_jax.protocol.messages.replanning import CompileAhead, Compiled, Look, LookSeen
from pipar_jax.protocol.messages.rounds import (
    ClientModel,
    Commit,
    Drop,
    Dropped,
    Halt,
    Halted,
    NonFinite,
    Progress,
    Pulse,
    Release,
    Rewind,
    Rewound,
    Stored,
    TraceRows,
    Trained,
)
from pipar_jax.protocol.messages.states import (
    KeepState,
    KeptState,
    PulledState,
    PullState,
    PushedState,
    PushState,
    RestoredState,
    RestoreState,
)
from pipar_jax.protocol.messages.survey import (
    Echoed,
    Profiled,
    Referenced,
    SurveyBytes,
    SurveyEcho,
    SurveyProfile,
    SurveyReference,
    SurveySend,
    Took,
)

#: Version of all these messages.
VERSION = 5

__all__ = [
    "VERSION",
    "Abort",
    "Bye",
    "Calibrate",
    "Calibrated",
    "ClientModel",
    "Commit",
    "CompileAhead",
    "Compiled",
    "Drop",
    "Dropped",
    "Echoed",
    "Evaluate",
    "Evaluated",
    "Failed",
    "Finish",
    "Halt",
    "Halted",
    "Join",
    "JoinDevice",
    "JoinNode",
    "KeepState",
    "KeptState",
    "Leave",
    "Look",
    "LookSeen",
    "Meet",
    "Met",
    "ModelFacts",
    "Neighbour",
    "NeighbourLost",
    "NonFinite",
    "Prepare",
    "Prepared",
    "Profiled",
    "Progress",
    "PullState",
    "PulledState",
    "Pulse",
    "PushState",
    "PushedState",
    "Referenced",
    "Refused",
    "Release",
    "RestoreState",
    "RestoredState",
    "Rewind",
    "Rewound",
    "Stored",
    "SurveyBytes",
    "SurveyEcho",
    "SurveyProfile",
    "SurveyReference",
    "SurveySend",
    "Took",
    "TraceRows",
    "Trained",
    "Working",
]
