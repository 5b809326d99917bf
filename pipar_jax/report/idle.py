"""Idle time by cause, from a trace.

Busy is the union of a host's computations, idle the rest of the round. Each idle interval ends when
a computation starts or with the round. Its causes are found by following the critical path
backwards from there: the last input, the message that carried it, the computation that produced it,
the input of that one, and so on until the interval's start. Each part of that path is attributed to
one cause, so that the causes add up to the idle time.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from typing import NamedTuple

from pipar_jax.schedule.actions import (
    AGGREGATE,
    BACKWARD,
    COMPUTE,
    FORWARD,
    LOSS,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    Action,
)
from pipar_jax.schedule.plan import COORDINATOR, Order
from pipar_jax.schedule.trace import Interval, Timed, Trace

#: The next mini-batch was not ready.
DATA = "data"
#: A device computed.
DEVICE = "device"
#: The server, or another compute host, computed.
SERVER = "server"
#: A message was in transit, or waited for credit.
NETWORK = "network"
#: All steps were finished, and weights were collected, averaged and returned.
AGGREGATION = "aggregation"
#: Dispatch, and time that the trace does not explain.
OTHER = "other"
CAUSES = (DATA, DEVICE, SERVER, NETWORK, AGGREGATION, OTHER)

_DEVICE = re.compile(r"d\d+")


class _Placed(NamedTuple):
    """A timed action with its host and position."""

    host: str
    row: Timed
    position: int


def idle_causes(trace: Trace, interval: Interval) -> dict[str, dict[str, float]]:
    """Returns the idle seconds of each host in a round, by cause.

    The coordinator is included even if it computed nothing.

    Args:
      trace: A run's trace or a predicted one.
      interval: The round.
    """
    paths = _Paths(trace, interval)
    return {host: paths.causes(host) for host in paths.hosts}


class _Paths:
    """The computations and messages of one round, indexed for the walk backwards."""

    def __init__(self, trace: Trace, interval: Interval) -> None:
        self._interval = interval
        self._sequential = trace.meta.get("plan", {}).get("order") == Order.SEQUENTIAL
        self.hosts = tuple(dict.fromkeys((*trace.hosts, COORDINATOR)))
        self._rows: dict[str, list[Timed]] = {}
        self._starts: dict[str, list[float]] = {}
        self._made: dict[Action, _Placed] = {}
        self._received: dict[tuple[str, Action], Timed] = {}
        for host in self.hosts:
            inside = [r for r in trace.hosts.get(host, ()) if _overlaps(r, interval)]
            rows = sorted(
                (r for r in inside if r.action.kind in COMPUTE), key=lambda r: (r.start_s, r.end_s)
            )
            self._rows[host] = rows
            self._starts[host] = [row.start_s for row in rows]
            self._made.update((r.action, _Placed(host, r, i)) for i, r in enumerate(rows))
            for row in inside:
                if row.action.kind in (RECEIVE_FORWARD, RECEIVE_BACKWARD):
                    self._received[host, row.action] = row
        trained = [p for p in self._made.values() if p.row.action.kind != AGGREGATE]
        self._last = max(trained, key=lambda placed: placed.row.end_s, default=None)

    def causes(self, host: str) -> dict[str, float]:
        """Returns a host's idle seconds by cause."""
        idle_s = dict.fromkeys(CAUSES, 0.0)
        reached = self._interval.start_s
        for position, row in enumerate(self._rows[host]):
            if row.start_s > reached:
                stretch = _Stretch(idle_s, reached, row.start_s)
                if row.action.kind == AGGREGATE:
                    self._explain_end(stretch)
                else:
                    self._walk(_Placed(host, row, position), stretch)
                stretch.back_to(reached, OTHER)
            reached = max(reached, row.end_s)
        if self._interval.end_s > reached:
            self._explain_end(_Stretch(idle_s, reached, self._interval.end_s))
        return idle_s

    def _explain_end(self, stretch: _Stretch) -> None:
        """Attributes the wait at a round's end to the last host that trained, then to weights."""
        last = self._last
        if last is not None and last.row.end_s > stretch.start_s:
            stretch.back_to(last.row.end_s, AGGREGATION)
            stretch.back_to(last.row.start_s, _role(last.host))
            self._walk(last, stretch)
            stretch.back_to(stretch.start_s, OTHER)
        stretch.back_to(stretch.start_s, AGGREGATION)

    def _walk(self, placed: _Placed, stretch: _Stretch) -> None:
        """Attributes the time before a computation, back to the start of the stretch."""
        while placed.row.start_s > stretch.start_s:
            host, row, position = placed
            previous = self._rows[host][position - 1] if position else None
            input_row = self._input(host, row.action)
            if input_row is not None and (previous is None or input_row.end_s > previous.end_s):
                maker = self._maker(input_row.action)
                stretch.back_to(input_row.end_s, OTHER)
                if maker is None:
                    stretch.back_to(stretch.start_s, NETWORK)
                    return
                stretch.back_to(maker.row.end_s, NETWORK)
            else:
                maker = self._before(placed)
                begin_s = stretch.start_s if maker is None else maker.row.end_s
                stretch.back_to(begin_s, self._delay(placed, maker))
                if maker is None:
                    return
            stretch.back_to(maker.row.start_s, _role(maker.host))
            if maker.row.start_s >= row.start_s:
                return  # clocks that disagree must not cause an endless loop
            placed = maker

    def _before(self, placed: _Placed) -> _Placed | None:
        """Returns the computation that one without a late input waited for."""
        host, row, position = placed
        previous = None
        if position:
            previous = _Placed(host, self._rows[host][position - 1], position - 1)
        if not self._sequential or row.action.stage or row.action.kind not in (FORWARD, LOSS):
            return previous
        if previous is not None and row.action.step - previous.row.action.step <= 1:
            return previous
        # The device's turn began when that of the device before it ended.
        others = [self._latest(other, row.start_s) for other in self.hosts if other != host]
        candidates = [cause for cause in (*others, previous) if cause is not None]
        return max(candidates, key=lambda candidate: candidate.row.end_s, default=None)

    def _latest(self, host: str, before_s: float) -> _Placed | None:
        """Returns the last computation of a device that had ended at a time."""
        if _role(host) != DEVICE:
            return None
        position = bisect.bisect_left(self._starts[host], before_s) - 1
        if position < 0 or self._rows[host][position].end_s > before_s:
            return None
        return _Placed(host, self._rows[host][position], position)

    def _delay(self, placed: _Placed, before: _Placed | None) -> str:
        """Returns the cause of a delay that no late input explains."""
        action = placed.row.action
        if action.stage or action.kind not in (FORWARD, LOSS):
            return OTHER
        if before is not None and before.host != placed.host:
            return NETWORK  # the client-side model was handed on
        # Within a mini-batch the data are ready: it must have waited for credit.
        return NETWORK if action.micro_batch else DATA

    def _input(self, host: str, action: Action) -> Timed | None:
        """Returns the arrival of a computation's input, if it was received over a link."""
        if action.kind == BACKWARD:
            return self._received.get((host, action._replace(kind=RECEIVE_BACKWARD)))
        if action.kind in (FORWARD, LOSS):
            return self._received.get((host, action._replace(kind=RECEIVE_FORWARD)))
        return None

    def _maker(self, received: Action) -> _Placed | None:
        """Returns the computation whose result a message carried."""
        if received.kind == RECEIVE_FORWARD:
            return self._made.get(received._replace(stage=received.stage - 1, kind=FORWARD))
        above = received._replace(stage=received.stage + 1, kind=BACKWARD)
        return self._made.get(above) or self._made.get(above._replace(kind=LOSS))


def total_causes(rounds: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns the sums over several rounds of the results of ``idle_causes``."""
    total: dict[str, dict[str, float]] = {}
    for hosts in rounds:
        for host, causes in hosts.items():
            mine = total.setdefault(host, dict.fromkeys(CAUSES, 0.0))
            for cause, seconds in causes.items():
                mine[cause] += seconds
    return total


class _Stretch:
    """An idle interval that is attributed from its end backwards, each moment once."""

    def __init__(self, idle_s: dict[str, float], start_s: float, end_s: float) -> None:
        self.start_s = start_s
        self._idle_s = idle_s
        self._open_s = end_s

    def back_to(self, moment_s: float, cause: str) -> None:
        """Attributes the unattributed time after a moment to a cause."""
        moment_s = max(moment_s, self.start_s)
        if moment_s < self._open_s:
            self._idle_s[cause] += self._open_s - moment_s
            self._open_s = moment_s


def _overlaps(row: Timed, interval: Interval) -> bool:
    """Returns whether an action overlaps an interval."""
    return row.end_s > interval.start_s and row.start_s < interval.end_s


def _role(host: str) -> str:
    """Returns the cause of waiting for a computation of a host."""
    return DEVICE if _DEVICE.fullmatch(host) else SERVER
