"""What a device or node does when the coordinator tells it to, once it knows the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comms import Link, Message
from pipar_jax.config import Config, HostSpec
from pipar_jax.errors import ProtocolError, RunError
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.protocol.values import Timing
from pipar_jax.roles.base_files import BaseFile
from pipar_jax.roles.course import Course
from pipar_jax.roles.federated_evaluation import LocalEvaluation
from pipar_jax.roles.host_replies import HostReplies
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.roles.rights import Rights
from pipar_jax.roles.survey_respondent import Respondent
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.state_files import StateTag
from pipar_jax.schedule.actions import RECEIVE_CLIENT_MODEL, RECEIVE_WEIGHTS
from pipar_jax.schedule.plan import COORDINATOR, HostKind, Plan, device_name, long_name
from stages import Model


class Commands:
    """Carries commands out on a host.

    Args:
      config: Resolved configuration.
      own: The host's specification.
      model: The whole model.
      host: The host.
      rights: What may arrive at it.
      course: Where the run is.
      neighbours: Its direct links.
      replies: Sends what it replies.
      tests: Scores weights on the device's own test data; None if it is not to.
      link: Returns the link to the coordinator.
      post: Posts a call to the I/O thread.
      between: Called between measurements, to detect that they are no longer wanted.
    """

    def __init__(
        self,
        config: Config,
        own: HostSpec,
        model: Model,
        host: Host,
        rights: Rights,
        course: Course,
        neighbours: PeerLinks,
        replies: HostReplies,
        tests: LocalEvaluation | None,
        *,
        link: Callable[[], Link],
        post: Callable[[Callable[[], None]], None],
        between: Callable[[], None],
    ) -> None:
        self._own, self._host, self._rights, self._course = own, host, rights, course
        self._neighbours, self._replies, self._tests = neighbours, replies, tests
        self._link, self._post = link, post
        self._survey = Respondent(config, own, model, between)
        self._base = BaseFile(config, own.name, model)
        self._seat, self._long = own.name, long_name(own.name)
        self._began = False
        self._commands: dict[type, Callable[[Any], None]] = {
            messages.SurveyProfile: lambda said: self._survey.profile(said, self._link()),
            messages.SurveyReference: lambda _: self._survey.reference(self._link()),
            messages.SurveyEcho: lambda _: self._survey.echo(self._link()),
            messages.SurveySend: lambda said: self._survey.send(said, self._link()),
            messages.Meet: self._meet,
            messages.Prepare: self._prepare,
            messages.Calibrate: lambda _: host.calibrate(),
            messages.Release: self._release,
            messages.Drop: self._drop,
            messages.Halt: lambda said: host.halt(said.without),
            messages.Rewind: lambda said: host.rewind(said.step),
            messages.Commit: lambda said: host.commit(said.places),
            messages.PullState: self._pull,
            messages.KeepState: lambda said: host.keep(StateTag(said.run, said.rounds)),
            messages.RestoreState: self._restore,
            messages.Look: self._tell_seen,
            messages.CompileAhead: self._compile_ahead,
        }
        self._bundles: dict[type, Callable[[Any, Message], None]] = {
            messages.SurveyBytes: lambda _, message: self._survey.take(message),
            messages.PushState: self._push,
            messages.Evaluate: self._evaluate,
            messages.Drop: lambda said, _: self._drop(said),
        }

    def do(self, said: ControlMessage, message: Message | None) -> None:
        """Carries a command out.

        Args:
          said: The command.
          message: The message as received, if tensors came with it.

        Raises:
          PiparError: It fails, or does not fit the plan.
        """
        if message is None:
            self._commands[type(said)](said)
        else:
            self._bundles[type(said)](said, message)

    def _meet(self, said: messages.Meet) -> None:
        self._neighbours.connect(said.number, said.boundaries, said.addresses, said.anew)

    def _prepare(self, said: messages.Prepare) -> None:
        self._replies.count_links(self._neighbours.link_table)
        self._rights.follow(self._link())
        self._base.expect(said.base)
        self._host.belong_to(said.run)
        if self._base.is_used:  # which may be large
            self._replies.send(messages.Working("compiling", 0, 0), {})
        if (reason := self._why_not_base(said.plan)) is not None:
            raise RunError(reason)
        self._host.prepare(said.plan, said.samples, said.steps)

    def _why_not_base(self, plan: Plan) -> str | None:
        """Returns why the weights that this host has read do not suit a plan, or None."""
        return self._base.why_not(plan, self._course.seat, whole=self._tests is not None)

    def _compile_ahead(self, said: messages.CompileAhead) -> None:
        self._rights.allow(self._link())
        if (reason := self._why_not_base(said.plan)) is not None:
            self._replies.send(messages.Compiled(said.number, reason), {})
            return
        self._host.prepare_ahead(said.number, said.plan)

    def _pull(self, said: messages.PullState) -> None:
        self._host.pull({(copy, unit): parts for copy, unit, parts in said.wanted})

    def _restore(self, said: messages.RestoreState) -> None:
        self._host.restore(StateTag(said.run, said.rounds), said.optimizers)

    def _release(self, said: messages.Release) -> None:
        rights = self._rights
        if self._seat != self._course.seat:
            self._seat = self._course.seat
            rights.follow(self._link())
        mine = [span for span in said.spans if device_name(span.device) == self._seat]
        if mine:
            self._replies.step = mine[-1].stop - 1
        if not self._began:
            self._began = True
            self._begin_schedule()
        self._host.release(said)
        self._post(lambda: rights.open(said))

    def _drop(self, said: messages.Drop) -> None:
        self._rights.drop(said.place)
        self._host.drop(said.place, said.step)

    def _begin_schedule(self) -> None:
        """Starts the clock of an emulated link whose rate varies."""
        up = self._own.up
        if self._own.kind is HostKind.DEVICE and up.schedule:
            self._link().set_shape(up)
        self._neighbours.begin()

    def _tell_seen(self, said: messages.Look) -> None:
        """Answers a look: what computations lasted here, and what the links brought."""
        stats = self._link().stats()
        rows = tuple(self._host.observer.take())
        timed = Timing(stats.timed_in_bytes, stats.timed_in_s)
        direct = self._neighbours.link_table.timed()
        registry.send(self._link(), messages.LookSeen(said.look, rows, timed, direct))

    def _push(self, said: messages.PushState, message: Message) -> None:
        states = self._rights.states(said, message)
        if said.plan is not None:
            self._rights.follow(self._link())
            self._replies.count_links(self._neighbours.link_table)  # there may be more
        elif said.step is not None:
            self._replies.note_arrival(RECEIVE_CLIENT_MODEL, said.step, message)
        elif said.round is not None:
            self._replies.note_arrival(RECEIVE_WEIGHTS, self._replies.step, message)
        self._host.push(said, states)

    def _evaluate(self, said: messages.Evaluate, message: Message) -> None:
        if self._tests is None:
            raise ProtocolError(
                f"{long_name(COORDINATOR)} sent {self._long} 'evaluate', but it has no test data "
                "to evaluate (run.evaluate_on)"
            )
        self._replies.send(messages.Working("evaluating", 0, 0), {})
        states = self._rights.states(said, message)
        self._replies.send(self._tests.answer(said.round, states), {})
