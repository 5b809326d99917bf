"""Whether what was done was done in its order: a trace held against the schedules of its rounds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from pipar_jax.schedule.actions import COMPUTE, RECEIVE_WEIGHTS, SEND_WEIGHTS, Action
from pipar_jax.schedule.plan import Plan
from pipar_jax.schedule.rounds import RoundSchedule, rounds
from pipar_jax.schedule.trace import Timed, Trace

#: Traces are written in nanoseconds; how far two hosts' clocks may seem apart.
SAME_CLOCK_S, CLOCKS_S = 1e-6, 0.05


def violations(
    trace: Trace, schedules: Sequence[RoundSchedule], clocks_s: float = CLOCKS_S
) -> list[str]:
    """Returns what a run did too early, twice, never or unasked, a line each.

    On one host an action starts after what it waits for is over. Between two hosts, whose clocks
    are only nearly the same, it is not over before what it waits for has begun. No computation of a
    round starts before the host's computations of the round before are over.

    Args:
      trace: The run's.
      schedules: Its rounds, from the first.
      clocks_s: Seconds by which the clocks of two hosts may differ.
    """
    done: dict[Action, tuple[str, Timed]] = {}
    counts: Counter[Action] = Counter()
    for host, row in trace.rows():
        counts[row.action] += 1
        done[row.action] = host, row
    found = [f"{action} was done {n} times" for action, n in counts.items() if n > 1]
    known: set[Action] = set()
    over_s: dict[str, float] = defaultdict(lambda: float("-inf"))
    for schedule in schedules:
        ends_s = dict(over_s)
        for action, before in _rows(schedule):
            known.add(action)
            if action not in done:
                found.append(f"{action} was never done")
                continue
            host, row = done[action]
            found += [
                line for one in before if one in done
                for line in _too_early(host, row, *done[one], clocks_s)
            ]  # fmt: skip
            if action.kind in COMPUTE:
                if row.start_s < over_s[host] - SAME_CLOCK_S:
                    found.append(f"{action} started before {host}'s round before it was over")
                ends_s[host] = max(ends_s.get(host, row.end_s), row.end_s)
        over_s.update(ends_s)
    return found + [f"{action} is in no schedule" for action in done if action not in known]


def schedules(plan: Plan, samples: Sequence[int], batch: int, epochs: int) -> list[RoundSchedule]:
    """Returns the schedules of a run with one plan, at whose start nobody has the client model."""
    made: list[RoundSchedule] = []
    holder: int | None = None
    for spans in rounds(plan, [-(-n // batch) for n in samples], epochs):
        made.append(RoundSchedule(plan, spans, tuple(samples), batch, holder))
        holder = spans[-1].device
    return made


def _rows(schedule: RoundSchedule) -> list[tuple[Action, tuple[Action, ...]]]:
    """Returns a round's actions as a trace names them, each once with all that it waits for."""
    rows: dict[Action, dict[Action, None]] = {}
    for step in [*schedule.steps(), schedule.closing()]:
        for action, before in step:
            rows.setdefault(_named(action), {}).update(dict.fromkeys(map(_named, before)))
    return [(action, tuple(before)) for action, before in rows.items()]


def _named(action: Action) -> Action:
    """Returns what the trace calls an action: a host's weights travel together, as stage 0's."""
    if action.kind in (SEND_WEIGHTS, RECEIVE_WEIGHTS):
        return action._replace(stage=0)
    return action


def _too_early(host: str, row: Timed, other: str, before: Timed, clocks_s: float) -> list[str]:
    """Says so if an action did not wait for another one."""
    if host == other:
        good = before.end_s <= row.start_s + SAME_CLOCK_S
        return [] if good else [f"{row.action} started before {before.action} was over"]
    good = before.start_s <= row.end_s + clocks_s
    return [] if good else [f"{row.action} was over before {before.action} began"]
