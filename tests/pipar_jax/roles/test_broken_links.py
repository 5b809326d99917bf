"""Who goes when a link breaks between two hosts that are there, and when devices are silent."""

from __future__ import annotations

import contextlib
import types

import pytest

from experiments.benchmarks.watched import Cutter
from pipar_jax.config import CohortConfig, NetworkConfig
from pipar_jax.errors import ProtocolError
from pipar_jax.protocol.messages import NeighbourLost
from pipar_jax.roles import broken_links
from pipar_jax.roles.broken_links import BrokenLinks
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.roles.silence import Silence, silent_s
from pipar_jax.schedule.plan import Boundary
from tests.pipar_jax.roles.open_runs import OpenRun, config

DEVICES = ("d0", "d1", "d2")
HERE = (*DEVICES, "n1", "n2")
#: A chain from each device over two nodes and back: each node has four neighbours.
BOUNDARIES = (
    *(Boundary(one, "n1", 0) for one in DEVICES), Boundary("n1", "n2", 1),
    *(Boundary("n2", one, 2) for one in DEVICES),
)  # fmt: skip


def links(patience_s=0.0):
    made = BrokenLinks(patience_s)
    assert made.ask(BOUNDARIES) == BOUNDARIES
    return made


def report(made, source, peer, fault=False, here=HERE):
    said = NeighbourLost(peer, "a tensor" if fault else "it was cut", fault)
    assert made.add(source, said, here) is None


def gone(made, here=HERE):
    """Who goes, and whether they are accused of what they sent."""
    found = {name: isinstance(error, ProtocolError) for name, error in made.due(here)}
    assert not list(made.due(here))
    return found


CUT, FAULT = False, True
#: What hosts report, who goes, and whether for what it sent.
VERDICTS = {
    "a device and a node, both ends": ([("d0", "n1", CUT), ("n1", "d0", CUT)], {"d0": False}),
    "a device and a node, the node alone": ([("n1", "d0", CUT)], {"d0": False}),
    "a device and a node, the device alone": ([("d0", "n1", CUT)], {"d0": False}),
    "a node accuses a device": ([("n1", "d0", FAULT)], {"d0": True}),
    "a node accuses a device, which saw a goodbye": (
        [("d0", "n1", CUT), ("n1", "d0", FAULT)], {"d0": True}),
    "a device accuses a node": ([("d0", "n1", FAULT), ("n1", "d0", CUT)], {"d0": False}),
    "a device and a node accuse each other": (
        [("d0", "n1", FAULT), ("n1", "d0", FAULT)], {"d0": True}),
    "a device accuses both nodes": ([("d0", "n1", FAULT), ("d0", "n2", FAULT)], {"d0": False}),
    "both nodes accuse a device": ([("n1", "d0", FAULT), ("n2", "d0", FAULT)], {"d0": True}),
    "two nodes, both ends": ([("n2", "n1", CUT), ("n1", "n2", CUT)], {"n2": False}),
    "two nodes, one end alone": ([("n1", "n2", CUT)], {"n1": False}),
    "two nodes, the other alone": ([("n2", "n1", CUT)], {"n2": False}),
    "a node accuses the second": ([("n2", "n1", CUT), ("n1", "n2", FAULT)], {"n2": True}),
    "a node accuses the first": ([("n2", "n1", FAULT), ("n1", "n2", CUT)], {"n1": True}),
    "two nodes accuse each other": ([("n2", "n1", FAULT), ("n1", "n2", FAULT)], {"n2": True}),
    "half of a node's neighbours": (
        [("d0", "n1", CUT), ("d1", "n1", CUT)], {"d0": False, "d1": False}),
    "most of a node's neighbours": ([(one, "n1", CUT) for one in DEVICES], {"n1": False}),
    "most of a node's neighbours accuse it": (
        [(one, "n1", FAULT) for one in DEVICES], {"n1": False}),
    "a node reports most of its neighbours": (
        [("n1", one, CUT) for one in DEVICES], {"n1": False}),
    "a node accuses most of its neighbours": (
        [("n1", one, FAULT) for one in DEVICES], {"n1": False}),
    "the first node has lost devices and the second": (
        [("d0", "n1", CUT), ("d1", "n1", CUT), ("n2", "n1", CUT), ("n1", "n2", CUT)],
        {"n1": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
@pytest.mark.parametrize("order", [1, -1])
def test_who_goes_does_not_depend_on_who_spoke_first(case, order):
    made = links()
    reports, expected = VERDICTS[case]
    for source, peer, fault in reports[::order]:
        report(made, source, peer, fault)
    assert gone(made) == expected


def test_the_reason_names_both_ends_and_what_was_sent():
    made = links()
    report(made, "d0", "n1")
    report(made, "n1", "d0", FAULT)
    ((_, error),) = made.due(HERE)
    assert str(error) == "device 0 sent compute node 1 a tensor"
    report(made, "d1", "n1", FAULT)
    ((_, error),) = made.due(HERE)
    assert str(error) == (
        "the link between device 1 and compute node 1 has ended, although both are there: a tensor"
    )
    report(made, "d2", "n1")
    ((name, error),) = made.due(HERE)
    assert name == "n1" and "to 3 of its 4 neighbours (device 0, device 1, device 2)" in str(error)


@pytest.mark.parametrize("fault", [CUT, FAULT])
def test_a_node_that_lies_about_one_neighbour_after_another_goes_after_half_of_them(fault):
    made = links()
    for victim in ("d0", "d0", "d1", "d0", "d1"):  # whoever is back is no other neighbour
        report(made, "n1", victim, fault)
        assert gone(made) == {victim: fault}
        assert made.ask(BOUNDARIES) == tuple(one for one in BOUNDARIES if victim in one[:2])
    report(made, "n1", "d2", fault)
    assert gone(made) == {"n1": False}
    made.ask(BOUNDARIES)
    report(made, "n1", "d2", fault)  # nor has it a clean record when it is back
    assert gone(made) == {"n1": False}


def test_a_device_that_lies_goes_itself_and_no_node_is_blamed():
    made = links()
    for node in ("n1", "n2", "n1", "n2", "n1"):
        report(made, "d0", node, FAULT)
        assert gone(made) == {"d0": False}
        made.ask(BOUNDARIES)
    report(made, "n1", "n2", FAULT)
    assert gone(made) == {"n2": True}


def test_a_cut_counts_after_a_while_and_what_a_node_has_refused_at_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(broken_links, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    made = links(5.0)
    report(made, "d0", "n1", FAULT)  # a device may say what it likes of a node
    report(made, "n2", "n1", FAULT)  # nodes are heard both
    assert gone(made) == {}
    report(made, "n1", "d1", FAULT)  # with the others it may be the node itself
    assert gone(made) == {}
    made.forget("n2")
    assert gone(made) == {"d1": True}
    now[0] = 4.9
    report(made, "n1", "d0")  # the first report counts
    assert gone(made) == {}
    now[0] = 5.0
    assert gone(made) == {"d0": False}


def test_a_report_is_void_once_an_end_is_gone_or_the_link_is_there_anew():
    first = BOUNDARIES[0]
    made = links()
    for act in (lambda: made.forget("n1"), lambda: made.forget("d0"),
                lambda: gone(made, ("d0",))):  # fmt: skip
        report(made, "d0", "n1")
        act()
        assert gone(made) == {}
        made.ask(BOUNDARIES)
    report(made, "d0", "n1", here=("d0",))  # its loss is the reason
    assert gone(made) == {}
    report(made, "d0", "n1")
    report(made, "n1", "d0")
    assert made.ask(BOUNDARIES) == (first,)
    made.note_met("d0", (first,))
    made.note_met("n2", (first,))
    assert gone(made) == {"d0": False}  # the other end has still to meet it
    made.ask(BOUNDARIES)
    report(made, "d0", "n1")
    report(made, "n1", "d0")
    for end in first[:2]:
        made.note_met(end, (first,))
    assert gone(made) == {}
    report(made, "n1", "d0", FAULT)
    made.note_met("n1", (first,))  # what it sent is not forgotten
    assert gone(made) == {"d0": True}
    report(made, "n1", "d0")  # it is back, and has met nobody yet: that link has ended before
    assert gone(made) == {}


def test_no_verdict_is_given_where_hosts_end_one_after_another():
    made = links()
    report(made, "d0", "n1")
    made.finish()
    report(made, "n1", "d1", FAULT)
    assert gone(made) == {}


@pytest.mark.parametrize(
    ("source", "peer"), [("d0", "d1"), ("d0", "d0"), ("n1", "n1"), ("d0", "n9"), ("n9", "d0"),
                         ("d0", "server")],
)  # fmt: skip
def test_hosts_that_were_never_told_to_meet_have_no_link(source, peer):
    made = links()
    said = NeighbourLost(peer, "it was cut", fault=True)
    assert "is not its neighbour" in made.add(source, said, (*HERE, "n9"))
    assert gone(made) == {}


def test_a_link_that_breaks_for_good_costs_a_device_and_not_the_run(tmp_path, monkeypatch):
    made = config(tmp_path, "mpsl", rounds=40, quorum=2)
    made.network.deadline_s = 8.0
    made.run.trace = "none"
    with contextlib.ExitStack() as stack:
        listen, cutters = PeerLinks.listen, []

        def through_a_cutter(self):
            _, port = listen(self)
            cutters.append(Cutter(port))
            stack.callback(cutters[-1].close)
            address, _, port = cutters[-1].address.rpartition(":")
            return address, int(port)

        def cut(run, event):
            if event["event"] == "round_finished" and event["round"] == 0:
                cutters[0].cut(0)

        monkeypatch.setattr(PeerLinks, "listen", through_a_cutter)
        run = OpenRun(made, when=cut).run(range(3))
    assert run.error is None
    (lost,) = run.kinds("device_lost", "node_lost")
    assert "and compute node 1 has ended, although both are there" in lost["reason"]
    committed = [row["commit"] for row in run.script() if row["commit"]]
    assert committed[0] == [0, 1, 2] and len(committed[-1]) == 2


def link_of(stats):
    return types.SimpleNamespace(link=types.SimpleNamespace(stats=lambda: stats))


def test_a_device_that_sends_no_heartbeat_is_lost_and_one_that_does_is_not():
    stopped, alive = (types.SimpleNamespace(bytes_in=9) for _ in range(2))
    members = {"d0": link_of(stopped), "d1": link_of(alive), "n1": link_of(stopped)}
    missing = ("d0", "d1", "n1", "d7")
    silence = Silence(5.0)
    for now_s in range(5):
        assert not list(silence.over(members, missing, float(now_s)))
        alive.bytes_in += 20
    ((name, error),) = silence.over(members, missing, 5.0)
    assert name == "d0" and "silent for 5.0 s between rounds" in str(error)
    assert not list(Silence(0.0).over(members, missing, 0.0))


def test_the_silence_that_is_allowed_between_rounds():
    network = NetworkConfig(deadline_s=10.0)
    assert silent_s(CohortConfig(), network) == 0.0
    assert silent_s(CohortConfig(deadline_s=7.0), network) == 7.0
    assert silent_s(CohortConfig(deadline_s=1.0), network) == 5.0
