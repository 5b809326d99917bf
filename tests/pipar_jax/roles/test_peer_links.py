"""Neighbours in chains may meet again under another plan, in any order of being asked to."""

from __future__ import annotations

import queue
import time
from types import SimpleNamespace

import pytest

from comms import Endpoint, FrameError, LinkShape, PeerClosed, PeerLost
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.roles import peer_links
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.schedule.plan import Boundary
from tests.patience import PATIENCE_S
from tests.pipar_jax.roles import fakes, test_fuzz
from tests.pipar_jax.runtime import support

FIRST, SECOND = Boundary("n1", "n2", 1), Boundary("n2", "n1", 1)


class Node:
    """A node's side of meeting others."""

    def __init__(self, config, name) -> None:
        self.endpoint, self.met, self.cuts = Endpoint(name), queue.SimpleQueue(), []
        self.network = config.network
        self.meetings = 0
        self.neighbours = PeerLinks(
            hosts_of(config), config.network, name, self.endpoint,
            tensors=lambda *tensor: None, wake=lambda: None,
            cut=lambda *cut: self.cuts.append(cut), met=self.met.put,
        )  # fmt: skip
        self.address = self.neighbours.listen()

    def meet(self, boundaries, addresses, anew=()) -> None:
        self.meetings += 1
        self.neighbours.connect(self.meetings, tuple(boundaries), addresses, anew)

    def has_met(self) -> bool:
        return self.met.get(timeout=PATIENCE_S) == self.meetings


@pytest.fixture
def nodes(tmp_path):
    made = support.config(tmp_path, (8,), method="accept")
    made.nodes.count, made.nodes.defaults.link = 3, "80/40"
    made.nodes.overrides = {2: {"link": "20/10"}}
    config = resolve(made, models=(made.model.name,))
    found = {name: Node(config, name) for name in ("n1", "n2", "n3")}
    yield found
    for node in found.values():
        node.neighbours.finish()
    for node in found.values():
        node.endpoint.close()


def test_links_that_are_there_stay_and_others_are_added(nodes):
    addresses = {name: node.address for name, node in nodes.items()}
    for node in nodes.values():
        node.meet([FIRST], addresses)
    assert all(node.has_met() for node in nodes.values())
    wirings = {name: node.neighbours.link_table for name, node in nodes.items()}
    kept = {name: wirings[name].link_for(FIRST) for name in ("n1", "n2")}

    # The other order of the same two, and n3 behind them; who opens a link is asked first.
    later = [SECOND, Boundary("n1", "n3", 2)]
    for name in ("n2", "n1", "n3"):
        nodes[name].meet(later, addresses)
        deadline_s = time.monotonic() + PATIENCE_S
        while name == "n2" and not nodes["n1"].neighbours._early:  # it comes before n1 is asked
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
    assert all(node.has_met() for node in nodes.values())
    assert {name: wirings[name].link_for(FIRST) for name in ("n1", "n2")} == kept
    assert wirings["n1"].link_for(SECOND) is not kept["n1"]
    assert [boundary for boundary, _ in wirings["n3"].direct()] == [later[1]]
    assert not wirings["n1"].missing((FIRST, *later))

    # Nothing is missing: all have met at once, and nobody dials again.
    for node in nodes.values():
        node.meet([FIRST, *later], addresses)
    assert all(node.has_met() for node in nodes.values())
    assert len(wirings["n1"].direct()) == 3
    assert not any(node.cuts for node in nodes.values())


def test_links_are_opened_anew_where_that_is_asked_for(nodes):
    addresses = {name: node.address for name, node in nodes.items()}
    both = [FIRST, Boundary("n1", "n3", 2)]
    for node in nodes.values():
        node.meet(both, addresses)
    assert all(node.has_met() for node in nodes.values())
    tables = {name: node.neighbours.link_table for name, node in nodes.items()}
    old = {name: tables[name].link_for(FIRST) for name in ("n1", "n2")}
    kept = {name: tables[name].link_for(both[1]) for name in ("n1", "n3")}
    for name in ("n1", "n2", "n3"):
        nodes[name].meet(both, addresses, anew=[FIRST])
    assert all(node.has_met() for node in nodes.values())
    assert {name: tables[name].link_for(both[1]) for name in kept} == kept
    for name, link in old.items():
        assert tables[name].link_for(FIRST) is not link
        assert link.wait_closed(PATIENCE_S)
    assert not tables["n1"].missing(tuple(both))
    # The other end may see the goodbye of the old link before it is told to meet anew.
    assert not nodes["n1"].cuts and not nodes["n3"].cuts


def test_a_neighbour_that_cannot_be_reached_is_reported_and_nobody_fails(nodes):
    addresses = {name: node.address for name, node in nodes.items()}
    nodes["n2"].endpoint.close()
    nodes["n1"].network.join_timeout_s = 0.5  # for which it dials
    nodes["n1"].meet([FIRST], addresses)
    ((peer, reason, fault),) = nodes["n1"].cuts
    assert (peer, fault) == ("n2", False)
    assert "compute node 1 cannot reach its neighbour" in reason
    assert nodes["n1"].met.empty()
    nodes["n1"].meet([], addresses)  # without it
    assert [nodes["n1"].met.get(timeout=PATIENCE_S) for _ in range(2)] == [1, 2]


def test_the_line_between_two_nodes_is_the_lower_ones_in_either_order(nodes):
    neighbours = nodes["n1"].neighbours
    assert neighbours.shape_of(FIRST).rate_mbps == 80  # what n1 sends up to n2
    assert neighbours.shape_of(SECOND).rate_mbps == 10  # what it sends down to n2
    assert neighbours.shape_of("d0").unlimited


def test_a_neighbour_that_does_not_come_is_named_with_what_was_refused(monkeypatch):
    """It may have sent what made it a stranger: nobody else can tell who is missing."""
    now = [0.0]
    monkeypatch.setattr(peer_links, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = test_fuzz.Node()  # has met device 0 and waits for device 1
    node, link = made.neighbours, made.stranger("d1")
    link.on_message(fakes.control(link, registry.encode(messages.Neighbour(OTHER, 1))))
    assert link.ended is not None
    network = test_fuzz.config().network
    now[0] = network.join_timeout_s + network.deadline_s
    node.check()
    assert made.cuts == []
    now[0] += 0.1
    node.check()
    ((peer, reason, fault),) = made.cuts
    assert (peer, fault) == ("d1", False)
    assert reason.startswith("device 1 did not connect to compute node 1 within")
    assert "1 refused, the last: d1 asked to be a neighbour for ('d1', 'n12', 0)" in reason
    now[0] += 1e6
    node.check()  # it was told, and the coordinator decides
    assert len(made.cuts) == 1 and made.link.ended is None
    link = hello(made, "d1", test_fuzz.ABOVE, 1)
    assert link.ended is None and made.met == [1]
    node.check()  # all are there
    assert len(made.cuts) == 1


def test_the_one_that_waits_says_so_before_it_counts_as_the_one_that_does_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(peer_links, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(test_fuzz.config("mpsl").network, "progress_s", 30.0)
    node = test_fuzz.Node()
    now[0] = 15.1
    node.neighbours.check()
    assert [peer for peer, _, _ in node.cuts] == ["d1"]


OTHER = Boundary("d1", "n12", 0)


def hello(node, peer, boundary, number):
    """Returns the link of a neighbour that has said what it is for."""
    link = node.stranger(peer)
    link.on_message(fakes.control(link, registry.encode(messages.Neighbour(boundary, number))))
    return link


@pytest.mark.parametrize(
    ("error", "fault", "reason"),
    [
        (PeerLost("its connection was cut"), False, "its connection was cut"),
        (PeerClosed("it has said goodbye"), False, "it has said goodbye"),
        (FrameError("50 bytes sent without credit"), True,
         "what breaks the channel's protocol: 50 bytes sent without credit"),
        (RuntimeError("a bug of this side"), False, "it failed"),
    ],
)  # fmt: skip
def test_a_link_that_ends_is_reported_once_however_it_ends(error, fault, reason):
    node = test_fuzz.Node()
    lost = error
    if not isinstance(error, PeerLost):
        lost = PeerLost(reason)
        lost.__cause__ = error
    node.link.on_lost(lost)
    node.link.on_lost(lost)
    assert node.cuts == [("d0", reason, fault)]
    table = node.neighbours.link_table
    assert table.missing((test_fuzz.BELOW,)) == [test_fuzz.BELOW]
    assert table.link_for(test_fuzz.BELOW) is node.link  # what is still sent is lost
    other = test_fuzz.Node()
    other.neighbours.finish()
    other.link.on_lost(lost)
    assert other.cuts == []


def test_a_schedule_begins_without_a_link_that_has_ended(monkeypatch):
    """A node's first round: its line to a device has a schedule, and the device is gone."""
    shape = LinkShape(10.0, 0.0, ((5.0, 20.0),))
    monkeypatch.setattr(PeerLinks, "shape_of", lambda self, line: shape)
    node = test_fuzz.Node()
    node.link.on_lost(PeerLost("it was cut"))
    node.neighbours.begin()
    node = test_fuzz.Node()
    node.neighbours.begin()


def test_a_link_that_is_dead_and_seems_alive_makes_room_for_the_one_that_is_opened_anew():
    """A device is lost, and back, before a node has noticed the end of its old link."""
    below, both = test_fuzz.BELOW, (test_fuzz.BELOW, test_fuzz.ABOVE)
    node = test_fuzz.Node()
    hello(node, "d1", test_fuzz.ABOVE, 1)
    assert node.met == [1]
    new = hello(node, "d0", below, 2)  # asked to the meeting before the node is
    assert new.ended is None and not node.neighbours.has(new)
    node.neighbours.connect(2, both, {}, anew=(below,))
    assert node.met == [1, 2]
    assert node.link.ended is not None and new.ended is None
    assert node.neighbours.link_table.link_for(below) is new
    node.link.on_message(fakes.control(node.link, {"type": "x"}))  # on its way when it was ended
    node.link.on_lost(PeerLost("it is dead at last"))
    assert node.cuts == [] and new.ended is None
    # Asked after it the node waits, and takes the one that was opened for this meeting alone.
    node.neighbours.connect(3, both, {}, anew=(below,))
    assert node.met == [1, 2] and new.ended is not None
    assert hello(node, "d0", below, 2).ended is not None
    last = hello(node, "d0", below, 3)
    assert last.ended is None and node.met == [1, 2, 3] and node.cuts == []


def test_nobody_takes_the_place_of_a_link_that_is_not_opened_anew():
    below, both = test_fuzz.BELOW, (test_fuzz.BELOW, test_fuzz.ABOVE)
    node = test_fuzz.Node()
    early = hello(node, "d0", below, 2)
    again = hello(node, "d0", below, 2)
    assert early.ended is not None and again.ended is None  # one waits, the last
    node.neighbours.connect(2, both, {})
    assert again.ended is not None and node.link.ended is None
    assert hello(node, "d0", below, 1).ended is not None
    assert node.neighbours.has(node.link) and node.cuts == []


def test_what_is_not_a_tensor_ends_its_own_link_alone():
    node = test_fuzz.Node()
    other = hello(node, "d1", test_fuzz.ABOVE, 1)
    node.link.on_message(fakes.control(node.link, {"type": "x"}))
    assert node.cuts == [("d0", "a control message, expected tensors", True)]
    assert node.link.ended is not None and other.ended is None
    assert node.neighbours.has(other) and not node.neighbours.has(node.link)
