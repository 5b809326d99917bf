"""Rounds on a host: from the coordinator's release to what is stored, and what is undone of them.

Everything here runs on the host's dispatch thread unless it says otherwise.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from comms import Link, Message
from pipar_jax.config import Config, may_lose
from pipar_jax.errors import RunError
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.protocol.values import Memory
from pipar_jax.runtime import exchanges, finite, memory, undo, unit_state
from pipar_jax.runtime.alone_times import AloneTimes
from pipar_jax.runtime.completion import Completion, Work
from pipar_jax.runtime.credits import Credits
from pipar_jax.runtime.dispatch_thread import DispatchThread
from pipar_jax.runtime.executor import Executor, UnreadableError
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.runtime.metrics import Meter, Totals
from pipar_jax.runtime.recorder import Recorder
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.sample_store import Batches
from pipar_jax.runtime.share import Share
from pipar_jax.runtime.unit_state import States
from pipar_jax.runtime.update_gate import UpdateGate
from pipar_jax.schedule.actions import ALL, NO_ATTEMPT, SEND_CLIENT_MODEL, Action
from pipar_jax.schedule.dispatch import Dispatcher
from pipar_jax.schedule.plan import Order, device_name, host_index, is_device, is_node
from pipar_jax.schedule.policies import policy
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.step_feeder import StepFeeder
from stages.allocator import peak_bytes

#: Computations that may be dispatched and not over: the running one and one queued behind it.
#: With more, asynchronous dispatch would take the choice away from the policy.
IN_FLIGHT = 2

#: Takes a message of ``protocol``, and the states of units that go with it.
Reply = Callable[[Any, States], None]
#: Ends a link for what came over it: the link, and what that was.
Refuse = Callable[[Link, str], None]


class HostRounds:
    """Carries a host's part of rounds out, one after another.

    Attributes:
      completion: Waits for computations and stamps them.

    Args:
      name: The host's name.
      config: Resolved configuration.
      share: The host's share of the plan.
      thread: The host's dispatch thread.
      link_table: The host's links.
      recorder: Receives timed actions.
      reply: Takes replies; called on any of the host's threads.
      times: How long computations have to last.
      gate: Lets trained weights out.
      refuse: Ends a link for what came over it.
      batches: The device's data, if this host is a device.
      releases: What a device of a private run may send.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        share: Share,
        thread: DispatchThread,
        link_table: LinkTable,
        recorder: Recorder,
        reply: Reply,
        *,
        times: AloneTimes,
        gate: UpdateGate,
        refuse: Refuse,
        batches: Batches | None,
        releases: Releases | None,
    ) -> None:
        self._name, self._config, self._share, self._thread = name, config, share, thread
        self._refuse = refuse
        self._link_table, self._recorder, self._reply = link_table, recorder, reply
        self._times, self._gate, self._batches, self._releases = times, gate, batches, releases
        self._link_table.host = share.seat
        self._seated: tuple[int, tuple[int, ...]] = (NO_ATTEMPT - 1, ())
        self._demand: dict[int, float] = {}
        self._ledger = memory.Ledger()
        self._cut_bytes = [
            shape.dtype.itemsize * int(np.prod(shape.shape)) for shape in share.model.shapes(1)
        ]
        self._in_flight = 0
        self._round = self._attempt = NO_ATTEMPT
        self._dropped: set[int] = set()
        self._turn: tuple[int, int] | None = None
        self._back_at: int | None = None  # the step to which it has gone back, and begun nothing
        self._training = self._gives = self._whole = False
        self._meter = Meter(
            self._report_step, config.run.progress_every_s,
            lambda place, step: self._answer(messages.NonFinite("loss", place, self._round, step)),
        )  # fmt: skip
        self.completion = Completion(
            name, recorder.add, lambda action: thread.post(self._over, action), thread.fail
        )

    # --- plans --------------------------------------------------------------------------------

    def install(self) -> None:
        """Makes all that follows from the plan and from the replicas, which fit it already."""
        share, config = self._share, self._config
        plan = share.plan
        can_lose = may_lose(config.cohort, config.devices.total)
        self._undoes_turns = plan.order == Order.SEQUENTIAL and can_lose
        self._credits = Credits(self._link_table, plan.in_flight, self._cut_bytes)
        self._dispatcher = Dispatcher(policy(plan.dispatch, self._demand))
        self._feeder = StepFeeder(share.program, self._dispatcher, self._credits.demand_of)
        self._executor = Executor(
            share.program, share.replicas, self._link_table,
            model=share.model, batches=self._batches, meter=self._meter,
            record=self._recorder.add, ledger=self._ledger, duration_s=self._duration_s,
            seed=config.seed, dtype=config.model.weight_dtype, lengths=share.lengths,
            computed_size=share.sizes.of, releases=self._releases,
            holds_back=plan.sums_gradients and config.run.nonfinite == "drop",
        )  # fmt: skip
        schedule = RoundSchedule(plan, (), share.samples, config.data.batch_size)
        self._executor.start(schedule, NO_ATTEMPT, ())

    def _take_seats(self, said: messages.Release) -> None:
        """Lets a device take its place where a cohort is sampled.

        Whoever has not had the same place in the attempt before begins with a fresh optimiser.
        """
        attempt, before = self._seated
        before = before if attempt + 1 == said.attempt else ()
        self._seated = said.attempt, said.cohort
        if is_device(self._name):
            self._share.sit(device_name(said.cohort.index(host_index(self._name))))
            self._link_table.host = self._share.seat
        self.install()  # another device may take the same steps in the same place
        for (place, _), replica in self._share.replicas.items():
            if place != ALL and before[place : place + 1] != said.cohort[place : place + 1]:
                replica.renew()

    # --- what the host holds ------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Bytes of all arrays that the host holds now."""
        return self._share.fixed_bytes + self._ledger.now_bytes

    @property
    def residue(self) -> Mapping[str, int]:
        """What is left of work under way: none of it between two rounds."""
        return {
            "bytes": self._ledger.now_bytes,
            "tensors": self._executor.holds,
            "waiting actions": len(self._dispatcher.waiting()),
            "steps": len(self._feeder.under_way()),
            "reserved bytes": self._credits.reserved_bytes,
            "in flight": self._in_flight + self._credits.in_flight,
        }

    def used_memory(self) -> memory.Used:
        """Returns the most memory that it has held since it was last asked."""
        arrays = self._share.fixed_bytes + self._ledger.take_peak()
        return memory.Used(arrays, self._share.temporary_bytes, peak_bytes())

    # --- actions ------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Dispatches as many ready actions as may be in flight."""
        if not self._training:
            return
        while self._in_flight < IN_FLIGHT:
            action = self._dispatcher.next()
            if action is None:
                break
            if self._undoes_turns and self._feeder.turn != self._turn:
                self._begin_turn()
            work = (
                self._hand_on(action) if action.kind == SEND_CLIENT_MODEL else self._perform(action)
            )
            if work is None:  # nothing follows from it: its place is not over before it is dropped
                self._dispatcher.finish(action)
                continue
            self._in_flight += 1
            self.completion.put(work)
            self._feeder.dispatched(action)
        if self._feeder.finished and not self._in_flight:
            self._finish_round()

    def receive(self, message: Message) -> None:
        """Takes a tensor of another host."""
        tag = message.tag
        assert tag is not None
        if tag.attempt != self._attempt or tag.device in self._dropped:
            message.release()  # of what was given up meanwhile
            return
        complete = self._executor.receive(message)
        if complete is not None:
            self.complete(complete)

    def complete(self, action: Action) -> None:
        """Lets what waits for an action of elsewhere be ready."""
        self._dispatcher.complete(action)

    def _perform(self, action: Action) -> Work | None:
        """Dispatches an action; None if its input cannot be read, which ends the sender's link.

        What arrives is checked before it is taken; this is for a codec whose own check is wrong.
        """
        try:
            return self._executor.perform(action)
        except UnreadableError as error:
            self._refuse(error.link, error.reason)
            return None
        except (ValueError, TypeError, jax.errors.JaxRuntimeError) as error:
            raise RunError(f"{self._name}: {action} failed: {error}") from error

    def _over(self, action: Action) -> None:
        self._in_flight -= 1
        self._dispatcher.finish(action)

    def _hand_on(self, action: Action) -> Work:
        """Gives the client-side model away: weights, batch statistics and optimiser state."""
        self._gate.check_state()
        share = self._share
        wanted = exchanges.client_model(share.plan, action.device, share.model.unit_names)
        states = unit_state.held(wanted, share.replicas, {})
        said = messages.ClientModel(action.device, action.step)
        return Work(action, states, time.monotonic(), 0, 0.0, lambda: self._reply(said, states))

    def _duration_s(self, action: Action, samples: int) -> float:
        """Returns the seconds an action has to last here."""
        replica = self._executor.replica(action.device, action.stage)
        length = self._share.lengths.of(self._attempt, action.device, action.step)
        size = self._share.sizes.of(samples)
        return self._times.duration_s(replica, action.kind, size, length)

    def _report_step(self, place: int, step: int, totals: Totals) -> None:
        loss = totals.loss / totals.samples
        metrics = self._share.model.task.finish(totals.metrics)
        self._answer(messages.Progress(place, step, loss, metrics, self._round))

    # --- a round ------------------------------------------------------------------------------

    def release(self, said: messages.Release) -> None:
        """Starts a round; ``Trained`` is answered when its steps are over here."""
        share = self._share
        if self._config.cohort.size:
            self._take_seats(said)
        self._credits.forget_links()
        self._demand.update(enumerate(said.demand))
        self._times.begin()
        schedule = RoundSchedule(
            share.plan, said.spans, said.samples, self._config.data.batch_size, said.holder
        )
        self._gate.begin_round(said.round, share.replicas.values())
        if self._gate.transforms:
            self._gate.keep_start(self.trained())
        anew = (
            self._back_at is None
        )  # a round that was undone begins anew, the rest of one does not
        self._round, self._attempt = said.round, said.attempt
        self._dropped.clear()
        self._turn = self._back_at = None
        undo.begin_round(share.replicas, schedule, said.round, anew=anew)
        if self._releases is not None:
            self._releases.start_attempt(said.clip)
        self._executor.start(schedule, said.attempt, said.cohort)
        self._training = True
        firsts: dict[int, int] = {}
        for span in said.spans:
            firsts[span.device] = min(span.first, firsts.get(span.device, span.first))
        self._dispatcher.begin(firsts)
        self._feeder.start(schedule)

    def _finish_round(self) -> None:
        """Reports that this host's steps are over, with the weights if they are to be averaged."""
        self._training = False
        # Whether a user's weights are finite is a function of the user's data: such an update is 0.
        self._whole = self._gate.of_user or self._report_weights(averaged=False)
        states = self.trained()
        # Whoever gives nothing is given no average either, but for the coordinator's own host.
        self._gives = bool(states) or (
            self._share.plan.order == Order.PARALLEL and not is_node(self._name)
        )
        if self._gate.transforms:
            states = self._gate.leave(states, self._round)
        self._reply(messages.Trained(self._round), states)

    def trained(self) -> States:
        """Returns what this host gives to the average."""
        share = self._share
        wanted = exchanges.trained(share.plan, share.seat, share.model.unit_names)
        return unit_state.held(wanted, share.replicas, {})

    def commit(self, places: frozenset[int]) -> None:
        """Averages what lives together here over the places that count."""
        share = self._share
        share.leave_out(self._executor.schedule, places, self._round + 1)
        if share.averaging.stages:
            factor = self._times.factor
            self._recorder.add(share.averaging.run(self._executor.schedule, places, factor))
            if self._whole:
                self._report_weights(averaged=True)
        undo.end_round(share.replicas)
        self._back_at = None
        if not self._gives:
            self.report()

    def begin_anew(self) -> None:
        """Starts the next round from the averaged weights, once they have arrived."""
        replicas = self._share.replicas.values()
        for replica in replicas:
            replica.renew_anchor()
        jax.block_until_ready(  # type: ignore[no-untyped-call]
            [(replica.params, replica.state) for replica in replicas]
        )

    def report(self) -> None:
        """Ends the round on this host; its trace and figures go with the answer."""
        overruns, longest_s = self.completion.take()
        memory_used = Memory(*self.used_memory())
        totals = self._meter.take_round()
        sums = totals.loss, totals.samples, dict(totals.metrics)
        stored = messages.Stored(self._round, overruns, longest_s, memory_used, *sums)
        if self._releases is not None:
            self._releases.warn()
            stored = dataclasses.replace(
                stored,
                spent=self._releases.spent,
                epsilon=self._releases.epsilon,
                within=self._releases.within,
            )
        self._answer(stored)

    def _report_weights(self, *, averaged: bool) -> bool:
        """Reports non-finite weights here after a round; returns whether all are finite."""
        broken = finite.broken_units(self._share.replicas, self._dropped)
        spans = self._executor.schedule.spans
        for said in finite.weight_reports(broken, spans, self._round, averaged=averaged):
            self._answer(said)
        return not broken

    # --- what is undone -----------------------------------------------------------------------

    def _begin_turn(self) -> None:
        """Records that a device's turn begins, which may have to be undone."""
        self._turn = self._feeder.turn
        undo.begin_turn(self._share.replicas)
        # Behind what of the turn before is not over yet.
        self.completion.then(self._meter.settle)

    def drop(self, place: int, step: int) -> None:
        """Forgets what a place has here but what is being computed, and goes on without it."""
        self._dropped.add(place)
        self._dispatcher.forget(place)
        self._feeder.drop(place, step)
        if self._turn == (place, step):
            undo.undo_turn(self._share.replicas)
        self._in_flight += 1  # so that the round is not over here before _forget
        self.completion.then(lambda: self._thread.post(self._forget, place))

    def _forget(self, place: int) -> None:
        """Releases everything held for a dropped place, once none of its computations run."""
        self._in_flight -= 1
        self._executor.forget(place)
        self._meter.forget(place)
        if self._share.seat == device_name(place):
            self._training, self._back_at = False, None
            self._share.leave_out(self._executor.schedule, (), self._round + 1)
            self._answer(messages.Dropped(self._round))

    def halt(self, without: Iterable[int]) -> None:
        """Starts nothing more and takes nothing more; says so when all that was started is over."""
        self._dropped.update(without)
        self._training, self._attempt = False, NO_ATTEMPT
        self.completion.then(lambda: self._thread.post(self._halted))

    def _halted(self) -> None:
        least, step = undo.reach(self._share.replicas, self._executor.schedule, self._dropped)
        if self._back_at is not None:
            least, step = min(least, self._back_at), self._back_at
        self._answer(messages.Halted(self._round, step, max(least, 0)))

    def rewind(self, step: int) -> None:
        """Goes back to the end of a step, with nothing of later ones left."""
        undo.rewind(self._share.replicas, self._executor.schedule, self._dropped, step)
        self._meter.rewind(step)
        self._executor.forget(ALL)
        self.install()
        self._back_at = step
        self._answer(messages.Rewound(self._round, step))

    def _answer(self, message: ControlMessage) -> None:
        self._reply(message, {})
