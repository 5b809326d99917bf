"""An attempt at a round: what the coordinator knows of it while it goes on, and when it is over."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from pipar_jax.config.membership_script import Attempt, NodeLosses, Out
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import PeerError
from pipar_jax.roles.mail import Roll
from pipar_jax.roles.round_end import RoundEnd
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import device_name, host_index, is_device


@dataclasses.dataclass(frozen=True)
class Committed:
    """An attempt at a round that is over.

    Attributes:
      index: The round's number.
      cohort: The device in each place.
      taking: The places that took part.
      places: Those that count; none if the round was undone.
      spans: Their steps.
      hosts: The hosts that took part to the end, this process's first.
      trained: What they gave when their steps were over.
      start_s: When it began, on the monotonic clock.
      whole: Whether nothing of the round is left to be trained.
      roll: The hosts but this process's, as they were before the commit.
    """

    index: int
    cohort: tuple[int, ...]
    taking: tuple[int, ...]
    places: tuple[int, ...]
    spans: tuple[Span, ...]
    hosts: tuple[str, ...]
    trained: Mapping[str, States]
    start_s: float
    whole: bool
    roll: Roll

    def seat(self, name: str) -> str:
        """Returns what the plan calls a host: a device after its place."""
        return seat_of(self.cohort, name)


class RoundAttempt:
    """An attempt at a round that is under way.

    Attributes:
      index: The round's number.
      cohort: The device in each place.
      begun: The spans with which it began.
      spans: What of them counts so far.
      end: Decides when it is over.
      demand: Seconds per step of each place.
      samples: Samples of an epoch in each place.
      out: The places that are out of it.
      gone: Devices that went after they were chosen for it and before its release; they may be
        back.
      steps: Of all places together, the steps for which it was released last.
      failed: Places of summed gradients that the others go back for.
      broken: The step of summed gradients in which a loss was not finite, until all have gone back.
      stalled: The hosts that are late where nobody makes progress, and why they would go; None:
        some do.
      checked: The step to which all went back when nobody made progress; None: all do so far.
      short: Whether it is below its quorum, and those that are left finish it nevertheless.
      nodes: Compute nodes that take part.
      lost_nodes: Those with stages that went before the commit.
      ends: The step at which it ended early, for the loss of a node.
      trained: What hosts gave whose steps are over.
      turns_done: In sequential order, the place and first step of each turn that is over.
      start_s: When it began, on the monotonic clock.

    Args:
      index: The round's number.
      cohort: The device in each place.
      spans: The spans with which it begins.
      end: Decides when it is over.
      demand: Seconds per step of each place.
      samples: Samples of an epoch in each place.
    """

    def __init__(
        self,
        index: int,
        cohort: tuple[int, ...],
        spans: tuple[Span, ...],
        end: RoundEnd,
        demand: Sequence[float],
        samples: Sequence[int],
    ) -> None:
        self.index, self.cohort, self.spans, self.end = index, cohort, spans, end
        self.demand, self.samples = tuple(demand), tuple(samples)
        self.begun = spans
        self.out: dict[int, Out] = {}
        self.gone: list[str] = []
        self.steps = range(0)
        self.failed: list[int] = []
        self.broken: int | None = None
        self.stalled: tuple[Sequence[str], PeerError] | None = None
        self.checked: int | None = None
        self.short = False
        self.nodes: tuple[str, ...] = ()
        self.lost_nodes: list[str] = []
        self.ends: int | None = None
        self.trained: dict[str, States] = {}
        self.turns_done: set[tuple[int, int]] = set()
        self.start_s = time.monotonic()

    @property
    def places(self) -> tuple[int, ...]:
        """The places that are not out."""
        return tuple(dict.fromkeys(s.device for s in self.begun if s.device not in self.out))

    def device(self, place: int) -> str:
        """Returns the name of the device in a place."""
        return device_name(self.cohort[place])

    def place(self, name: str) -> int | None:
        """Returns the place of a device that is in the round still."""
        return next((one for one in self.places if self.device(one) == name), None)

    def dropped_event(self, place: int) -> JsonObject:
        """Returns the event that a place is out."""
        out = self.out[place]
        steps = sum(span.stop - span.first for span in self.begun if span.device == place)
        return {
            "event": "device_dropped", "device": self.cohort[place], "round": self.index,
            "step": out.step, "steps": steps, "why": out.why, "reason": _REASONS[out.why],
        }  # fmt: skip

    def script(self, places: tuple[int, ...], *, whole: bool) -> Attempt:
        """Returns what the script of the run says of the attempt.

        Args:
          places: The places that count.
          whole: Whether nothing of the round is left to be trained.
        """
        begun = tuple((span.device, span.first, span.stop) for span in self.begun)
        lost = NodeLosses(
            during=tuple(sorted({host_index(name) for name in self.lost_nodes})),
            ends=None if whole else self.ends,
        )
        return Attempt(self.index, self.cohort, begun, (), tuple(self.out.values()), places, lost)


#: Why a place is out, as it is told.
_REASONS = {
    "lost": "it was lost",
    "left": "it left",
    "late": "it was late",
    "nonfinite": "its loss or weights are not finite",
    "undone": "the round is undone",
}


def seat_of(cohort: Sequence[int], name: str) -> str:
    """Returns what the plan calls a host: a device after its place in the cohort."""
    return device_name(cohort.index(host_index(name))) if is_device(name) else name


def first_step(spans: Sequence[Span], place: int) -> int:
    """Returns the first step of a place in a round."""
    return min(span.first for span in spans if span.device == place)


def merged_turns(spans: Sequence[Span]) -> list[Span]:
    """Returns spans with those merged that follow each other on one device."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].device == span.device:
            found[-1] = found[-1]._replace(stop=span.stop)
        else:
            found.append(span)
    return found


def scripted_spans(spans: Sequence[Span], planned: Attempt, *, copies: bool) -> tuple[Span, ...]:
    """Returns spans that end where a script says that their place, or the attempt, ends.

    With copies the place trains to its end and is dropped then, so that what it leaves behind is
    the same.

    Args:
      spans: The spans of the attempt as it began.
      planned: What the script says of it.
      copies: Whether each device has its own copy of the weights.
    """
    if copies:
        return tuple(spans)
    stops = {one.place: one.step for one in planned.out}
    cut = (span._replace(stop=min(span.stop, stops.get(span.device, span.stop))) for span in spans)
    left = tuple(span for span in cut if span.stop > span.first)
    if (ends := planned.nodes.ends) is None:
        return left
    return tuple(span._replace(stop=max(span.first, ends)) for span in left)
