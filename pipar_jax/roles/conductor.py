"""Conducts rounds: who is released, who has finished, who is dropped, what is committed.

A round in which nobody is lost is: release, ``Trained`` of all hosts, ``Commit``, the average, and
``Stored``. Whoever is lost, late, or not finite before the commit is dropped from it:

- With a copy of the weights for each device the others go on, and the average leaves it out.
- Where gradients are summed all hosts halt, go back to the step in which it failed, and go on
  without it.
- In sequential order its turn is undone, and the client-side model goes to the next device.

If a compute node of the chain is lost before the commit, nobody can go on: with copies the whole
round is undone, and where gradients are summed it ends with the last step that all others have
completed. The coordinator then plans without the node.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from pipar_jax.config import Config
from pipar_jax.config.membership_script import Attempt, Out
from pipar_jax.errors import PeerError, ProtocolError, RunError
from pipar_jax.protocol import messages
from pipar_jax.roles.gathering import Cohort
from pipar_jax.roles.going_back import GoingBack
from pipar_jax.roles.mail import Roll
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.population import Presence
from pipar_jax.roles.relay import Relay, undone_from
from pipar_jax.roles.replies import end_replies, reply
from pipar_jax.roles.round_attempt import (
    Committed,
    RoundAttempt,
    first_step,
    scripted_spans,
    seat_of,
)
from pipar_jax.roles.round_end import RoundEnd, Verdict
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.roles.waits import suspects
from pipar_jax.runtime import exchanges, finite
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.unit_state import Wanted
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Order,
    Plan,
    device_name,
    is_node,
    long_name,
)


class Conductor:
    """Conducts one round after another under one plan.

    Attributes:
      plan: The plan in force.
      nodes: The compute nodes that are ready, whether they have stages or not.
      clip: Norm to which updates of users are clipped in the next round; 0: as configured.
      relay: Relays the client-side model in sequential order.

    Args:
      config: Resolved configuration.
      names: The model's units in order.
      plan: The plan in force.
      host: The server host, in this process.
      members: The devices and compute nodes.
      states: How states travel.
    """

    def __init__(
        self,
        config: Config,
        names: Sequence[str],
        plan: Plan,
        host: Host,
        members: Membership,
        states: StateExchange,
    ) -> None:
        self._config, self._names, self.plan = config, names, plan
        self._host, self._members, self._states = host, members, states
        self._tell, self._traced = members.tell, config.run.trace != "none"
        self.nodes: tuple[str, ...] = ()
        self.clip = 0.0
        self.relay = Relay(names, members, states)
        self._back = GoingBack(host, members)
        self._attempt = 0
        self._round: RoundAttempt | None = None
        members.reports.broken = self._note_broken

    # --- the whole of a round -----------------------------------------------------------------

    def conduct(
        self,
        cohort: Cohort,
        index: int,
        spans: tuple[Span, ...],
        demand: Sequence[float],
        samples: Sequence[int],
    ) -> tuple[Committed, Attempt]:
        """Conducts an attempt at a round up to its commit.

        Args:
          cohort: Its devices, and what a script says of it: whoever is out there is dropped here.
          index: The round's number.
          spans: The steps of those that take part.
          demand: Seconds per step of each place.
          samples: Samples of an epoch in each place.

        Returns:
          What it came to, and what the script says of it.

        Raises:
          PeerError: Too few are left, and the run ends then (``cohort.below=end``).
          RunError: No device is left that could go on.
        """
        taking, planned, whole_spans = cohort.taking, cohort.planned, spans
        if planned is not None:
            spans = scripted_spans(spans, planned, copies=self._copies)
        end = RoundEnd(self._config.cohort, taking, time.monotonic())
        self._round = now = RoundAttempt(index, cohort.devices, spans, end, demand, samples)
        now.nodes = self.nodes
        now.ends = None if planned is None else planned.nodes.ends
        # Who was lost since the cohort was gathered, whether it is back or not.
        now.gone = [name for name in map(device_name, cohort.devices)
                    if not self._members.population.is_ready(name)]  # fmt: skip
        now.lost_nodes = [one for one in self._chain if one not in self.nodes]
        self._release(now, spans)
        if self.plan.order == Order.SEQUENTIAL:
            self.relay.run(now, self.plan, lambda place, why: self._drop(now, place, why))
        counts = self._await_trained(now, planned)
        for out in () if planned is None else planned.out:
            if out.place in now.places and self._copies:
                self._drop(now, out.place, out.why)
        hosts = self._present(now, now.places)
        left = self._counting(now, planned, whole_spans)
        places = left if counts else ()
        for place in () if counts else left:
            now.out[place] = Out(place, first_step(now.begun, place), "undone")
        self._round = None  # whoever is lost from now on has done its part
        roll = self._members.roll(hosts[1:])
        self._commit(now, places, roll)
        whole = bool(places) and (now.ends is None or now.ends >= max(s.stop for s in whole_spans))
        said = now.script(places, whole=whole)
        if planned is not None:  # it goes on as planned, and who is out has ended there already
            said = dataclasses.replace(planned, commit=places)
        # In turns all that is left of the round has been handed on, whoever gave it.
        in_turns = self.plan.order == Order.SEQUENTIAL
        counted = tuple(span for span in now.spans if in_turns or span.device in places)
        return Committed(
            index, now.cohort, taking, places, counted, hosts, now.trained, now.start_s, whole,
            roll,
        ), said  # fmt: skip

    def _counting(
        self, now: RoundAttempt, planned: Attempt | None, spans: Sequence[Span]
    ) -> tuple[int, ...]:
        """Returns the places whose parts count, in order, if the round does.

        In sequential order the part of a device that goes after its last turn has been handed on.

        Args:
          now: The round.
          planned: What a script says of it, if one is replayed.
          spans: Its steps, those as well that a script leaves out.
        """

        def over(out: Out) -> bool:
            stops = [span.stop for span in spans if span.device == out.place]
            return self.plan.order == Order.SEQUENTIAL and bool(stops) and out.step >= max(stops)

        places = {*now.places, *(out.place for out in now.out.values() if over(out))}
        if planned is not None:  # a part that stays is not in the average all the same
            places -= {out.place for out in planned.out if not over(out)}
        return tuple(sorted(places))

    @property
    def _chain(self) -> tuple[str, ...]:
        """The compute nodes that have stages."""
        return tuple(filter(is_node, self.plan.hosts()))

    @property
    def _copies(self) -> bool:
        """Whether each device has its own copy of the weights, which are averaged."""
        return self.plan.order == Order.PARALLEL and not self.plan.sums_gradients

    def _release(self, now: RoundAttempt, spans: tuple[Span, ...]) -> None:
        """Starts a round on its hosts, or the rest of it after a failed step."""
        self._attempt += 1
        firsts, stops = [span.first for span in spans], [span.stop for span in spans]
        now.steps = range(min(firsts, default=0), max(stops, default=0))
        self._members.reports.open(self.plan, now.index, spans)
        self._members.links.open(spans, self._attempt, now.samples)
        in_turns = self.plan.order == Order.SEQUENTIAL
        holder = self.relay.holder(now) if in_turns else None
        release = messages.Release(
            now.index, self._attempt, spans, now.cohort, now.samples, holder, now.demand, self.clip
        )
        self._host.release(release)
        for name in self._members.roll(self._present(now, now.places)[1:]):
            if name in now.gone:
                continue
            owed = self.relay.owed(now, name, spans) if in_turns else []
            self._members.send(name, release, *owed, reply(messages.Trained, round=now.index))
        gone, now.gone = now.gone, []
        for name in dict.fromkeys(gone):
            self.note_lost(name)

    def _present(self, now: RoundAttempt, places: Sequence[int]) -> tuple[str, ...]:
        """Returns the hosts of a round, this process's first, with the devices in some places."""
        here = self._members.by_name
        devices = (now.device(place) for place in sorted(places))
        return (COORDINATOR, *(one for one in (*now.nodes, *devices) if one in here))

    # --- waiting ------------------------------------------------------------------------------

    def _await_trained(self, now: RoundAttempt, planned: Attempt | None) -> bool:
        """Waits until the round is over; returns whether it counts."""

        def stall(late: Sequence[str], error: PeerError) -> None:
            now.stalled = late, error

        sums = self.plan.sums_gradients
        wait = self._members.waiting("trained", computing=True, expired=stall if sums else None)
        while True:
            if now.lost_nodes:
                return self._give_up(now)
            if now.failed or now.stalled:
                self._go_back(now)
            self._take_trained(now)
            now.end.done = {place for place in now.places if now.device(place) in now.trained}
            now.end.lost = set(now.out)
            waits = planned is not None or (now.short and now.places)
            verdict = self._when_all(now) if waits else now.end.verdict(time.monotonic())
            if verdict is Verdict.BELOW and not self._below(now):
                return False
            if verdict is Verdict.COMMIT:
                for place in now.places:
                    if place not in now.end.done:
                        self._drop(now, place, "late")
                if not (self._missing(now) or now.failed or now.lost_nodes):
                    return True
            if not (now.failed or now.lost_nodes):
                wait.look(self._missing(now))

    def _when_all(self, now: RoundAttempt) -> Verdict:
        """Returns what becomes of a round that waits for all, as one of a script does."""
        return Verdict.COMMIT if now.end.done == set(now.places) else Verdict.WAIT

    def _missing(self, now: RoundAttempt) -> list[str]:
        """Returns the hosts of a round whose steps are not over."""
        return [name for name in self._present(now, now.places) if name not in now.trained]

    def _take_trained(self, now: RoundAttempt) -> None:
        """Takes what hosts give whose steps are over; whoever gives what does not fit is lost."""
        for name, mail in self._members.early.take(messages.Trained, self._missing(now)).items():
            wanted: Wanted = {}
            if self.plan.order == Order.PARALLEL:
                wanted = exchanges.trained(self.plan, seat_of(now.cohort, name), self._names)
            try:
                now.trained[name] = self._states.read(mail, wanted)
            except ProtocolError:
                if name in self._members.by_name:
                    raise

    def _below(self, now: RoundAttempt) -> bool:
        """Ends the run or the attempt, since too few are left; returns whether it goes on."""
        short = (
            f"round {now.index + 1} has {len(now.end.done)} finished of {len(now.end.remaining)} "
            f"devices that are left of {len(now.end.cohort)}, and needs {now.end.needed}"
        )
        if self._config.cohort.below == "end":
            raise PeerError(
                f"{short}: lower cohort.quorum, raise cohort.deadline_s, or set cohort.below=repeat"
            )
        if not self._copies and now.places:
            now.short = True  # earlier steps and turns stay: those that are left finish the round
            return True
        if not self._copies:
            raise RunError(f"{short}: nobody is left who could go on with it")
        self._undo(now, short)
        return False

    def _undo(self, now: RoundAttempt, reason: str) -> None:
        """Undoes an attempt with copied weights: all stop, and go back to the round's start."""
        for place in now.places:
            if now.device(place) not in now.trained:
                self._drop(now, place, "undone")
        self._wait_for_rest(now)
        self._tell({"event": "round_undone", "round": now.index, "reason": reason})

    def _give_up(self, now: RoundAttempt) -> bool:
        """Ends an attempt whose chain lacks a compute node; returns whether a part of it counts."""
        names = " and ".join(map(long_name, dict.fromkeys(now.lost_nodes)))
        if not self.plan.sums_gradients:
            self._undo(now, f"{names} of the chain is gone")
            return False
        while True:  # another device may be lost meanwhile
            now.ends = self._rewind(now)
            if not (now.failed and now.places):
                break
        if not now.places:
            raise RunError(f"round {now.index + 1} lost {names} and all devices: nobody goes on")
        ends = now.ends
        self._release(now, tuple(Span(place, ends, ends) for place in now.places))
        self._wait_for_rest(now)
        for place in now.failed:
            now.out[place] = dataclasses.replace(now.out[place], step=ends)
        now.spans = tuple(span._replace(stop=min(span.stop, ends)) for span in now.spans)
        self._tell({"event": "round_cut", "round": now.index, "step": ends,
                    "reason": f"{names} of the chain is gone"})  # fmt: skip
        return True

    def _wait_for_rest(self, now: RoundAttempt) -> None:
        """Waits for all that are left."""
        wait = self._members.waiting("trained", computing=True)
        while missing := self._missing(now):
            wait.look(missing)
            self._take_trained(now)

    # --- who is out ---------------------------------------------------------------------------

    def note_lost(self, name: str) -> None:
        """Goes on without a host whose link is gone; before the commit it does not count."""
        now = self._round
        if is_node(name):
            self.nodes = tuple(one for one in self.nodes if one != name)
            if now is not None:
                # It may come back before the round is over, and is not part of it then.
                now.nodes = tuple(one for one in now.nodes if one != name)
                now.lost_nodes += [name] if name in self._chain else []
        elif now is not None and (place := now.place(name)) is not None:
            left = self._members.population[now.cohort[place]].presence is Presence.LEFT
            self._drop(now, place, "left" if left else "lost", gone=True)

    def _note_broken(self, said: messages.NonFinite) -> None:
        """Goes on without a device of which a loss or weights are not finite.

        Raises:
          RunError: They are no single device's.
        """
        now, place = self._round, said.device
        if now is not None and said.round != now.index:
            now = None  # of a round that is over
        back = None if now is None else now.broken
        if back is not None and (said.what != "loss" or said.step > back):
            return  # it follows from what all go back for
        if place is None:
            raise RunError(finite.line(said))
        if now is None:
            return
        if self.plan.sums_gradients and said.what == "loss":
            now.broken = said.step  # also if it is lost by now: the step has to be taken back
        if place in now.places:
            self._drop(now, place, "nonfinite")

    def _drop(self, now: RoundAttempt, place: int, why: str, *, gone: bool = False) -> None:
        """Removes a place from the round.

        Args:
          now: The round.
          place: The place.
          why: The reason, as the script has it.
          gone: Whether its device is gone; whoever is back under its name is not in the round.
        """
        first = first_step(now.begun, place)
        step = undone_from(now, place) if self.plan.order == Order.SEQUENTIAL else first
        now.out[place] = Out(place, step, why)
        name = now.device(place)
        now.trained.pop(name, None)
        self._tell(now.dropped_event(place))
        if self.plan.sums_gradients:
            now.failed.append(place)
            if name in self._members.by_name and not gone:
                self._stop(now, place, first)
            return
        now.spans = tuple(span for span in now.spans if span.device != place or span.stop <= step)
        self._members.links.drop_places(place)
        self._host.drop(place, step)
        for other in self._members.roll(self._present(now, now.places)[1:]):
            self._members.send(other, messages.Drop(now.index, place, step))
        if name in self._members.by_name and not gone:
            self._stop(now, place, step)

    def _stop(self, now: RoundAttempt, place: int, step: int) -> None:
        """Drops a live device from the round; it may take part again once it has stopped."""
        name = now.device(place)
        self._members.population[now.cohort[place]].ready = False
        drop, dropped = (
            messages.Drop(now.index, place, step),
            reply(messages.Dropped, round=now.index),
        )
        if self.plan.order == Order.SEQUENTIAL:  # behind the client-side model
            self._members.send_bundle(name, drop, {}, dropped)
        else:
            self._members.send(name, drop, dropped)

    def _go_back(self, now: RoundAttempt) -> None:
        """Restarts the others at the step in which a device has failed (summed gradients)."""
        stalled, now.stalled = now.stalled, None
        if not now.places:
            now.failed = []
            return
        step = self._rewind(now)
        if stalled is not None and not now.failed:
            # All have stopped when they were told, and none hangs. If that does not help, whoever
            # has given nothing goes.
            again, now.checked = now.checked == step, step
            for name in suspects(stalled[0]) if again else ():
                self._members.lose(name, stalled[1])
        if not (now.failed or now.lost_nodes):
            self._release(
                now,
                # With nothing left to do the spans are empty: hosts have trained at once.
                tuple(span._replace(first=max(span.first, step))
                      for span in now.spans if span.device not in now.out),
            )  # fmt: skip

    def _rewind(self, now: RoundAttempt) -> int:
        """Lets all that are left go back to one step, and returns it."""
        return self._back.rewind(now, lambda: self._present(now, now.places))

    # --- the commit ---------------------------------------------------------------------------

    def _commit(self, now: RoundAttempt, places: tuple[int, ...], roll: Roll) -> None:
        """Tells all hosts of a round which places of it count."""
        commit = messages.Commit(now.index, places)
        self._host.commit(places)
        for name in roll:
            # Who gives weights to the average is over with the round when it has them back.
            gives = exchanges.trained(self.plan, seat_of(now.cohort, name), self._names)
            owed = [] if gives else end_replies(now.index, traced=self._traced)
            self._members.send(name, commit, *owed)
