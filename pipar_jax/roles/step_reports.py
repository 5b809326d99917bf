"""What hosts report of their steps: progress, and numbers that are not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from pipar_jax.disk.event_log import OnEvent
from pipar_jax.errors import RunError
from pipar_jax.protocol import messages
from pipar_jax.roles.mail import Member
from pipar_jax.roles.member_links import MemberLinks
from pipar_jax.runtime import finite
from pipar_jax.schedule.plan import COORDINATOR
from stages import Model


class StepReports:
    """Checks reports of steps against the plan, and tells what they say.

    Attributes:
      broken: Called with a report of non-finite values for which a device may be dropped.

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

    def open(self, index: int) -> None:
        """Begins an attempt at a round."""
        self._round = index
        for member in self._members.values():
            member.steps.clear()
            member.broken.clear()

    def tell_working(self, host: str, what: str, done: int, of: int) -> None:
        """Reports a host's work and how much of it is done."""
        self._tell({"event": "working", "host": host, "what": what, "done": done, "of": of})

    def note_progress(self, source: str, said: messages.Progress) -> None:
        """Reports a completed step; the steps of a device must rise."""
        if source != COORDINATOR:
            if self._is_given_up(said.device, said.round):
                return
            seat = self._links.seats.get(source, source)
            steps, plan = self._members[source].steps, self._links.acceptance
            own = plan is not None and plan.tells_of(seat, said.device, said.step)
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

    def _is_given_up(self, place: int | None, round_: int) -> bool:
        """Returns whether a report is of a round that is over, or of a dropped place."""
        if place is None or self._links.acceptance is None:
            return round_ < self._round
        return round_ < self._round or self._links.acceptance.is_dropped(place)

    def note_broken(self, source: str, said: messages.NonFinite) -> None:
        """Reports non-finite values on a host, once for each device, step and kind."""
        if source != COORDINATOR:
            if self._is_given_up(said.device, said.round):
                return
            seat = self._links.seats.get(source, source)
            told, key = self._members[source].broken, (said.what, said.device, said.step)
            plan = self._links.acceptance
            own = plan is not None and plan.trains(seat, said.device, said.step)
            of_loss = said.what == "loss"
            own &= of_loss != bool(said.units) and not (of_loss and said.device is None)
            own &= set(said.units) <= set(self._model.unit_names)
            if not own or key in told:
                self._blame(source, f"'nonfinite' of device {said.device}, step {said.step}, "
                           "which is not its own or was reported before")  # fmt: skip
                return
            told.add(key)
        self.report_broken(said)

    def report_broken(self, said: messages.NonFinite) -> None:
        """Reports non-finite values.

        Raises:
          RunError: They end the run (``run.nonfinite=end``; with ``drop``, where they do not belong
            to a single device).
        """
        self._tell(finite.event(said))
        wanted = self._nonfinite
        if wanted == "end" or (wanted == "drop" and said.device is None):
            raise RunError(finite.line(said))
        if wanted == "drop":
            self.broken(said)
