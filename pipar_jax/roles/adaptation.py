"""Adapting during a run: observes hosts and links, searches again, has the next plan compiled.

A thread of the coordinator periodically asks every device and compute node for the durations of
its computations and the rates of its links (``runtime/observations.py``), updates the profile
(``tuner/drift.py``), searches again if something changed (``candidates.py``), and decides
(``tuner/replanning.py``). Hosts compile the stages of a plan that is wanted while they train; once
all have, the coordinator changes to it at the end of the round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from comms import Link
from pipar_jax.config import Config
from pipar_jax.errors import RunError
from pipar_jax.profiling.predictor.online import Learner
from pipar_jax.profiling.predictor.operators import Tables
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.protocol.values import Seen
from pipar_jax.roles.candidates import Candidates
from pipar_jax.roles.holdings import odd_seen
from pipar_jax.roles.mail import Mail
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.survey import Surveyed
from pipar_jax.runtime import moves
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.priority import lower_priority
from pipar_jax.schedule.feasibility import check_adaptable
from pipar_jax.schedule.plan import COORDINATOR, Boundary, Plan, is_node
from pipar_jax.simulator.predict import StageCosts, estimate, rounds_per_epoch
from pipar_jax.tuner.drift import LinkThroughput, ProfileTracker, differ, lone
from pipar_jax.tuner.replanning import Choice, Offer
from stages import Model

#: A factor or a rate that changed by less than this share does not start a new search.
NEWS = 0.05
#: Time limit for the answers to a look, in seconds.
ANSWER_S = 10.0


class _Look(NamedTuple):
    """The result of a look at all hosts.

    Attributes:
      number: The look's number.
      plan: The plan that was in force.
      answers: The answer of each other host.
      own: The durations of the computations of the host in this process.
    """

    number: int
    plan: Plan
    answers: Mapping[str, messages.LookSeen]
    own: list[Seen]


class Adaptation:
    """Observes a run and decides which plan to change to.

    The coordinator's thread calls ``begin``, ``start_round``, ``ready``, ``changed`` and ``close``.

    Args:
      config: Resolved configuration.
      model: The whole model.
      surveyed: The survey of hosts and links.
      plan: The plan that the run begins with.
      rounds: How many rounds the run has.
      members: The devices and compute nodes.
      host: The host in this process.

    Raises:
      PlanError: The plan cannot change during a run.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        surveyed: Surveyed,
        plan: Plan,
        rounds: int,
        members: Membership,
        host: Host,
    ) -> None:
        check_adaptable(plan)
        self._config, self._host, self._rounds = config, host, rounds
        self._members = members
        self._links: Mapping[str, Link] = {n: one.link for n, one in members.by_name.items()}
        profile, self._units = surveyed.profile, len(model.units)
        self._watch = ProfileTracker(profile, learners(model, surveyed))
        self._choice = Choice(plan, config.tuner.gain)
        self._samples = [one.samples for one in profile.devices]
        self._candidates = Candidates(config, model, self._samples)
        self._lock = threading.Condition()
        self._index, self._look, self._changing = 0, 0, False
        self._answers: dict[str, messages.LookSeen] = {}
        self._numbers: dict[Plan, int] = {}
        self._compiled: dict[int, set[str]] = {}
        self._searched: tuple[float, ...] = ()
        self._best: Plan | None = None
        self._offers: tuple[Offer, Offer] | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipar-adapt", daemon=True)
        members.listeners[messages.LookSeen] = self._take_answer
        members.listeners[messages.Compiled] = self._take_compiled

    def begin(self) -> None:
        """Starts looking."""
        self._thread.start()

    def start_round(self, index: int) -> None:
        """Records that a round begins."""
        with self._lock:
            self._index = index

    def ready(self) -> Plan | None:
        """Returns the plan to change to, if one is wanted and every host has compiled it.

        Nothing is decided from then on until it is ``changed``.

        Raises:
          RunError: Looking failed.
        """
        with self._lock:
            if self._error is not None:
                raise RunError(f"adapting failed: {self._error}") from self._error
            plan = self._choice.wanted
            if plan is None or plan not in self._numbers:
                return None
            compiled = self._compiled.get(self._numbers[plan], set())
            if not compiled >= {COORDINATOR, *self._links}:
                return None
            self._changing = True
            self._look += 1  # the result of a look in progress is discarded
            return plan

    @property
    def offers(self) -> tuple[Offer, Offer] | None:
        """The predictions for the plan in force and for the wanted plan at the last look."""
        with self._lock:
            return self._offers

    def changed(self, index: int) -> None:
        """Records that the wanted plan is in force from a round on."""
        with self._lock:
            self._choice.changed(index)
            self._changing = False
            self._look += 1  # what is on its way belongs to the old plan
            self._answers.clear()
            self._offers = None

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        with self._lock:
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # --- mail; on the coordinator's thread ----------------------------------------------------

    def _take_answer(self, mail: Mail[messages.LookSeen]) -> None:
        """Records a host's answer to a look."""
        with self._lock:
            if mail.said.look != self._look:
                return
            batch_size = self._config.data.batch_size
            odd = odd_seen(mail.said, self._choice.plan, mail.source, self._samples, batch_size)
            if odd is not None:
                self._members.blame(mail.source, f"'seen' with {odd}")
                return
            self._answers[mail.source] = mail.said
            self._lock.notify_all()

    def _take_compiled(self, mail: Mail[messages.Compiled]) -> None:
        """Records that a host has compiled a plan, or refuses it."""
        number, refused = mail.said.number, mail.said.refused
        with self._lock:
            if refused is None:
                self._compiled.setdefault(number, set()).add(mail.source)
                return
            plan = next(one for one, known in self._numbers.items() if known == number)
            self._candidates.refuse(plan, refused)
            self._choice.give_up(plan)
            self._best = None

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        lower_priority()
        try:
            while not self._stop.wait(self._config.tuner.look_s):
                if (look := self._ask()) is not None:
                    self._learn(look)
                    self._consider(look.number)
        except BaseException as error:  # raised by ``ready``
            with self._lock:
                self._error = error

    def _tell(self, command: ControlMessage) -> None:
        """Sends every host a command; the coordinator's thread detects a lost link by itself."""
        for name in self._links:
            self._members.ask(name, command)

    def _ask(self) -> _Look | None:
        """Asks all hosts and returns their answers, or None if some are late."""
        with self._lock:
            if self._changing:
                return None
            self._look += 1
            look = self._look
            self._answers.clear()
        self._tell(messages.Look(look))
        deadline_s = time.monotonic() + ANSWER_S
        with self._lock:
            while len(self._answers) < len(self._links) and self._look == look:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or self._stop.is_set():
                    return None
                self._lock.wait(left_s)
            if self._look != look:
                return None
            return _Look(look, self._choice.plan, dict(self._answers), self._host.observer.take())

    def _learn(self, look: _Look) -> None:
        """Updates the profile with the answers."""
        followed = lone(look.plan)
        self._watch.computed(COORDINATOR, look.plan, look.own)
        for name, link in self._links.items():
            answer = look.answers[name]
            self._watch.computed(name, look.plan, answer.rows)
            for boundary, carried in answer.direct:
                if boundary in followed:
                    self._watch.carried(boundary, name, LinkThroughput(*carried))
            if not is_node(name):
                stats, boundary = link.stats(), Boundary(name, COORDINATOR, 0)
                up = LinkThroughput(stats.timed_in_bytes, stats.timed_in_s)
                self._watch.carried(boundary, COORDINATOR, up)
                self._watch.carried(boundary, name, LinkThroughput(*answer.timed))

    def _consider(self, look: int) -> None:
        """Searches again after a change, and decides; all hosts are told of a wanted plan."""
        profile, state = self._watch.profile(), self._watch.state()
        if self._best is None or differ(state, self._searched, NEWS):
            self._best = self._candidates.best(profile, self._choice.plan)
            self._searched = state
        stages = StageCosts(profile)
        present = Offer(self._choice.plan, estimate(stages, self._choice.plan).epoch_s)
        best = Offer(self._best, estimate(stages, self._best).epoch_s)
        wanted = self._choice.wanted
        wanted_s = None if wanted is None else estimate(stages, wanted).epoch_s
        moving = moves.moves(present.plan, best.plan, self._units)
        with self._lock:
            if self._look != look:
                return  # the plan was changed meanwhile
            if self._candidates.refused(best.plan):
                self._best = None  # meanwhile, by a node that had compiled it
                return
            wanted = self._choice.look(
                self._index, present, best, wanted_s=wanted_s,
                moving_s=moves.moving_s(profile, moving),
                epochs_left=(self._rounds - self._index - 1)
                / rounds_per_epoch(profile, present.plan),
            )  # fmt: skip
            self._offers = (present, best) if wanted is not None else None
            if wanted is None or wanted in self._numbers:
                return
            self._numbers[wanted] = number = len(self._numbers)
        self._host.prepare_ahead(number, wanted)
        self._tell(messages.CompileAhead(number, wanted))


def learners(model: Model, surveyed: Surveyed) -> dict[str, Learner]:
    """Returns the learner of each host whose times were predicted, by the host's name."""
    if not surveyed.references:
        return {}
    tables = Tables(model)
    return {
        name: Learner(model, reference, tables=tables)
        for name, reference in surveyed.references.items()
    }
