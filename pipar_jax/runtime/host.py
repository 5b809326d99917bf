"""A host: its stages, its mailbox, one dispatch thread, one completion thread, its links.

A host is an object, so a process may hold several: tests run a whole chain in one process over
loopback. Whoever owns it (a worker or the coordinator) gives it commands, routes what
arrives on its links to it, and takes its replies. Everything below runs on the dispatch thread
unless it says otherwise; commands are posted to the mailbox.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from comms import Message
from pipar_jax.aggregation import aggregator
from pipar_jax.config import Config, may_lose
from pipar_jax.config.checkpoints import state_folders
from pipar_jax.config.slowdown import UNSLOWED, Slowdown
from pipar_jax.errors import RunError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.protocol.values import Memory
from pipar_jax.runtime import exchanges, memory, migration, undo, unit_state, update_transforms
from pipar_jax.runtime.completion import Completion, Work
from pipar_jax.runtime.executor import Executor
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.runtime.metrics import Meter, Totals
from pipar_jax.runtime.node_averaging import Averaging
from pipar_jax.runtime.observations import Observer
from pipar_jax.runtime.precompile import BackgroundCompiler, compile_plan
from pipar_jax.runtime.recorder import Recorder
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.sample_store import Batches
from pipar_jax.runtime.state_files import StateFiles, StateTag
from pipar_jax.runtime.transfer import compile_codecs
from pipar_jax.runtime.unit_state import Key, States, UnitState, Wanted
from pipar_jax.runtime.update_transforms import UpdateTransform
from pipar_jax.schedule.actions import (
    ALL,
    NO_ATTEMPT,
    RECEIVE_CLIENT_MODEL,
    SEND_CLIENT_MODEL,
    UPDATE,
    Action,
)
from pipar_jax.schedule.dispatch import CreditedLink, Demand, Dispatcher, InFlightLimit
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.host_program import HostProgram, Operation
from pipar_jax.schedule.keep import Keep
from pipar_jax.schedule.plan import (
    Boundary,
    Order,
    Plan,
    device_name,
    host_index,
    is_device,
    is_node,
)
from pipar_jax.schedule.policies import policy
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.schedule.step_feeder import StepFeeder
from pipar_jax.training import optimizer
from pipar_jax.training.compile import (  # fmt: skip
    LEAST_S,
    REPEATS,
    TOLD_S,
    Shape,
    Told,
    compile_all,
    now_and_then,
    run_all,
    units_of,
)
from pipar_jax.training.replica import Replica, Variables
from stages import Model, return_memory

#: Computations that may be dispatched and not over: the running one and one queued behind it.
#: With more, asynchronous dispatch would take the choice away from the policy.
IN_FLIGHT = 2

#: Takes a message of ``protocol``, and the states of units that go with it.
Reply = Callable[[Any, States], None]


class Host:
    """Executes its share of a plan.

    Args:
      name: ``server``, or a device's or compute node's name.
      model: The whole model.
      config: The resolved configuration.
      reply: Takes replies; called on any of the host's threads, must only post.
      failed: Takes the error that ended a thread; called once, must only post.
      link_table: The host's links, if they are made elsewhere.
      batches: The data, if this host is a device.
      slowness: Emulated slowness: computations last so many times their time alone.
      rematerialise: Computes forward passes again in backward passes instead of keeping residuals.
      releases: What a device of a private run may send.

    Attributes:
      name: Its name.
      link_table: Its links.
      recorder: Takes what was done.
      observer: Takes what computations lasted, if the run adapts.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        config: Config,
        *,
        reply: Reply,
        failed: Callable[[BaseException], None],
        link_table: LinkTable | None = None,
        batches: Batches | None = None,
        slowness: Slowdown = UNSLOWED,
        rematerialise: bool = False,
        releases: Releases | None = None,
    ) -> None:
        self.name = name
        self._releases = releases
        self._of_user = releases is not None and config.privacy.of_users
        self._given = True  # whether nothing was trained since its weights were given to it
        self._released: migration.Released | None = None
        self._transforms: Sequence[UpdateTransform] = ()
        if releases is not None:
            self._released = functools.partial(releases.stages, model)
            self._transforms = update_transforms.update_transforms(config, releases)
        self._start: Variables = {}
        # What the plan calls it: a device after its place in the cohort.
        self._seat = device_name(0) if config.cohort.size and is_device(name) else name
        self._seated: tuple[int, tuple[int, ...]] = (NO_ATTEMPT - 1, ())
        self.link_table = link_table or LinkTable(name)
        self.link_table.host = self._seat
        self.observer = Observer()
        watch = self.observer.add if config.tuner.adapt else None
        self.recorder = Recorder(config.run.trace != "none", watch)
        self._model, self._config, self._reply, self._failed = model, config, reply, failed
        self._batches, self._slowness = batches, slowness
        self._began_s: float | None = None
        self._rematerialise = rematerialise
        self._alone: dict[Shape, float] = {}
        self._replicas: dict[tuple[int, int], Replica] = {}
        self._demand: dict[int, float] = {}
        self._ledger = memory.Ledger()
        self._fixed_bytes = self._temporary_bytes = 0
        self._cut_bytes = [
            shape.dtype.itemsize * int(np.prod(shape.shape)) for shape in model.shapes(1)
        ]
        self._in_flight = 0
        self._round = self._attempt = NO_ATTEMPT
        self._dropped: set[int] = set()
        self._turn: tuple[int, int] | None = None
        self._training = self._gives = self._whole = False
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._mailbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = (
            queue.SimpleQueue()
        )
        self._meter = Meter(
            self._tell, config.run.progress_every_s,
            lambda device, step: self._tell_broken("loss", device, step),
        )  # fmt: skip
        self._completion = Completion(name, self.recorder.add, self._post_over, self._fail)
        self._files = StateFiles(
            name, state_folders(config.name, config.run, name), self._tell_kept
        )
        self._ahead = BackgroundCompiler(name, self._compile_ahead, self._tell_ahead, self._fail)
        self._thread = threading.Thread(target=self._run, name=f"pipar-host-{name}", daemon=True)
        self._thread.start()

    # --- what the owner calls, from any thread ------------------------------------------------

    def prepare(self, plan: Plan, samples: Sequence[int], steps: Sequence[int]) -> None:
        """Builds and compiles this host's stages; answers ``prepared``.

        Fails with RunError if a compute node would need more memory than it may take.

        Args:
          plan: The run's plan.
          samples: Samples that each device trains on in an epoch.
          steps: Steps that each device takes in the whole run.
        """
        self._post(self._prepare, plan, tuple(samples), tuple(steps))

    def prepare_ahead(self, number: int, plan: Plan) -> None:
        """Compiles a plan's stages while another one trains.

        Answers ``ahead`` with its number and, as ``refused``, why this host refuses it, or None.
        """
        self._ahead.put(number, plan)

    def pull(self, wanted: Wanted) -> None:
        """Answers ``PulledState`` with copies of what is wanted; between two rounds only.

        Args:
          wanted: Copies of units that it holds, and parts of their states.
        """
        self._post(self._pull, wanted)

    def push(self, why: messages.PushState, states: Mapping[Key, UnitState]) -> None:
        """Takes states of units from elsewhere; what it is answered by depends on why.

        Args:
          why: What they are for.
          states: The states; ``exchanges`` says which these are.
        """
        self._post(self._push, why, states)

    def keep(self, tag: StateTag) -> None:
        """Writes its optimiser states to its own disk; answers ``KeptState`` once they are there.

        Between two rounds; the next one may begin at once.

        Args:
          tag: What they belong to.
        """
        self._post(self._keep, tag)

    def restore(self, tag: StateTag) -> None:
        """Goes back to optimiser states on its own disk; answers ``RestoredState``.

        Args:
          tag: What they belong to.
        """
        self._post(self._restore, tag)

    def calibrate(self) -> None:
        """Times compiled functions not timed yet, all else idle; answers ``calibrated``."""
        self._post(self._calibrate)

    def release(self, said: messages.Release) -> None:
        """Starts a round; answers ``trained`` with the weights when its steps are over."""
        self._post(self._release, said)

    def drop(self, place: int, step: int) -> None:
        """Goes on without a place, from a step on; a device whose own it is answers ``dropped``.

        Args:
          place: The place.
          step: Its first step that does not count.
        """
        self._post(self._drop, place, step)

    def halt(self, without: Collection[int]) -> None:
        """Stops a round of summed gradients; answers ``halted`` once nothing is computed.

        Args:
          without: Places that are lost.
        """
        self._post(self._halt, frozenset(without))

    def rewind(self, step: int) -> None:
        """Goes back, after ``halt``, to the end of the step before one; answers ``rewound``."""
        self._post(self._rewind, step)

    def commit(self, places: Collection[int]) -> None:
        """Lets what some places have trained count, and nothing else.

        Averages what lives together on this host; answers ``stored`` if no weights of its own are
        averaged elsewhere, whose mean would be awaited.

        Args:
          places: The places.
        """
        self._post(self._commit, frozenset(places))

    @property
    def held_bytes(self) -> int:
        """Bytes of all arrays that it holds now."""
        return self._fixed_bytes + self._ledger.now_bytes

    @property
    def residue(self) -> dict[str, int]:
        """What is left of work under way: none of it between two rounds."""
        return {
            "bytes": self._ledger.now_bytes,
            "tensors": self._executor.holds,
            "waiting actions": len(self._dispatcher.waiting()),
            "steps": len(self._feeder.under_way()),
            "reserved bytes": int(sum(one.reserved_bytes for one in self._outgoing.values())),
            "in flight": self._in_flight + sum(one.in_flight for one in self._limits.values()),
        }

    def used_memory(self) -> memory.Used:
        """Returns the most memory that it has held since it was last asked."""
        arrays = self._fixed_bytes + self._ledger.take_peak()
        return memory.Used(arrays, self._temporary_bytes, memory.resident_bytes())

    @property
    def actions(self) -> int:
        """How many actions are over on it: what grows while it goes on."""
        return self._completion.actions

    def on_message(self, message: Message) -> None:
        """Receives a tensor from a link; runs on the I/O thread."""
        self._post(self._receive, message)

    def wake(self) -> None:
        """Looks again for ready actions, since a link has credit; runs on the I/O thread."""
        self._post(_nothing)

    def close(self) -> None:
        """Ends the host's threads; what is in flight is waited for, nothing more is started."""
        self._stopping.set()
        self._post(_nothing)
        self._thread.join()
        self._ahead.close()
        self._files.close()
        self._completion.close()

    # --- the thread ---------------------------------------------------------------------------

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        self._mailbox.put((function, args))

    def _post_over(self, action: Action) -> None:
        self._post(self._over, action)

    def _run(self) -> None:
        """The dispatch thread: mail first, then as many ready actions as may be in flight."""
        try:
            while not self._stopping.is_set():
                function, args = self._mailbox.get()
                function(*args)
                while not self._mailbox.empty():
                    function, args = self._mailbox.get()
                    function(*args)
                if self._training and not self._stopping.is_set():
                    self._dispatch()
        except BaseException as error:  # handed to the owner, which raises it where it is joined
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Reports the first error of any of the host's threads and stops them."""
        if self._failure is None and not self._stopping.is_set():
            self._failure = error
            self._failed(error)
        self._stopping.set()
        self._post(_nothing)

    def _dispatch(self) -> None:
        while self._in_flight < IN_FLIGHT:
            action = self._dispatcher.next()
            if action is None:
                break
            if self._undoes_turns and self._feeder.turn != self._turn:
                self._begin_turn()
            work = (
                self._hand_on(action) if action.kind == SEND_CLIENT_MODEL else self._perform(action)
            )
            self._in_flight += 1
            self._completion.put(work)
            self._feeder.dispatched(action)
        if self._feeder.finished and not self._in_flight:
            self._finish_round()

    def _perform(self, action: Action) -> Work:
        try:
            return self._executor.perform(action)
        except (ValueError, TypeError, jax.errors.JaxRuntimeError) as error:
            raise RunError(f"{self.name}: {action} failed: {error}") from error

    def _over(self, action: Action) -> None:
        self._in_flight -= 1
        self._dispatcher.finish(action)

    def _receive(self, message: Message) -> None:
        tag = message.tag
        assert tag is not None
        if tag.attempt != self._attempt or tag.device in self._dropped:
            message.release()  # of what was given up meanwhile
            return
        complete = self._executor.receive(message)
        if complete is not None:
            self._dispatcher.complete(complete)

    # --- commands -----------------------------------------------------------------------------

    def _prepare(self, plan: Plan, samples: tuple[int, ...], steps: tuple[int, ...]) -> None:
        """Builds replicas from the seed, compiles all shapes of the plan and says so."""
        began = time.monotonic()
        told = self._working("compiling")
        self._samples = samples
        need = memory.predict(self._model, plan, self._seat, self._config, samples)
        hosts = hosts_of(self._config)
        memory.check(need, None, hosts, self.name, plan)
        self._program = _program(plan, self._seat)
        # One replica takes the steps of all devices in turn, or each its own device's.
        taken = sum(steps) if plan.order == Order.SEQUENTIAL else max(steps)
        self._optimizer = optimizer.compiled(
            self._config.optimizer,
            steps=taken,
            proximal_mu=self._config.aggregation.proximal_mu,
        )
        params, state = self._model.init(self._config.seed, only=self._units(plan))
        if self._releases is not None:
            place = host_index(self._seat)
            self._releases.calibrate(plan.devices[place], steps[place])
        for device, one in enumerate(plan.devices):
            cut = migration.cut_stages(self._model, one, self._rematerialise, self._released)
            for index, stage in enumerate(cut):
                slot = self._program.replica_key(device, index)
                if plan.host(device, index) == self._seat and slot not in self._replicas:
                    keeps = self._find_keep(plan)(slot[0])
                    self._replicas[slot] = Replica(stage, params, state, self._optimizer, keeps)
        self._averaging = Averaging(
            self._config.aggregation, self._program, self._replicas, params, state
        )
        self._averaging.compile()
        del params, state
        self._install(plan)
        replicas, sizes = self._replicas.values(), self._sizes()
        compile_all(self._model, replicas, sizes, between=self._check_stopped, told=told)
        self._compile_codecs(plan, sizes)
        self._broken()
        self._weigh()
        memory.check(need, self._temporary_bytes, hosts, self.name, plan)
        return_memory()  # of compiling
        compile_s = time.monotonic() - began
        predicted = need.arrays + self._temporary_bytes
        self._answer(messages.Prepared(compile_s, predicted))

    def _weigh(self) -> None:
        """Records the replicas' memory, which is constant until the plan changes."""
        replicas = self._replicas.values()
        self._fixed_bytes = sum(one.nbytes for one in replicas) + self._averaging.nbytes
        self._temporary_bytes = memory.temporary_bytes(self._model, replicas, self._sizes())

    def _install(self, plan: Plan) -> None:
        """Makes all that follows from a plan and from the replicas, which fit it already."""
        self._plan = plan
        for replica in self._replicas.values():
            replica.expect(single=plan.has_single_micro_batches)
        can_lose = may_lose(self._config.cohort, self._config.devices.total)
        self._undoes_turns = plan.order == Order.SEQUENTIAL and can_lose
        self._outgoing: dict[Boundary, CreditedLink] = {}
        self._limits: dict[int, InFlightLimit] = {}
        self._dispatcher = Dispatcher(policy(plan.dispatch, self._demand))
        self._feeder = StepFeeder(self._program, self._dispatcher, self._demand_of)
        self._executor = Executor(
            self._program, self._replicas, self.link_table,
            model=self._model, batches=self._batches, meter=self._meter, record=self.recorder.add,
            ledger=self._ledger, duration_s=self._duration_s,
            seed=self._config.seed, dtype=self._config.model.weight_dtype,
            releases=self._releases,
        )  # fmt: skip
        self._executor.start(
            RoundSchedule(plan, (), self._samples, self._config.data.batch_size), NO_ATTEMPT, ()
        )

    def _compile_codecs(self, plan: Plan, sizes: Collection[int]) -> None:
        """Compiles the codecs of every cut at which this host meets another."""
        for device, one in enumerate(plan.devices):
            for index, cut in enumerate(one.cuts):
                ends = {plan.host(device, index), plan.host(device, index + 1)}
                if self._seat in ends and len(ends) == 2:
                    shapes = [self._model.shapes(size)[cut] for size in sizes]
                    codecs = one.codecs[index]
                    compile_codecs((codecs.activation, codecs.cotangent), shapes)

    def _compile_ahead(self, plan: Plan) -> str | None:
        """Compiles what a coming plan needs here; runs on a thread of its own."""
        sizes = _program(plan, self._seat).sizes(self._samples, self._config.data.batch_size)
        self._compile_codecs(plan, sizes)
        return compile_plan(
            self._model, plan, self._seat, self._config, self._samples, sizes, self._optimizer,
            rematerialise=self._rematerialise, releases=self._released,
            between=self._check_stopped,
        )  # fmt: skip

    def _tell_ahead(self, number: int, refused: str | None) -> None:
        self._answer(messages.Compiled(number, refused))

    def _pull(self, wanted: Wanted) -> None:
        self._check_may_tell()
        states = unit_state.held(wanted, self._replicas, dict(self._averaging.units()))
        self._reply(messages.PulledState(), unit_state.copied(states))

    def _check_may_tell(self) -> None:
        """Checks that its state may leave as it is."""
        if self._of_user:
            raise RunError(
                f"{self.name} was asked for its state, which is a function of its user's data: a "
                "private run of unit=user sends updates alone"
            )

    def _push(self, why: messages.PushState, states: Mapping[Key, UnitState]) -> None:
        if why.plan is not None:
            self._adopt(why.plan, states)
        else:
            averages = dict(self._averaging.units())
            unit_state.load(states, self._replicas, averages, self.name)
            self._given = True
        if why.step is not None:
            arrived = Action(0, RECEIVE_CLIENT_MODEL, host_index(self._seat), why.step)
            self._dispatcher.complete(arrived)
        elif why.round is not None:
            self._begin_anew()
            self._report()
        else:
            if why.plan is None:
                self._begin_anew()
            self._answer(messages.PushedState())

    def _keep(self, tag: StateTag) -> None:
        wanted = exchanges.optimizer_states(self._plan, self._seat, self._model.unit_names)
        states = unit_state.copied(unit_state.held(wanted, self._replicas, {}))
        self._files.save(tag, unit_state.pack(states))

    def _tell_kept(self, tag: StateTag, reason: str | None) -> None:
        self._answer(messages.KeptState(tag.rounds, reason))

    def _restore(self, tag: StateTag) -> None:
        wanted = exchanges.optimizer_states(self._plan, self._seat, self._model.unit_names)
        missing = None
        try:
            found = unit_state.unpack(self._files.load(tag), wanted)
            states = {  # all fit, or all begin fresh
                key: UnitState(opt=unit_state.fitted(found[key].opt, own.opt, self.name))
                for key, own in unit_state.held(wanted, self._replicas, {}).items()
            }
            unit_state.load(states, self._replicas, {}, self.name)
        except RunError as error:
            missing = str(error)
        self._answer(messages.RestoredState(tag.rounds, missing))

    def _adopt(self, plan: Plan, arrived: Mapping[Key, UnitState]) -> None:
        self._program = _program(plan, self._seat)
        averages = dict(self._averaging.units())
        self._replicas = migration.assemble(
            self._model, plan, self._seat, self._replicas, arrived, self._optimizer,
            self._find_keep(plan),
            rematerialise=self._rematerialise, releases=self._released,
        )  # fmt: skip
        for replica in self._replicas.values():  # what came from a copy may have an older anchor
            replica.renew_anchor()
        self._averaging = Averaging.after(
            self._config.aggregation, self._program, self._replicas, averages, arrived
        )
        self._install(plan)
        self._broken()
        self._weigh()
        self.observer.take()  # what was seen so far belongs to the old plan

    def _calibrate(self) -> None:
        began = time.monotonic()
        told = self._working("timing")
        known = {(shape.units, shape.samples) for shape in self._alone}
        sizes = self._sizes()
        self._alone.update(
            run_all(
                self._model,
                [
                    one
                    for one in self._replicas.values()
                    if any((units_of(one), size) not in known for size in sizes)
                ],
                sizes,
                between=self._check_stopped,
                told=told,
                repeats=REPEATS,
                least_s=LEAST_S,
                # The least, not the median: other work on this machine only ever adds to it, and
                # what is added here would be multiplied by the slowness that is emulated.
                summary=min,
            )
        )
        self._answer(messages.Calibrated(time.monotonic() - began))

    def _take_seats(self, said: messages.Release) -> None:
        """Lets a device take its place where a cohort is sampled.

        Whoever has not had the same place in the attempt before begins with a fresh optimiser.
        """
        attempt, before = self._seated
        before = before if attempt + 1 == said.attempt else ()
        self._seated = said.attempt, said.cohort
        if is_device(self.name):
            self._sit(device_name(said.cohort.index(host_index(self.name))))
        self._install(self._plan)  # another device may take the same steps in the same place
        for (place, _), replica in self._replicas.items():
            if place != ALL and before[place : place + 1] != said.cohort[place : place + 1]:
                replica.renew()

    def _sit(self, seat: str) -> None:
        """Moves to another place; places differ only in their number."""
        old, new = host_index(self._seat), host_index(seat)
        if old == new:
            return
        self._seat = self.link_table.host = seat
        for place, stage in list(self._replicas):
            if place == old:
                self._replicas[new, stage] = self._replicas.pop((place, stage))
        self._program = _program(self._plan, seat)
        self._averaging = Averaging(self._config.aggregation, self._program, self._replicas, {}, {})

    def _release(self, said: messages.Release) -> None:
        if self._config.cohort.size:
            self._take_seats(said)
        self._outgoing.clear()  # a device that came back has another link
        self._demand.update(enumerate(said.demand))
        if self._began_s is None:
            self._began_s = time.monotonic()
        schedule = RoundSchedule(
            self._plan, said.spans, said.samples, self._config.data.batch_size, said.holder
        )
        if self._of_user and not self._given:
            raise RunError(
                f"{self.name} was told to begin round {said.round} from weights that it trained in "
                "a round that was given up: its update would be sent with them, and they are a "
                "function of its user's data"
            )
        self._given = False
        if self._releases is not None:
            for replica in self._replicas.values():
                replica.clear()  # else its sum could have an example twice, and more than its clip
        if self._transforms:  # an update is what is trained from here on
            own = exchanges.trained(self._plan, self._seat, self._model.unit_names)
            states = unit_state.held(own, self._replicas, {})
            self._start = {
                unit: jax.tree.map(jax.numpy.array, dict(one.params or {}))
                for (_, unit), one in states.items()
            }
        anew, self._round, self._attempt = said.round != self._round, said.round, said.attempt
        self._dropped.clear()
        self._turn = None
        undo.begin_round(self._replicas, schedule, said.round, anew=anew)
        self._executor.start(schedule, said.attempt, said.cohort)
        self._training = True
        self._feeder.start(schedule)

    def _finish_round(self) -> None:
        """Reports that this host's steps are over, with the weights if they are to be averaged."""
        self._training = False
        # Whether a user's weights are finite is a function of the user's data: such an update is 0.
        self._whole = self._of_user or self._tell_broken_weights(averaged=False)
        wanted = exchanges.trained(self._plan, self._seat, self._model.unit_names)
        # Whoever gives nothing is given no average either, but for the coordinator's own host.
        self._gives = bool(wanted) or (
            self._plan.order == Order.PARALLEL and not is_node(self.name)
        )
        states = unit_state.held(wanted, self._replicas, {})
        if self._transforms:
            trained = {unit: dict(one.params or {}) for (_, unit), one in states.items()}
            left = update_transforms.leave(self._transforms, self._start, trained, self._round)
            states = {key: one._replace(params=left[key[1]]) for key, one in states.items()}
        self._reply(messages.Trained(self._round), states)

    def _begin_turn(self) -> None:
        """Records that a device's turn begins, which may have to be undone."""
        self._turn = self._feeder.turn
        undo.begin_turn(self._replicas)
        # Behind what of the turn before is not over yet.
        self._completion.then(self._meter.settle)

    def _drop(self, place: int, step: int) -> None:
        """Forgets what a place has here but what is being computed, and goes on without it."""
        self._dropped.add(place)
        self._dispatcher.forget(place)
        self._feeder.drop(place, step)
        if self._turn == (place, step):
            undo.undo_turn(self._replicas)
        self._in_flight += 1  # so that the round is not over here before _forget
        self._completion.then(lambda: self._post(self._forget, place))

    def _forget(self, place: int) -> None:
        """Releases everything held for a dropped place, once none of its computations run."""
        self._in_flight -= 1
        self._executor.forget(place)
        self._meter.forget(place)
        if self._seat == device_name(place):
            self._training = False
            undo.leave_out(self._replicas, self._executor.schedule, ())
            self._answer(messages.Dropped(self._round))

    def _halt(self, without: frozenset[int]) -> None:
        """Starts nothing more and takes nothing more; says so when all that was started is over."""
        self._dropped.update(without)
        self._training, self._attempt = False, NO_ATTEMPT
        self._completion.then(lambda: self._post(self._halted))

    def _halted(self) -> None:
        step = undo.next_step(self._replicas, self._executor.schedule, self._dropped)
        self._answer(messages.Halted(self._round, step))

    def _rewind(self, step: int) -> None:
        """Goes back to the end of a step, with nothing of later ones left."""
        undo.rewind(self._replicas, self._executor.schedule, self._dropped, step)
        self._meter.rewind(step)
        self._executor.forget(ALL)
        self._install(self._plan)
        self._answer(messages.Rewound(self._round, step))

    def _commit(self, places: frozenset[int]) -> None:
        """Averages what lives together here over the places that count."""
        undo.leave_out(self._replicas, self._executor.schedule, places)
        if self._averaging.stages:
            slowness = self._slowness.since(self._began_s)
            self.recorder.add(self._averaging.run(self._executor.schedule, places, slowness))
            if self._whole:
                self._tell_broken_weights(averaged=True)
        undo.end_round(self._replicas)
        if not self._gives:
            self._report()

    def _broken(self) -> dict[int, tuple[str, ...]]:
        """Returns for each device the units here that are not finite; compiles what finds them."""
        found: dict[int, tuple[str, ...]] = {}
        for (device, _), one in self._replicas.items():
            if device in self._dropped:
                continue
            units = aggregator.broken_units(one.params, one.params, one.state, one.opt_state)
            if units:
                found[device] = found.get(device, ()) + units
        return found

    def _tell_broken_weights(self, *, averaged: bool) -> bool:
        """Reports non-finite weights here after a round; returns whether all are finite."""
        broken = self._broken()
        ends = {span.device: span.stop - 1 for span in self._executor.schedule.spans}
        last = max(ends.values())
        if averaged and broken:  # all copies are the average now
            self._tell_broken("average", None, last, next(iter(broken.values())))
        elif broken:
            for device, units in broken.items():
                whose = None if device == ALL else device
                self._tell_broken("weights", whose, ends.get(device, last), units)
        return not broken

    def _tell_broken(
        self, what: str, device: int | None, step: int, units: tuple[str, ...] = ()
    ) -> None:
        """Reports non-finite values to the coordinator; any thread may call it."""
        self._answer(messages.NonFinite(what, device, self._round, step, units))

    def _begin_anew(self) -> None:
        """Starts the next round from the averaged weights, once they have arrived."""
        for replica in self._replicas.values():
            replica.renew_anchor()
        jax.block_until_ready(  # type: ignore[no-untyped-call]
            [(replica.params, replica.state) for replica in self._replicas.values()]
        )

    def _report(self) -> None:
        """Ends the round on this host; its trace and figures go with the answer."""
        overruns, longest_s = self._completion.take()
        memory_used = Memory(*self.used_memory())
        totals = self._meter.take_round()
        sums = totals.loss, totals.samples, dict(totals.metrics)
        stored = messages.Stored(self._round, overruns, longest_s, memory_used, *sums)
        if self._releases is not None:
            spent, epsilon = self._releases.spent, self._releases.epsilon
            stored = dataclasses.replace(stored, spent=spent, epsilon=epsilon)
        self._answer(stored)

    def _hand_on(self, action: Action) -> Work:
        """Gives the client-side model away: weights, batch statistics and optimiser state."""
        self._check_may_tell()
        wanted = exchanges.client_model(self._plan, action.device, self._model.unit_names)
        states = unit_state.held(wanted, self._replicas, {})
        said = messages.ClientModel(action.device, action.step)
        return Work(action, states, time.monotonic(), 0, 0.0, lambda: self._reply(said, states))

    # --- small things -------------------------------------------------------------------------

    def _units(self, plan: Plan) -> set[str]:
        """Returns the names of the units that this host has weights of."""
        names = self._model.unit_names
        return {names[unit] for unit in plan.held_units(self._seat, len(names))}

    def _find_keep(self, plan: Plan) -> Callable[[int], Keep]:
        """Returns what says of a copy what it keeps of earlier moments."""
        return functools.partial(undo.find_keep, hosts_of(self._config), self._config.cohort, plan)

    def _sizes(self) -> set[int]:
        return self._program.sizes(self._samples, self._config.data.batch_size)

    def _demand_of(self, operation: Operation, samples: int) -> Demand | None:
        """Returns the credit and the limit that an operation of a size needs."""
        limit = link = None
        nbytes = 0
        if operation.limited:
            most = self._plan.in_flight
            limit = self._limits.setdefault(operation.stage, InFlightLimit(most))
        if (boundary := operation.target) is not None:
            if boundary not in self._outgoing:
                self._outgoing[boundary] = CreditedLink(self.link_table.link_for(boundary))
            link, nbytes = self._outgoing[boundary], self._cut_bytes[operation.cut] * samples
        if limit is None and link is None:
            return None
        return Demand(link, nbytes, limit)

    def _duration_s(self, action: Action, samples: int) -> float:
        """Returns the seconds an action has to last here; 0 where no slowness is emulated."""
        if not self._slowness.emulated:
            return 0.0
        units = units_of(self._executor.replica(action.device, action.stage))
        size = 0 if action.kind == UPDATE else samples
        return self._slowness.since(self._began_s) * self._alone[Shape(units, action.kind, size)]

    def _working(self, what: str) -> Told:
        """Says that work begins that may take long; returns what says how far it is."""
        self._answer(messages.Working(what, 0, 0))
        return now_and_then(lambda done, of: self._answer(messages.Working(what, done, of)), TOLD_S)

    def _check_stopped(self) -> None:
        if self._stopping.is_set():
            raise RunError(f"{self.name} was stopped while it compiled")

    def _tell(self, device: int, step: int, totals: Totals) -> None:
        loss, metrics = totals.loss / totals.samples, self._model.task.finish(totals.metrics)
        self._answer(messages.Progress(device, step, loss, metrics, self._round))

    def _answer(self, message: ControlMessage) -> None:
        self._reply(message, {})


def _program(plan: Plan, host: str) -> HostProgram:
    """Returns what a plan means for a host.

    Raises:
      PlanError: No host of this runtime could carry the plan out.
    """
    check_executable(plan)
    return HostProgram(plan, host)


def _nothing() -> None:
    """Wakes the dispatch thread."""
