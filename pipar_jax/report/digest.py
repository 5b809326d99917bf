"""What a report needs of a trace, read round by round, so that a long run's need not be held."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipar_jax.cost_model.from_trace import Observed
from pipar_jax.report.idle import idle_causes, total_causes
from pipar_jax.schedule.actions import SEND_BACKWARD, SEND_FORWARD
from pipar_jax.schedule.trace import Trace, read_rounds


@dataclasses.dataclass
class Digest:
    """A trace in sums.

    Attributes:
      meta: The trace's own.
      hosts: The hosts in it.
      rounds: How many rounds it has; not all of the run's with ``run.trace=ends``.
      causes: For each host the idle seconds of its rounds by cause.
      carried: Bytes of activations and cotangents by sender, device and the stage they are for.
      observed: What computations lasted and messages had.
      last: Its last round, in full.
    """

    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    rounds: int = 0
    causes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    carried: dict[tuple[str, int, int], dict[str, float]] = dataclasses.field(default_factory=dict)
    observed: Observed = dataclasses.field(default_factory=Observed)
    last: Trace = dataclasses.field(default_factory=Trace)

    def add(self, part: Trace) -> None:
        """Takes a round of the trace, or what follows the last."""
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
    """Reads a trace, one round after another.

    Raises:
      RunError: The file is not a trace.
    """
    found = Digest()
    for part in read_rounds(path):
        found.add(part)
    return found
