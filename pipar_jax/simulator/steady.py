"""Detects that a round is periodic and extrapolates the repetitions.

The future of a simulation depends only on its state: future events, waiting and ready actions with
their order, and the bookings of processors and links. If the state at the end of a device's step
equals an earlier one, relative to the time and step, everything in between repeats as long as
mini-batches keep their sizes. Repetitions are then left out, and their time, bytes and actions
added at the end.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from pipar_jax.schedule.actions import ALL, Action
from pipar_jax.schedule.plan import Order
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.simulator.state import REST_S

if TYPE_CHECKING:
    from pipar_jax.simulator.engine import Simulation

#: Rounds with fewer steps are simulated completely, since there is little to leave out.
FEWEST_STEPS = 16
#: Number of states kept for comparison.
KEPT = 24


class _Seen(NamedTuple):
    """A state with the totals at its time."""

    time_s: float
    step: int
    busy_s: tuple[float, ...]
    carried: dict[tuple[str, str], float]
    actions: int


class Steady:
    """Watches a simulation for recurring states.

    Attributes:
      offset_s: Seconds left out.
      left_out: Steps left out by span.
      busy_s: Seconds of computation left out by host.
      carried: Bytes left out by direction of a link.
      actions: Number of actions left out.

    Args:
      simulation: The simulation.
      schedule: Its round.
    """

    def __init__(self, simulation: Simulation, schedule: RoundSchedule) -> None:
        self._simulation = simulation
        self._sequential = schedule.plan.order == Order.SEQUENTIAL
        self._spans = [span for span in schedule.spans if span.stop > span.first]
        longest = max((span.stop - span.first for span in self._spans), default=0)
        self._watching = longest >= FEWEST_STEPS
        self._seen: dict[Hashable, _Seen] = {}
        self.offset_s = 0.0
        self.left_out = 0
        self.busy_s: dict[str, float] = {}
        self.carried: dict[tuple[str, str], float] = {}
        self.actions = 0

    def observe(self, action: Action) -> None:
        """Compares the state at the end of a device's step."""
        if not self._watching:
            return
        reached = self._simulation.round.reached()
        if self._sequential:  # the others only wait for the client-side model
            reached = {d: step for d, step in reached.items() if d == action.device}
        elif len(reached) != len(self._spans):
            return  # a device has finished, and its last step must keep its name
        marker = min(reached, default=ALL)
        if action.device not in (marker, ALL):
            return
        # The last step differs from the others, so that no host may have started it.
        ahead = self._simulation.round.alike_ahead(reached) - 1
        if ahead < 1:
            return
        state = self._state(reached, marker)
        now = _Seen(
            self._simulation.now_s,
            reached[marker],
            tuple(host.busy_s for host in self._simulation.hosts),
            self._simulation.network.carried(),
            self._simulation.actions,
        )
        before = self._seen.get(state)
        if before is not None and now.step > before.step:
            self._leave_out(before, now, ahead, list(reached))
            self._seen.clear()
            return
        if len(self._seen) >= KEPT:
            del self._seen[next(iter(self._seen))]
        self._seen[state] = now

    def _leave_out(self, before: _Seen, now: _Seen, ahead: int, devices: list[int]) -> None:
        """Leaves out as many repetitions as possible."""
        period = now.step - before.step
        times = ahead // period
        if not times:
            return
        steps = times * period
        simulation = self._simulation
        simulation.round.leave_out(steps, devices)
        self.left_out += steps
        self.offset_s += times * (now.time_s - before.time_s)
        for host, was, is_now in zip(simulation.hosts, before.busy_s, now.busy_s, strict=True):
            self.busy_s[host.name] = self.busy_s.get(host.name, 0.0) + times * (is_now - was)
        for ends, nbytes in now.carried.items():
            gained = nbytes - before.carried.get(ends, 0.0)
            self.carried[ends] = self.carried.get(ends, 0.0) + times * gained
        self.actions += times * (now.actions - before.actions)

    def _state(self, reached: dict[int, int], marker: int) -> Hashable:
        """Returns the state with times relative to now, which are exact (``on_grid``)."""
        simulation = self._simulation
        now_s = simulation.now_s
        base = {**reached, ALL: reached[marker]}
        structure: list[Hashable] = [
            tuple((device, step - reached[marker]) for device, step in sorted(reached.items()))
        ]
        times: list[float] = []
        rested_s = 0.0 if simulation.costs.after_rest_s is None else -REST_S
        for time_s, _, handler, arguments in sorted(simulation.events, key=lambda e: e[:2]):
            times.append(time_s - now_s)
            structure.append((handler.__name__, _relative(arguments, base)))
        for host in simulation.hosts:
            structure.append((host.in_flight, host.dispatcher.state(base), frozenset(host.warm)))
            times += [max(host.free_s - now_s, rested_s), max(host.codec_free_s - now_s, 0.0)]
        for way in simulation.network.times():
            times.append(max(way.free_s - now_s, 0.0))
        for link in simulation.network.directions.values():
            structure.append((link.outstanding, link.credited.reserved_bytes))
        for name, device, step, left, sizes in simulation.round.begun():
            structure.append((name, device, step - base.get(device, 0), left, sizes))
        return tuple(structure), tuple(times)


def _relative(arguments: tuple[object, ...], base: dict[int, int]) -> Hashable:
    """Returns an event's arguments with steps relative to a base, without absolute times."""
    kept: list[Hashable] = []
    for value in arguments:
        if isinstance(value, Action):
            kept.append(value._replace(step=value.step - base.get(value.device, 0)))
        elif not isinstance(value, float):
            kept.append(value if isinstance(value, int | str) else id(value))
    return tuple(kept)
