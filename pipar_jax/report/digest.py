"""Sums over a trace for the report, read round by round so that long traces fit into memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipar_jax.cost_model.from_trace import Observed
from pipar_jax.disk.json_text import JsonMapping
from pipar_jax.report.idle import idle_causes, total_causes
from pipar_jax.schedule.actions import SEND_BACKWARD, SEND_FORWARD
from pipar_jax.schedule.trace import Trace, read_rounds


@dataclasses.dataclass
class Digest:
    """Sums over a trace.

    Attributes:
      meta: Metadata of the trace.
      hosts: The hosts of the trace.
      rounds: Number of rounds in the trace; fewer than in the run with ``run.trace=ends``.
      causes: Idle seconds of all rounds, by host and cause.
      carried: Bytes of activations and cotangents by sender, device and destination stage.
      observed: Durations of computations and sizes of messages.
      last: The complete last round.
    """

    meta: JsonMapping = dataclasses.field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    rounds: int = 0
    causes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    carried: dict[tuple[str, int, int], dict[str, float]] = dataclasses.field(default_factory=dict)
    observed: Observed = dataclasses.field(default_factory=Observed)
    last: Trace = dataclasses.field(default_factory=Trace)

    def add(self, part: Trace) -> None:
        """Adds a round of the trace, or the actions after the last round."""
        self.meta, self.hosts = part.meta, tuple(dict.fromkeys((*self.hosts, *part.hosts)))
        self.observed.add(part)
        for host, row in part.rows():
            action = row.action
            if action.kind in (SEND_FORWARD, SEND_BACKWARD):
                forward = action.kind == SEND_FORWARD
                key = host, action.device, action.stage + (1 if forward else -1)
                sums = self.carried.setdefault(key, {"activations": 0.0, "cotangents": 0.0})
                sums["activations" if forward else "cotangents"] += row.nbytes
        for interval in part.rounds:
            self.rounds += 1
            self.causes = total_causes([self.causes, idle_causes(part, interval)])
            self.last = part


def digest(path: Path) -> Digest:
    """Reads a trace round by round.

    Raises:
      RunError: The file is not a trace.
    """
    digest = Digest()
    for part in read_rounds(path):
        digest.add(part)
    return digest
