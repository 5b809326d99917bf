"""Who took part in each round of a run: the script that a run writes and another one replays.

A line of ``membership.jsonl`` is an attempt at a round: its cohort, the spans of steps by place,
who was out of it from which step on and why, and the places that counted. A run that replays it
asks no other device, waits for all and drops the same places, and so gives the same weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.schedule.plan import Plan

FILE = "membership.jsonl"
#: Longest line; a longer one was not written by a run.
_MOST_CHARACTERS = 16 << 20
_WHYS = ("lost", "left", "late", "nonfinite", "undone")


@dataclasses.dataclass(frozen=True)
class Out:
    """A place that is out of a round.

    Attributes:
      place: The place.
      step: Its first step that does not count.
      why: ``lost``, ``left``, ``late``, ``nonfinite``, or ``undone`` with the whole round.
    """

    place: int
    step: int
    why: str


@dataclasses.dataclass(frozen=True)
class NodeLosses:
    """What a run lost of its compute nodes in an attempt at a round, and before it.

    Attributes:
      before: The nodes lost since the commit before: index and rounds in the copies of its units.
      during: The nodes lost before the commit.
      ends: Where gradients are summed, the step at which the attempt ended because of it.
      plan: The plan from this attempt on, if it is another one; of the first attempt, the plan that
        the tuner or the chain planner has found.
    """

    before: tuple[tuple[int, int], ...] = ()
    during: tuple[int, ...] = ()
    ends: int | None = None
    plan: Plan | None = None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """An attempt at a round.

    Attributes:
      round: The round's number.
      cohort: The device in each place.
      spans: Place, first step and the step after the last, as the attempt began.
      fresh: Places whose device began without an optimiser state.
      out: Who was dropped.
      commit: The places that counted; none if the round was undone.
      nodes: What was lost of compute nodes.
    """

    round: int
    cohort: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]
    fresh: tuple[int, ...]
    out: tuple[Out, ...]
    commit: tuple[int, ...]
    nodes: NodeLosses = NodeLosses()

    def to_dict(self) -> dict[str, Any]:
        """Returns what is written as a line; nothing of nodes and plans if there is nothing new."""
        values = dataclasses.asdict(self)
        if self.nodes == NodeLosses():
            del values["nodes"]
        elif self.nodes.plan is not None:
            values["nodes"]["plan"] = self.nodes.plan.to_dict()
        return values


def read_script(path: str | Path, devices: int, places: int) -> tuple[Attempt, ...]:
    """Returns the attempts of a script, in order.

    Args:
      path: The file.
      devices: How many devices the run has.
      places: How many places a cohort has.

    Raises:
      ConfigError: It cannot be read, or does not fit the run.
    """
    what = f"cohort.script={str(path)!r}"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
    attempts: list[Attempt] = []
    for number, line in enumerate(lines, 1):
        try:
            made = _attempt(json.loads(line[:_MOST_CHARACTERS]))
            reason = _odd(made, attempts[-1] if attempts else None, devices, places)
        except (KeyError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{what}, line {number}: not an attempt at a round ({text})"
            ) from error
        if reason is not None:
            raise ConfigError(
                f"{what}, line {number}: {reason}: it must be the {FILE} of a run with the same "
                "devices and cohort.size"
            )
        attempts.append(made)
    if not attempts or not attempts[-1].commit:
        raise ConfigError(f"{what} does not end with a round that counts: its run did not finish")
    return tuple(attempts)


def read_attempts(path: Path) -> tuple[Attempt, ...]:
    """Returns the attempts that a run has written so far, without a truncated last line.

    Raises:
      OSError: The file cannot be read.
      ValueError: A line is not an attempt.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return tuple(_attempt(json.loads(line)) for line in lines)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a script of rounds: {error!r}") from error


def _attempt(values: Any) -> Attempt:
    """Returns what a line says.

    Raises:
      KeyError: A field is missing.
      TypeError: Something is not what it should be.
      ValueError: A value is not a number.
    """
    spans = tuple(_numbers(row) for row in values["spans"])
    out = tuple(
        Out(place, step, str(row["why"]))
        for row in values["out"]
        for place, step in [_numbers((row["place"], row["step"]))]
    )
    if any(len(row) != 3 for row in spans) or any(left_out.why not in _WHYS for left_out in out):
        whys = ", ".join(_WHYS)
        raise ValueError(
            f"a span is a place and two steps, and a place is out for a reason: {whys}"
        )
    return Attempt(
        _numbers([values["round"]])[0], _numbers(values["cohort"]),
        tuple((row[0], row[1], row[2]) for row in spans),
        _numbers(values["fresh"]), out, _numbers(values["commit"]),
        _node_losses(values["nodes"]) if "nodes" in values else NodeLosses(),
    )  # fmt: skip


def _node_losses(values: Any) -> NodeLosses:
    """Returns what a line says of compute nodes.

    Raises:
      KeyError: A field is missing.
      TypeError: Something is not what it should be.
      ValueError: A number is none, or the plan is none.
    """
    before = tuple((node, rounds) for row in values["before"] for node, rounds in [_numbers(row)])
    ends = None if values["ends"] is None else _numbers([values["ends"]])[0]
    try:
        plan = None if values["plan"] is None else Plan.from_dict(values["plan"])
    except PlanError as error:
        raise ValueError(str(error)) from error
    return NodeLosses(before, _numbers(values["during"]), ends, plan)


def _numbers(values: Any) -> tuple[int, ...]:
    """Returns whole numbers from 0.

    Raises:
      TypeError: Something else is among them.
    """
    for attempt in values:
        if type(attempt) is not int or attempt < 0:
            raise TypeError(f"{attempt!r:.40} is not a whole number from 0")
    return tuple(values)


def _odd(attempt: Attempt, before: Attempt | None, devices: int, places: int) -> str | None:
    """Returns why an attempt cannot be replayed, or None."""
    due = 0
    if before is not None:  # one that ended early for the loss of a node is followed by its rest
        due = before.round + (bool(before.commit) and before.nodes.ends is None)
    if attempt.round != due:
        return f"round {attempt.round}, expected {due}"
    if len(attempt.cohort) != places or len(set(attempt.cohort)) != places:
        return f"a cohort of {len(attempt.cohort)} devices, expected {places}"
    if (most := max(attempt.cohort)) >= devices:
        return f"device {most}, expected 0 to {devices - 1}"
    taking = {place for place, _, _ in attempt.spans}
    named: Sequence[int] = [*attempt.commit, *attempt.fresh, *(lost.place for lost in attempt.out)]
    if not attempt.spans or (strange := set(named) - taking):
        return f"place {min(strange) if attempt.spans else 'none'}, which takes no step"
    if any(first > stop for _, first, stop in attempt.spans) or max(taking) >= places:
        return "a span that no place can have"
    return None
