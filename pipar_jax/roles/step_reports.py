"""What hosts report of their steps: progress, and numbers that are not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from pipar_jax.disk.event_log import OnEvent
from pipar_jax.errors import RunError
from pipar_jax.protocol import messages
from pipar_jax.roles.mail import Member
from pipar_jax.roles.member_links import MemberLinks
from pipar_jax.runtime import finite, moves
from pipar_jax.schedule.actions import ALL, Span
from pipar_jax.schedule.plan import COORDINATOR, Plan
from stages import Model


class StepReports:
    """Checks reports of steps against the plan, and tells what they say.

    Attributes:
      broken: Called with a report of non-finite values for which a device may be dropped; it raises
        RunError where they belong to no single one.

    Args:
      model: The whole model.
      nonfinite: What non-finite values do to a run (``run.nonfinite``).
      members: The present members by name.
      links: Their links, with the plan's rights.
      tell: Receives events.
      blame: Called with a member and what is wrong with its report.
    """

    def __init__(
        self,
        model: Model,
        nonfinite: str,
        members: Mapping[str, Member],
        links: MemberLinks,
        *,
        tell: OnEvent,
        blame: Callable[[str, str], None],
    ) -> None:
        self._model, self._nonfinite = model, nonfinite
        self._members, self._links, self._tell, self._blame = members, links, tell, blame
        self.broken: Callable[[messages.NonFinite], None] = lambda said: None
        self._round = 0
        self._plan: Plan | None = None
        self._steps: dict[int, range] = {}  # of each place that takes part

    def open(self, plan: Plan, index: int, spans: Sequence[Span]) -> None:
        """Begins an attempt at a round, or the rest of it.

        Args:
          plan: The plan in force.
          index: The round's number.
          spans: The steps of those that take part.
        """
        self._plan, self._round, self._steps = plan, index, {}
        for span in spans:
            before = self._steps.get(span.device, range(span.first, span.first))
            self._steps[span.device] = range(before.start, max(before.stop, span.stop))
        for member in self._members.values():
            member.steps.clear()
            member.broken.clear()

    def tell_working(self, host: str, what: str, done: int, of: int) -> None:
        """Reports a host's work and how much of it is done."""
        self._tell({"event": "working", "host": host, "what": what, "done": done, "of": of})

    def note_progress(self, source: str, said: messages.Progress) -> None:
        """Reports a completed step; the steps of a device must rise."""
        if source != COORDINATOR:
            if self._is_given_up(source, said):
                return
            seat = self._links.seats.get(source, source)
            steps, plan = self._members[source].steps, self._links.acceptance
            own = plan is not None and plan.tells_of(seat, said.device, said.step)
            own &= said.round == self._round and said.step in self._steps.get(said.device, ())
            own &= said.metrics.keys() == set(self._model.task.streamed)
            if not own or said.step <= steps.get(said.device, -1):
                self._blame(
                    source,
                    f"'progress' of device {said.device}, step {said.step}, which is not its own, "
                    "was reported before or has other metrics",
                )
                return
            steps[said.device] = said.step
        self._tell({"event": "progress", **dataclasses.asdict(said)})

    def _is_given_up(self, source: str, said: messages.Progress | messages.NonFinite) -> bool:
        """Returns whether a report is of a round that is over, or of a dropped place."""
        if said.round < self._round or self._members[source].owed.owes((messages.Dropped,)):
            return True
        rights, place = self._links.acceptance, said.device
        if isinstance(said, messages.NonFinite) and self._plan and self._plan.sums_gradients:
            return False  # until all have gone back, others have what follows from it
        return place is not None and rights is not None and rights.is_dropped(place)

    def note_broken(self, source: str, said: messages.NonFinite) -> None:
        """Reports non-finite values on a host, once for each device, step and kind."""
        if source != COORDINATOR:
            if self._is_given_up(source, said):
                return
            seat = self._links.seats.get(source, source)
            told, key = self._members[source].broken, (said.what, said.device, said.step)
            if not self._is_own(seat, said) or key in told:
                self._blame(source, f"'nonfinite' of device {said.device}, step {said.step}, "
                           "which is not its own or was reported before")  # fmt: skip
                return
            told.add(key)
        self.report_broken(said)

    def _is_own(self, seat: str, said: messages.NonFinite) -> bool:
        """Returns whether a host may say this: of what it has, in a step of the round."""
        rights = self._links.acceptance
        if rights is None or self._plan is None or said.round != self._round:
            return False
        places = self._steps if said.device is None else {said.device} & self._steps.keys()
        steps = [self._steps[place] for place in places]
        if said.what == "loss":  # of the device's last stage, which nobody shares
            own = said.device is not None and rights.tells_of(seat, said.device, said.step)
            return own and not said.units and any(said.step in some for some in steps)
        # What has been trained is told with its last step, which is over where none is left.
        last = any(some.start - 1 <= said.step < max(some.stop, some.start) for some in steps)
        held = _held(self._plan, self._model.unit_names, seat, said)
        return last and bool(said.units) and held.issuperset(said.units)

    def report_broken(self, said: messages.NonFinite) -> None:
        """Reports non-finite values.

        Raises:
          RunError: They end the run (``run.nonfinite=end``; with ``drop``, where they do not belong
            to a single device).
        """
        self._tell(finite.event(said))
        if self._nonfinite == "end":
            raise RunError(finite.line(said))
        if self._nonfinite == "drop":
            self.broken(said)


def _held(plan: Plan, names: Sequence[str], host: str, said: messages.NonFinite) -> frozenset[str]:
    """Returns the units of which a host may say what it says.

    Args:
      plan: The plan in force.
      names: The model's units in order.
      host: The host, as the plan calls it.
      said: Weights of a device's own copy, or without a device of the one that devices share; or
        the average of copies that live together on the host.
    """
    if said.what == "average":
        local = () if said.device is not None else plan.local_units(host, len(names))
        return frozenset(names[unit] for unit in local)
    copy = ALL if said.device is None else said.device
    holders = moves.holders(plan, len(names)).items()
    return frozenset(names[unit] for (of, unit), where in holders if (of, where) == (copy, host))
