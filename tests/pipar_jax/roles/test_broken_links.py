"""Who goes when a link breaks between two hosts that are there, and when devices are silent."""

from __future__ import annotations

import contextlib
import types

import pytest

from experiments.benchmarks.watched import Cutter
from pipar_jax.config import CohortConfig, NetworkConfig
from pipar_jax.protocol.messages import NeighbourLost
from pipar_jax.roles.broken_links import BrokenLinks
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.roles.silence import Silence, silent_s
from tests.pipar_jax.roles.open_runs import OpenRun, config

HERE = ("d0", "d1", "n1", "n2")


@pytest.mark.parametrize(
    ("reports", "gone"),
    [
        ([("d0", "n1"), ("n1", "d0")], ["d0"]),  # others need the node
        ([("n2", "n1"), ("n1", "n2")], ["n2"]),
        ([("n1", "d0")], ["n1"]),  # nobody confirms it
        ([("d0", "n1")], ["d0"]),
        ([("d0", "n9")], []),  # which has gone by itself
        ([("d0", "n1"), ("n2", "n1")], ["d0", "n2"]),
    ],
)
def test_one_end_of_a_broken_link_goes(reports, gone):
    links = BrokenLinks(patience_s=0.0)
    for source, peer in reports:
        assert links.add(source, NeighbourLost(peer, "it was cut"), HERE) is None
    found = dict(links.due(HERE))
    assert sorted(found) == gone
    assert all("although both are there: it was cut" in str(error) for error in found.values())
    assert not list(links.due(HERE))


def test_a_report_is_forgotten_with_its_host_or_when_the_link_is_there_again():
    links = BrokenLinks(patience_s=0.0)
    for act in (lambda: links.forget("n1"), lambda: links.forget("d0", "n1"),
                lambda: list(links.due(("d0",)))):  # fmt: skip
        links.add("d0", NeighbourLost("n1", "it was cut"), HERE)
        act()
        assert not list(links.due(HERE))
    links.add("d0", NeighbourLost("n1", "it was cut"), HERE)
    links.forget("d0", "n2")
    assert [name for name, _ in links.due(HERE)] == ["d0"]
    slow = BrokenLinks(patience_s=3600.0)
    slow.add("d0", NeighbourLost("n1", "it was cut"), HERE)
    assert not list(slow.due(HERE))


@pytest.mark.parametrize(("source", "peer"), [("d0", "d1"), ("d0", "d0"), ("n1", "n1")])
def test_hosts_that_are_no_neighbours_have_no_link(source, peer):
    links = BrokenLinks(patience_s=0.0)
    assert "is not its neighbour" in links.add(source, NeighbourLost(peer, "it was cut"), HERE)
    assert not list(links.due(HERE))


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
