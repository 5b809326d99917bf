"""A conductor with hosts that answer as a test says: rounds without training, threads or clocks."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np

from comms import PeerClosed
from pipar_jax.methods.registry import plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import Sender
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.admission import Identity
from pipar_jax.roles.conductor import Conductor
from pipar_jax.roles.gathering import Cohort
from pipar_jax.roles.holdings import Holdings
from pipar_jax.roles.mail import Member
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.state_exchange import StateExchange
from pipar_jax.runtime import exchanges
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR, host_index, is_device
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.runtime import support

#: The steps of a round here.
FIRST, STOP = 6, 8


class _Link(fakes.Link):
    """The link of a host that answers at once."""

    def __init__(self, name, crew):
        super().__init__(name)
        self._crew = crew

    def send_control(self, body):
        super().send_control(body)
        said = registry.decode(fakes.control(self, body), Sender.COORDINATOR, "the server")
        self._crew.told(self.peer, said)

    def send_bundle(self, name, tensors, body, on_sent=None, *, codec="raw"):
        super().send_control(body)


class _Host:
    """The server's own host."""

    name = COORDINATOR

    def __init__(self, crew):
        self._crew = crew

    def release(self, said):
        self._crew.told(COORDINATOR, said)

    def halt(self, without):
        self._crew.told(COORDINATOR, messages.Halt(0, tuple(without)))

    def rewind(self, step):
        self._crew.told(COORDINATOR, messages.Rewind(0, step))

    def drop(self, place, step):
        self._crew.told(COORDINATOR, messages.Drop(0, place, step))

    def commit(self, places):
        self._crew.committed = tuple(places)


class Crew:
    """The hosts of a run, all of them there, and their conductor.

    Attributes:
      members: The coordinator's view of them.
      asked: For each host what it was told, in order.
      times: How often each kind of command was given to each host.
      trains: Returns whether a host has trained when it is told something: by default at once when
        it is released, and otherwise never.
      halted: Returns what a host says when it is halted; None: it says nothing.
      when: Called with each host and what it is told, before it answers.
      lost: The hosts that were lost, in order.
      committed: The places that were committed.
    """

    def __init__(self, folder, method, devices, *, nodes=1, progress_s=0.0, **cohort):
        name, _, weights = method.partition(" ")
        network = support.model("mlp", "float32")
        samples = (14,) * devices
        made = support.config(folder, samples, dtype="float32", method=name)
        made.aggregation.every, made.run.nonfinite = "epoch", "drop"
        made.network.progress_s = progress_s
        made.pipeline.cut, made.pipeline.micro_batches = 1, 2
        if name == "mpsl":
            made.nodes.count, made.pipeline.cuts = nodes, ",".join(map(str, range(1, nodes + 2)))
        if weights:
            made.pipeline.weights, made.pipeline.dispatch = "shared", "fixed"
        for field, value in cohort.items():
            setattr(made.cohort, field, value)
        self.config = resolve(made)
        self.plan = plan_for(self.config, network.unit_names)
        self.events, self.lost = [], []
        self.members = Membership(
            self.config, network, tensors=lambda message: None, wake=lambda: None,
            tell=self.events.append, stop=threading.Event(),
        )  # fmt: skip
        self.links = {}
        for host in self.plan.hosts():
            if host != COORDINATOR:
                self._join(host)
        self.members.links.acceptance = Acceptance(
            network, self.plan, COORDINATOR, samples=samples, batch_size=7,
            lengths=StepLengths(()),
        )  # fmt: skip
        self._names, self._holdings = network.unit_names, Holdings(network, self.config)
        host = _Host(self)
        self.conductor = Conductor(
            self.config, network.unit_names, self.plan, host, self.members,
            StateExchange(self.members, host, self._holdings),
        )  # fmt: skip
        self.conductor.nodes = self.members.hosts.nodes
        self.members.lost = self._note_lost
        self.asked, self.times = defaultdict(list), defaultdict(int)
        self.trains = lambda host, said: isinstance(said, messages.Release)
        self.halted = lambda host: messages.Halted(0, FIRST, FIRST)
        self.when = lambda host, said: None
        self.committed = None

    def conduct(self):
        """Conducts a round of all devices; returns what it came to."""
        places = tuple(range(len(self.plan.devices)))
        spans = tuple(Span(place, FIRST, STOP) for place in places)
        done, _ = self.conductor.conduct(
            Cohort(places, places, None), 0, spans, (1.0,) * len(places), (14,) * len(places)
        )
        return done

    def lose(self, *names):
        """Ends the links of some hosts, which is noticed when mail is read next."""
        for name in names:
            self.links[name].ended = "it is gone"
            self.links[name].on_lost(PeerClosed(f"{name} is gone"))

    def say(self, host, said):
        """Lets a host say something."""
        if host == COORDINATOR:
            self.members.links.local_reply(said, {})
            return
        link, body = self.links[host], registry.encode(said)
        arrays = {}
        if isinstance(said, messages.Trained):
            wanted = exchanges.trained(self.plan, host, self._names)
            arrays = {
                name: np.zeros(like.shape, like.dtype)
                for name, like in self._holdings.arrays(wanted).items()
            }
        if arrays or isinstance(said, messages.Rewound | messages.Dropped):
            link.on_message(fakes.bundle(link, body["type"], body, arrays))
        else:
            link.on_message(fakes.control(link, body))

    def told(self, host, said):
        """Answers for a host."""
        self.asked[host].append(said)
        self.times[host, type(said)] += 1
        self.when(host, said)
        if self.links.get(host) is not None and self.links[host].ended is not None:
            return
        if isinstance(said, messages.Halt) and (answer := self.halted(host)) is not None:
            self.say(host, answer)
        elif isinstance(said, messages.Rewind) and self.halted(host) is not None:
            self.say(host, messages.Rewound(said.round, said.step))
        elif isinstance(said, messages.Drop) and is_device(host) and said.place == host_index(host):
            self.say(host, messages.Dropped(said.round))
        if self.trains(host, said):
            self.say(host, messages.Trained(0))

    def _join(self, name):
        link = self.links[name] = _Link(name, self)
        self.members.links.on_link(link)
        who = Identity(name, 14, 2) if is_device(name) else Identity(name)
        self.members.by_name[name] = Member(link, who)
        self.members.links.admit(link, name)
        if is_device(name):
            self.members.population.join(who, 0.0)
            self.members.population[who.index].ready = True

    def _note_lost(self, name):
        self.lost.append(name)
        self.conductor.note_lost(name)
