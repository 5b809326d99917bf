"""A host: its stages, its mailbox, one dispatch thread, one completion thread, its links.

A host is an object, so a process may hold several: tests run a whole chain in one process over
loopback. Whoever owns it (a worker or the coordinator) gives it commands, routes what
arrives on its links to it, and takes its replies. Commands are posted to its dispatch thread, which
owns its share of the plan (``share``) and its part of rounds (``host_rounds``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from comms import Link, Message
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import state_folders
from pipar_jax.config.slowdown import UNSLOWED, Slowdown
from pipar_jax.errors import RunError
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.runtime import memory, unit_state
from pipar_jax.runtime.alone_times import AloneTimes
from pipar_jax.runtime.dispatch_thread import DispatchThread
from pipar_jax.runtime.host_rounds import HostRounds, Refuse, Reply
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.runtime.observations import Observer
from pipar_jax.runtime.personal import PersonalWeights
from pipar_jax.runtime.precompile import BackgroundCompiler
from pipar_jax.runtime.recorder import Recorder
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.sample_store import Batches
from pipar_jax.runtime.share import Share
from pipar_jax.runtime.state_files import StateFiles, StateTag
from pipar_jax.runtime.unit_state import Key, UnitState, Wanted
from pipar_jax.runtime.update_gate import UpdateGate
from pipar_jax.schedule.actions import RECEIVE_CLIENT_MODEL, Action
from pipar_jax.schedule.plan import Plan, host_index
from pipar_jax.training.compile import TOLD_S, Told, now_and_then
from stages import Model


class Host:
    """Executes its share of a plan.

    Args:
      name: ``server``, or a device's or compute node's name.
      model: The whole model.
      config: The resolved configuration.
      reply: Takes replies; called on any of the host's threads, must only post.
      failed: Takes the error that ended a thread; called once, must only post.
      refuse: Ends a link for what came over it; called on the dispatch thread.
      link_table: The host's links, if they are made elsewhere.
      batches: The data, if this host is a device.
      slowness: Emulated slowness: computations last so many times their time alone.
      rematerialise: Computes forward passes again in backward passes instead of keeping residuals.
      releases: What a device of a private run may send.
      personal: A device's personal weights, if it has any.

    Attributes:
      name: Its name.
      link_table: Its links.
      recorder: Takes what was done.
      observer: Takes what computations lasted, if the run adapts.
      share: Its share of the plan; its dispatch thread's.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        config: Config,
        *,
        reply: Reply,
        failed: Callable[[BaseException], None],
        refuse: Refuse = Link.refuse,
        link_table: LinkTable | None = None,
        batches: Batches | None = None,
        slowness: Slowdown = UNSLOWED,
        rematerialise: bool = False,
        releases: Releases | None = None,
        personal: PersonalWeights | None = None,
    ) -> None:
        self.name, self._reply = name, reply
        self.link_table = link_table or LinkTable(name)
        self.observer = Observer()
        watch = self.observer.add if config.tuner.adapt else None
        self.recorder = Recorder(config.run.trace != "none", watch)
        self.share = Share(
            name, model, config,
            rematerialise=rematerialise, releases=releases, personal=personal,
        )  # fmt: skip
        self._times = AloneTimes(slowness)
        self._gate = UpdateGate(name, config, releases)
        self._thread = DispatchThread(name, failed)
        self._rounds = HostRounds(
            name, config, self.share, self._thread, self.link_table, self.recorder, reply,
            times=self._times, gate=self._gate, refuse=refuse, batches=batches, releases=releases,
        )  # fmt: skip
        self._folders = state_folders(config.name, config.run, name)
        self._files = StateFiles(name, self._folders, self._tell_kept)
        self._ahead = BackgroundCompiler(
            name, self._compile_ahead, self._tell_ahead, self._thread.fail
        )
        self._thread.start(self._rounds.dispatch)

    # --- what the owner calls, from any thread ------------------------------------------------

    def belong_to(self, run: str) -> None:
        """Notes the run that a device's personal weights belong to; those of another one go.

        Args:
          run: The run's own name, which no other run has.
        """
        if self.share.personal is not None:
            self.share.personal.belong_to(run)

    def prepare(self, plan: Plan, samples: Sequence[int], steps: Sequence[int]) -> None:
        """Builds and compiles this host's stages; answers ``prepared``.

        Fails with RunError if a compute node would need more memory than it may take.

        Args:
          plan: The run's plan.
          samples: Samples that each device trains on in an epoch.
          steps: Steps that each device takes in the whole run.
        """
        self._thread.post(self._prepare, plan, tuple(samples), tuple(steps))

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
        self._thread.post(self._pull, wanted)

    def push(self, why: messages.PushState, states: Mapping[Key, UnitState]) -> None:
        """Takes states of units from elsewhere; what it is answered by depends on why.

        Args:
          why: What they are for.
          states: The states; ``exchanges`` says which these are.
        """
        self._thread.post(self._push, why, states)

    def keep(self, tag: StateTag) -> None:
        """Writes its own states to its own disk; answers ``KeptState`` once they are there.

        Between two rounds; the next one may begin at once.

        Args:
          tag: What they belong to.
        """
        self._thread.post(self._keep, tag)

    def restore(self, tag: StateTag, optimizers: bool) -> None:
        """Goes back to states on its own disk; answers ``RestoredState``.

        Args:
          tag: What they belong to.
          optimizers: Whether optimiser states are among them; personal weights always are.
        """
        self._thread.post(self._restore, tag, optimizers)

    def calibrate(self) -> None:
        """Times compiled functions not timed yet, all else idle; answers ``calibrated``."""
        self._thread.post(self._calibrate)

    def release(self, said: messages.Release) -> None:
        """Starts a round; answers ``trained`` with the weights when its steps are over."""
        self._thread.post(self._rounds.release, said)

    def drop(self, place: int, step: int) -> None:
        """Goes on without a place, from a step on; a device whose own it is answers ``dropped``.

        Args:
          place: The place.
          step: Its first step that does not count.
        """
        self._thread.post(self._rounds.drop, place, step)

    def halt(self, without: Collection[int]) -> None:
        """Stops a round of summed gradients; answers ``halted`` once nothing is computed.

        Args:
          without: Places that are lost.
        """
        self._thread.post(self._rounds.halt, frozenset(without))

    def rewind(self, step: int) -> None:
        """Goes back, after ``halt``, to the end of the step before one; answers ``rewound``."""
        self._thread.post(self._rounds.rewind, step)

    def commit(self, places: Collection[int]) -> None:
        """Lets what some places have trained count, and nothing else.

        Averages what lives together on this host; answers ``stored`` if no weights of its own are
        averaged elsewhere, whose mean would be awaited.

        Args:
          places: The places.
        """
        self._thread.post(self._rounds.commit, frozenset(places))

    @property
    def held_bytes(self) -> int:
        """Bytes of all arrays that it holds now."""
        return self._rounds.held_bytes

    @property
    def residue(self) -> Mapping[str, int]:
        """What is left of work under way: none of it between two rounds."""
        return self._rounds.residue

    def used_memory(self) -> memory.Used:
        """Returns the most memory that it has held since it was last asked."""
        return self._rounds.used_memory()

    @property
    def actions(self) -> int:
        """How many actions are over on it: what grows while it goes on."""
        return self._rounds.completion.actions

    def on_message(self, message: Message) -> None:
        """Receives a tensor from a link; runs on the I/O thread."""
        self._thread.post(self._rounds.receive, message)

    def wake(self) -> None:
        """Looks again for ready actions, since a link has credit; runs on the I/O thread."""
        self._thread.wake()

    def close(self) -> None:
        """Ends the host's threads; what is in flight is waited for, nothing more is started."""
        self._thread.close()
        self._ahead.close()
        self._files.close()
        self._rounds.completion.close()

    # --- on the dispatch thread -----------------------------------------------------------------

    def _prepare(self, plan: Plan, samples: tuple[int, ...], steps: tuple[int, ...]) -> None:
        began = time.monotonic()
        predicted = self.share.prepare(
            plan, samples, steps,
            between=self._thread.check_stopped, told=self._working("compiling"),
        )  # fmt: skip
        self._rounds.install()
        self._gate.compile(self._rounds.trained())
        self._answer(messages.Prepared(time.monotonic() - began, predicted))

    def _calibrate(self) -> None:
        began, share = time.monotonic(), self.share
        self._times.measure(
            share.model, share.replicas.values(), share.sizes.computed,
            between=self._thread.check_stopped, told=self._working("timing"),
        )  # fmt: skip
        self._answer(messages.Calibrated(time.monotonic() - began))

    def _pull(self, wanted: Wanted) -> None:
        self._gate.check_state()
        averages = dict(self.share.averaging.units())
        states = unit_state.held(wanted, self.share.replicas, averages)
        self._reply(messages.PulledState(), unit_state.copied(states))

    def _push(self, why: messages.PushState, states: Mapping[Key, UnitState]) -> None:
        share = self.share
        if why.plan is not None:
            share.adopt(why.plan, states)
            self._rounds.install()
            self.observer.take()  # what was seen so far belongs to the old plan
        else:
            averages = dict(share.averaging.units())
            unit_state.load(states, share.replicas, averages, self.name)
            self._gate.note_given()
        if why.step is not None:
            arrived = Action(0, RECEIVE_CLIENT_MODEL, host_index(share.seat), why.step)
            self._rounds.complete(arrived)
        elif why.round is not None:
            self._rounds.begin_anew()
            self._rounds.report()
        else:
            if why.plan is None:
                self._rounds.begin_anew()
            self._answer(messages.PushedState())

    def _keep(self, tag: StateTag) -> None:
        share = self.share
        states = unit_state.held(share.own_states(), share.replicas, {})
        personal = {} if share.personal is None else share.personal.tensors()
        self._files.save(tag, unit_state.pack(unit_state.copied(states)) | personal)

    def _restore(self, tag: StateTag, optimizers: bool) -> None:
        missing = self._take_up_optimizers(tag) if optimizers else None
        rounds, personal = None, self.share.personal
        if personal is not None:
            kept = [one for folder in self._folders for one in personal.saved(folder)]
            personal.go_back(tag.rounds, [*kept, *self._files.newest(tag)])
            personal.give(self.share.replicas.values())
            rounds = personal.rounds
        self._files.leave_behind(tag)
        self._answer(messages.RestoredState(tag.rounds, missing, rounds))

    def _take_up_optimizers(self, tag: StateTag) -> str | None:
        """Takes up the optimiser states of a tag; returns why they begin fresh, or None."""
        share, wanted = self.share, self.share.own_states()
        if not wanted:
            return None
        try:
            kept = unit_state.unpack(self._files.load(tag), wanted)
            states = {  # all fit, or all begin fresh
                key: UnitState(opt=unit_state.fitted(kept[key].opt, own.opt, self.name))
                for key, own in unit_state.held(wanted, share.replicas, {}).items()
            }
        except RunError as error:
            return str(error)
        unit_state.load(states, share.replicas, {}, self.name)
        return None

    # --- on other threads of the host -----------------------------------------------------------

    def _compile_ahead(self, plan: Plan) -> str | None:
        return self.share.compile_ahead(plan, self._thread.check_stopped)

    def _tell_ahead(self, number: int, refused: str | None) -> None:
        self._answer(messages.Compiled(number, refused))

    def _tell_kept(self, tag: StateTag, reason: str | None) -> None:
        self._answer(messages.KeptState(tag.rounds, reason))

    def _working(self, what: str) -> Told:
        """Says that work begins that may take long; returns what says how far it is."""
        self._answer(messages.Working(what, 0, 0))
        return now_and_then(lambda done, of: self._answer(messages.Working(what, done, of)), TOLD_S)

    def _answer(self, message: ControlMessage) -> None:
        self._reply(message, {})
