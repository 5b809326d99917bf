"""Whatever a peer sends ends that peer's part at most, by an error that names it.

Mutated messages of every registered kind, JSON that is none, tensors, tags and bundles are given to
the coordinator's side, a device's and a node's, at every point of a run. A thousand cases in `make
test`, a hundred thousand for each side in `make soak`.
"""

from __future__ import annotations

import copy
import functools
import random
import threading

import numpy as np
import pytest

from comms import PeerLost, Role, Tag
from pipar_jax.data import Loader
from pipar_jax.errors import JoinError, PeerError
from pipar_jax.methods.registry import hosts_of, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import KINDS, Form, Sender, kind_of
from pipar_jax.protocol.values import Memory
from pipar_jax.roles import admission
from pipar_jax.roles import worker as workers
from pipar_jax.roles.acceptance import Acceptance
from pipar_jax.roles.federated_evaluation import network_states
from pipar_jax.roles.holdings import Holdings, read_rows
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.roles.replies import Reply
from pipar_jax.runtime import exchanges, trace_rows
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.plan import COORDINATOR, Boundary, long_name
from stages.signature import Signature
from tests.pipar_jax.roles import fakes, generate
from tests.pipar_jax.runtime import support

SAMPLES, BATCH = (17, 14), 7
STEPS = (3, 2)
ATTEMPT = 1
CASES = 350
MANY = 100_000


@functools.cache
def network():
    """The model of every run here; its shapes are asked for again and again."""
    made = copy.copy(support.model("mlp", "float32"))
    made.__dict__["shapes"] = functools.cache(made.shapes)
    return made


@functools.cache
def loader(index):
    data = support.dataset(SAMPLES[index], index)
    return Loader(data.train, None, BATCH, seed=0, device=index)


@functools.cache
def config(method="mpsl", codec="raw"):
    made = support.config("/nowhere", SAMPLES, dtype="float32", batch=BATCH, method=method)
    made.aggregation.every = "epoch"
    made.run.nonfinite = "ignore"  # a member may say that the run has diverged
    made.pipeline.activation_codec = made.pipeline.cotangent_codec = codec
    if method == "mpsl":
        made.nodes.count, made.pipeline.cuts, made.pipeline.micro_batches = 1, "1,2", 3
    else:
        made.pipeline.cut, made.pipeline.micro_batches = 1, 1 if method == "sl" else 3
    return resolve(made)


@functools.cache
def plan(method="mpsl", codec="raw"):
    return plan_for(config(method, codec), network().unit_names)


@functools.cache
def holdings(method):
    return Holdings(network(), config(method))


def acceptance(method, host, codec="raw"):
    made = Acceptance(
        network(), plan(method, codec), host, samples=SAMPLES, batch_size=BATCH,
        lengths=StepLengths(()),
    )  # fmt: skip
    made.open([Span(device, 0, steps) for device, steps in enumerate(STEPS)], ATTEMPT, SAMPLES)
    return made


def arrays_of(held, wanted, rng):
    """The arrays of an honest bundle, or nearly."""
    found = {}
    for name, like in held.arrays(wanted).items():
        dtype = np.int32 if like.dtype.kind in "iu" else np.float32
        found[name] = np.zeros(like.shape, dtype)
    if found and rng.random() < 0.6:
        name = rng.choice(sorted(found))
        array = found.pop(name)
        group, _, rest = name.partition("/")
        other = rng.choice((None, f"{group}9/{rest}", f"1/{rest}", name + "x", rest, name))
        if other is not None:
            found[other] = array if rng.random() < 0.5 else fakes.any_array(rng)
    return found


def any_message(rng, link, sender, tensors):
    """A message that a peer of some kind might send, usually with something wrong in it."""
    way = rng.random()
    if way < 0.1:
        return fakes.control(link, {"type": rng.choice(sorted(KINDS)), "x": fakes.any_json(rng)})
    if way < 0.15:
        body = fakes.any_json(rng)
        return fakes.control(link, body if isinstance(body, dict) else {"body": body})
    if way < 0.4:
        tag, array = rng.choice(tensors)
        if rng.random() < 0.5:
            tag = fakes.any_tag(rng, tag if rng.random() < 0.8 else None)
        if rng.random() < 0.4:
            array = fakes.any_array(rng)
        codec = "bfloat16" if array.dtype == np.float32 and rng.random() < 0.2 else "raw"
        return fakes.tensor(link, tag, array, codec)
    kinds = [one for one in KINDS.values() if rng.random() < 0.05 or one.sender in
             (sender, Sender.BOTH)]  # fmt: skip
    kind = rng.choice(kinds)
    body = generate.body(kind, rng)
    if rng.random() < 0.6:
        body = generate.mutated(body, rng)
        body = body if isinstance(body, dict) else {"type": body}
    if kind.form is Form.CONTROL or (kind.form is Form.EITHER and rng.random() < 0.5):
        return fakes.control(link, body)
    name = kind.name if rng.random() < 0.9 else "another"
    return fakes.bundle(link, name, body, fakes.any_arrays(rng))


@functools.cache
def micro_batches(method, host, peer):
    """Honest tensors of a peer for a host: the first step of each device."""
    shapes, found = network().shapes(3), []
    for device, one in enumerate(plan(method).devices):
        for below, cut in enumerate(one.cuts):
            ends = plan(method).boundary(device, below)
            if {*ends[:2]} != {host, peer}:
                continue
            up = ends.upper == host
            role = Role.ACTIVATION if up else Role.COTANGENT
            place = {"device": device, "stage": below + up, "micro_batches": 3, "samples": 3,
                     "batch_samples": 7, "attempt": ATTEMPT}  # fmt: skip
            array = np.zeros(shapes[cut].shape, shapes[cut].dtype)
            found.append((Tag(role=role, **place), array))
            found.append((Tag(role=Role.LABEL, **place), np.array([0, 9, 3], np.int32)))
            found.append((Tag(role=Role.LABEL, **place), np.array([0, 9, 10], np.int32)))
    return found or [(Tag(role=Role.ACTIVATION, attempt=ATTEMPT), np.zeros((3, 64), np.float32))]


# --- the coordinator's side -------------------------------------------------------------------


class Coordinator:
    """Members, in the middle of a run, and what the coordinator does with what they say."""

    def __init__(self, method):
        self.method, self.events = method, []
        made = config(method)
        self.members = Membership(
            made, network(), tensors=lambda message: None, wake=lambda: None,
            tell=self.events.append, stop=threading.Event(),
        )  # fmt: skip
        self.links = {}
        joins = [admission.device_join(made, f"d{i}", loader(i), network()) for i in range(2)]
        if made.nodes.count:
            joins.append(admission.node_join(made, "n1", ("127.0.0.1", 7000)))
        for join in joins:
            link = self.links[join.name] = self.stranger(join.name)
            link.on_message(fakes.control(link, registry.encode(join)))
            self.members.poll()
            assert join.name in self.members.by_name, self.events
        self.members.links.acceptance = acceptance(method, COORDINATOR)

    def stranger(self, peer):
        link = fakes.Link(peer)
        self.members.links.on_link(link)
        return link

    def bundle_of(self, rng, name, link):
        """An answer with tensors, of what the host holds."""
        held, now = holdings(self.method), plan(self.method)
        kind, wanted = rng.choice(self.answers(name))
        body = {"type": kind_of(kind).name}
        if kind is messages.ClientModel:
            body |= {"device": 0, "step": 0}
        elif kind is messages.Trained:
            body |= {"round": 0}
        if wanted is None:
            rows = trace_rows.pack_rows([])
            rows["numbers"] = np.array([[rng.choice((0, 1, -1, 9, 2**40)) for _ in range(7)]])
            rows["times"] = np.array([[0.0, rng.choice((1.0, -1.0, np.nan))]])
            arrays = rows if rng.random() < 0.7 else fakes.any_arrays(rng)
        else:
            arrays = arrays_of(held, wanted(now, name), rng)
        return fakes.bundle(link, body["type"], body, arrays)

    def answers(self, name):
        names = network().unit_names
        part = (messages.ClientModel,
                lambda now, name: exchanges.client_model(now, int(name[1:]), names))  # fmt: skip
        return [
            (messages.Trained, lambda now, name: exchanges.trained(now, name, names)),
            (messages.PulledState, lambda now, name: exchanges.kept(now, name, names)),
            (messages.TraceRows, None),
            (messages.Bye, None),
            *([part] if name != "n1" else []),
        ]

    def owe(self, rng, name):
        """Asks a member for some of what there is to ask."""
        kinds = [one.made for one in KINDS.values() if one.sender is Sender.HOST]
        some = rng.sample(kinds, len(kinds) // 2)
        self.members.by_name[name].owed.add(Reply(kind) for kind in some)

    def read(self):
        """Does with all that was said what the coordinator does."""
        while not self.members.links.mail.empty():
            self.members.poll()
        for mail in self.members.early:
            if mail.message is None or mail.message.kind != "bundle":
                continue
            wanted = dict(self.answers(mail.source)).get(type(mail.said), 0)
            peer = long_name(mail.source)
            with self.members.reading(mail.source):
                if wanted is None:
                    read_rows(mail.message, [plan(self.method)], mail.source, STEPS, peer)
                elif wanted:
                    held = holdings(self.method)
                    now = wanted(plan(self.method), mail.source)
                    held.states(mail.message, now, peer)
        for name in self.links:
            self.members.early.discard(name)


def fuzz_coordinator(method, cases, seed):
    rng = random.Random(f"{method} {seed}")
    errors = 0
    side = Coordinator(method)
    for _ in range(cases):
        name = rng.choice((*side.links, "stranger"))
        stranger = name == "stranger"
        link = side.stranger("d0") if stranger else side.links[name]
        others = [one for other, one in side.links.items() if other != name]
        for _ in range(rng.choice((1, 1, 2))):
            if not stranger:
                side.owe(rng, name)
            if not stranger and rng.random() < 0.3:
                message = side.bundle_of(rng, name, link)
            else:
                tensors = micro_batches(method, COORDINATOR, name)
                message = any_message(rng, link, Sender.HOST, tensors)
            link.on_message(message)
        if rng.random() < 0.05:
            link.on_lost(PeerError("gone"))
        try:
            side.read()
        except PeerError as error:
            assert not stranger, error
            assert str(error).startswith(long_name(name)), error
            assert "\n" not in str(error) and len(str(error)) < 1500
            errors += 1
            assert not any(one.ended for one in others)
            side = Coordinator(method)
            continue
        assert not any(one.ended for one in others)
        if link.ended is not None and not stranger:
            side = Coordinator(method)
    told = [one for one in side.events if one["event"] == "refused"]
    assert len(told) <= 21
    assert errors > cases / 10


@pytest.mark.parametrize("method", ["mpsl", "pipar", "sl"])
def test_what_members_and_strangers_send_ends_their_own_part_alone(method):
    fuzz_coordinator(method, CASES // 3, 0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["mpsl", "pipar", "sl"])
def test_what_members_and_strangers_send_ends_their_own_part_alone_at_length(method):
    fuzz_coordinator(method, MANY // 3 + 1, 1)


# --- a device's or node's side ----------------------------------------------------------------


class Nothing(Exception):
    """There is no mail."""


class Device(workers.Worker):
    """A worker whose host does nothing and whose mail is read at once."""

    def _next(self):
        if (item := self.mail.get(0.0)) is None:
            raise Nothing
        return item


class Run:
    """A worker somewhere in a run."""

    def __init__(self, method, name, rng):
        self.method, self.name = method, name
        one = loader(0) if name == "d0" else None
        self.worker = Device(config(method), name, network(), one)
        self.link = fakes.Link(COORDINATOR)
        self.worker.connected(self.link)
        spans = tuple(Span(device, 0, steps) for device, steps in enumerate(STEPS))
        sequential = plan(method).order == "sequential"
        holder = 1 if sequential else None
        release = messages.Release(0, ATTEMPT, spans, (0, 1), SAMPLES, holder, (1.0, 1.0))
        course = [
            *([messages.ModelFacts(Signature.labelled((8, 8, 1), 10))] if name == "n1" else []),
            messages.SurveyEcho(),
            messages.Prepare(plan(method), SAMPLES, STEPS, "ab"),
            messages.Prepared(0.0, 0),
            release,
            messages.Trained(0),
            messages.Commit(0, (0, 1)),
            messages.Stored(0, 0, 0.0, Memory(1, 2, 3), 0.0, 0, {}),
            messages.CompileAhead(0, plan(method)),
            messages.PullState(()),
            messages.PulledState(),
        ]
        for said in course[: rng.randrange(len(course) + 1)]:
            if kind_of(type(said)).sender is Sender.HOST:
                self.worker.host.reply(said, {})
            else:
                self.link.on_message(fakes.control(self.link, registry.encode(said)))
                self.read()

    def read(self):
        try:
            self.worker.follow()
        except Nothing:
            return

    def bundle_of(self, rng):
        held, now, names = holdings(self.method), plan(self.method), network().unit_names
        said, wanted = rng.choice([
            (messages.PushState(round=0), exchanges.averaged(now, self.name, names)),
            (messages.PushState(step=0), exchanges.client_model(now, 0, names)),
            (messages.PushState(plan=now), exchanges.arriving(now, now, self.name, names)),
            (messages.Evaluate(0), network_states(names)),
            (messages.SurveyBytes(), {}),
        ])  # fmt: skip
        name = kind_of(type(said)).name
        return fakes.bundle(self.link, name, registry.encode(said), arrays_of(held, wanted, rng))


def fuzz_device(method, name, cases, seed):
    rng = random.Random(f"{method} {name} {seed}")
    done = errors = 0
    while done < cases:
        run = Run(method, name, rng)
        for _ in range(rng.randrange(1, 12)):
            done += 1
            if rng.random() < 0.3:
                message = run.bundle_of(rng)
            else:
                tensors = micro_batches(method, name, COORDINATOR)
                message = any_message(rng, run.link, Sender.COORDINATOR, tensors)
            run.link.on_message(message)
            try:
                run.read()
            except (PeerError, JoinError) as error:
                text = str(error)
                assert "the server" in text or "the coordinator" in text, text
                assert "\n" not in text or "\\n" not in text
                errors += 1
                break
            if run.link.ended is not None:
                break
    assert errors > cases / 50


@pytest.mark.parametrize(("method", "name"), [("mpsl", "d0"), ("mpsl", "n1"), ("sl", "d0")])
def test_what_a_coordinator_sends_ends_by_an_error_that_names_it(alone, method, name):
    fuzz_device(method, name, CASES // 3, 0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("method", "name"), [("mpsl", "d0"), ("mpsl", "n1"), ("sl", "d0")])
def test_what_a_coordinator_sends_ends_by_an_error_that_names_it_at_length(alone, method, name):
    fuzz_device(method, name, MANY // 3 + 1, 1)


# --- between neighbours -----------------------------------------------------------------------

BELOW, ABOVE = Boundary("d0", "n1", 0), Boundary("n1", "d1", 1)


class Node:
    """A node that has met device 0, and waits for device 1.

    Attributes:
      cuts: The links that it has reported as ended: with whom, why, and whether for what it sent.
      met: The meetings that it has answered.
      link: Device 0's.
    """

    def __init__(self):
        self.cuts, self.met = [], []
        made = acceptance("mpsl", "n1")
        setup = config("mpsl")
        self.neighbours = PeerLinks(
            hosts_of(setup), setup.network, "n1", None, wake=lambda: None, met=self.met.append,
            tensors=lambda peer, message, boundary: made.objection(peer, message, boundary),
            cut=lambda *cut: self.cuts.append(cut),
        )  # fmt: skip
        self.neighbours.connect(1, (BELOW, ABOVE), {})
        self.link = self.stranger("d0")
        hello = registry.encode(messages.Neighbour(BELOW, 1))
        self.link.on_message(fakes.control(self.link, hello))
        assert self.link.ended is None

    def stranger(self, peer):
        link = fakes.Link(peer)
        self.neighbours.on_link(link)
        return link


def fuzz_neighbours(cases, seed):
    rng = random.Random(seed)
    node, errors = Node(), 0
    for _ in range(cases):
        known = rng.random() < 0.6
        link = (
            node.link if known else node.stranger(rng.choice(("d0", "d1", "n1", "x", COORDINATOR)))
        )
        tensors = micro_batches("mpsl", "n1", "d0")
        link.on_message(any_message(rng, link, Sender.NEIGHBOUR, tensors))
        if not known:
            assert not node.cuts and node.link.ended is None
            if link.ended is None:  # it was taken for the link that was waited for
                node = Node()
            continue
        if node.cuts:
            ((peer, reason, fault),) = node.cuts
            assert peer == "d0" and fault and link.ended == reason
            # Whatever it still sends, and its end, are of no importance.
            link.on_message(any_message(rng, link, Sender.NEIGHBOUR, tensors))
            link.on_lost(PeerLost("it is gone"))
            other = node.stranger("d1")
            hello = registry.encode(messages.Neighbour(ABOVE, 1))
            other.on_message(fakes.control(other, hello))
            assert len(node.cuts) == 1 and node.neighbours.has(other) and other.ended is None
            errors, node = errors + 1, Node()
        else:
            assert link.ended is None
    assert errors > cases / 10


def test_what_neighbours_send_ends_their_own_part_alone():
    fuzz_neighbours(CASES, 0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_what_neighbours_send_ends_their_own_part_alone_at_length():
    fuzz_neighbours(MANY, 1)
