"""What a host's computations lasted since somebody last asked, and what its links brought."""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipar_jax.errors import RunError
from pipar_jax.plan import Boundary
from pipar_jax.schedule import BACKWARD, FORWARD, LAST, UPDATE
from pipar_jax.trace import Timed
from pipar_jax.tuner.watch import Carried

_KINDS = (FORWARD, BACKWARD, LAST, UPDATE)


class Seen(NamedTuple):
    """One kind of computation, as often as it was seen.

    Attributes:
      device: Whose data it worked on.
      stage: Its stage under the plan of that time.
      kind: F, B, L or U.
      samples: Samples in its micro-batch; 0 for U.
      times: How often it was seen.
      median_s: The median of its seconds.
    """

    device: int
    stage: int
    kind: str
    samples: int
    times: int
    median_s: float


class Observer:
    """Collects the times of one host's computations; any thread may call it."""

    def __init__(self) -> None:
        """See the class."""
        self._lock = threading.Lock()
        self._times: dict[tuple[int, int, str, int], list[float]] = defaultdict(list)

    def add(self, row: Timed) -> None:
        """Takes a timed action; those that are no computation do not count."""
        one = row.action
        if one.kind in _KINDS:
            with self._lock:
                key = one.device, one.stage, one.kind, row.samples
                self._times[key].append(row.end_s - row.start_s)

    def take(self) -> list[Seen]:
        """Returns what was seen since the last call."""
        with self._lock:
            times, self._times = self._times, defaultdict(list)
        return [
            Seen(*key, len(values), statistics.median(values))
            for key, values in sorted(times.items())
        ]


class Answer(NamedTuple):
    """A host's answer to a look.

    Attributes:
      seen: What its computations lasted.
      timed: What its link to the coordinator has brought it.
      direct: The same of its links to neighbours.
    """

    seen: list[Seen]
    timed: Carried
    direct: dict[Boundary, Carried]


def parse_answer(body: Mapping[str, Any], peer: str) -> Answer:
    """Returns what a host's JSON answers to a look.

    Raises:
      RunError: It is something else.
    """
    try:
        direct = {
            Boundary(str(lower), str(upper), int(below)): Carried(float(nbytes), float(seconds))
            for lower, upper, below, nbytes, seconds in body["direct"]
        }
        nbytes, seconds = map(float, body["timed"])
        return Answer(parse_seen(body["rows"], peer), Carried(nbytes, seconds), direct)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{peer} answered a look with what cannot be read: {error!r}; do both hosts run the "
            "same version?"
        ) from error


def parse_seen(rows: Sequence[Any], peer: str) -> list[Seen]:
    """Returns what a device's JSON says that it saw.

    Raises:
      RunError: It is something else.
    """
    try:
        made = [Seen(*row) for row in rows]
        fits = all(
            isinstance(value, kind) and not isinstance(value, bool)
            for row in made
            for value, kind in zip(row, (int, int, str, int, int, float), strict=True)
        )
    except TypeError as error:
        raise RunError(f"{peer} sent observations that cannot be read: {error}") from error
    if not fits or any(row.kind not in _KINDS or row.median_s < 0 for row in made):
        raise RunError(f"{peer} sent observations that are none: {list(rows)[:3]}")
    return made
