"""Neighbours in chains may meet again under another plan, in any order of being asked to."""

from __future__ import annotations

import queue
import time
from types import SimpleNamespace

import pytest

from comms import Endpoint
from pipar_jax.errors import JoinError
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
        self.endpoint, self.met, self.lost = Endpoint(name), queue.SimpleQueue(), []
        self.meetings = 0
        self.neighbours = PeerLinks(
            hosts_of(config), config.network, name, self.endpoint,
            tensors=lambda *tensor: None, wake=lambda: None, lost=self.lost.append,
            cut=lambda peer, reason: None,
            met=self.met.put,
        )  # fmt: skip
        self.address = self.neighbours.listen()

    def meet(self, boundaries, addresses) -> None:
        self.meetings += 1
        self.neighbours.connect(self.meetings, tuple(boundaries), addresses)

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
    assert not any(node.lost for node in nodes.values())


def test_the_line_between_two_nodes_is_the_lower_ones_in_either_order(nodes):
    neighbours = nodes["n1"].neighbours
    assert neighbours.shape_of(FIRST).rate_mbps == 80  # what n1 sends up to n2
    assert neighbours.shape_of(SECOND).rate_mbps == 10  # what it sends down to n2
    assert neighbours.shape_of("d0").unlimited


def test_a_neighbour_that_does_not_come_is_named_with_what_was_refused(monkeypatch):
    """It may have sent what made it a stranger: nobody else can tell who is missing."""
    now = [0.0]
    monkeypatch.setattr(peer_links, "time", SimpleNamespace(monotonic=lambda: now[0]))
    node = test_fuzz.Node().neighbours  # has met device 0 and waits for device 1
    link = fakes.Link("d1")
    node.on_link(link)
    link.on_message(fakes.control(link, {"type": "neighbour", "boundary": ["d1", "n12", 0]}))
    assert link.ended is not None
    network = test_fuzz.config().network
    now[0] = network.join_timeout_s + network.deadline_s
    node.check()
    now[0] += 0.1
    with pytest.raises(
        JoinError, match=r"^device 1 did not connect to compute node 1 within"
    ) as told:
        node.check()
    assert "1 refused, the last: d1 asked to be a neighbour for ('d1', 'n12', 0)" in str(told.value)
    link = fakes.Link("d1")
    node.on_link(link)
    hello = registry.encode(messages.Neighbour(test_fuzz.ABOVE))
    link.on_message(fakes.control(link, hello))
    node.check()  # all are there
