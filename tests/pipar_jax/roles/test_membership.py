"""What the coordinator makes of links that end while it sends, and what it tells of the end."""

import dataclasses
import threading

import pytest

from comms import PeerClosed
from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import LinkRow
from pipar_jax.roles import server
from pipar_jax.roles.holdings import read_rows
from pipar_jax.roles.link_stats import odd_rows
from pipar_jax.roles.mail import Incoming, Member
from pipar_jax.roles.membership import Membership
from pipar_jax.runtime import trace_rows
from pipar_jax.schedule.actions import FORWARD, Action
from pipar_jax.schedule.plan import Boundary, DevicePlan, Plan
from pipar_jax.schedule.trace import Timed
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.runtime import support


class Gone:
    """A link whose peer has said goodbye."""

    def send_control(self, body):
        raise PeerClosed("d0 closed the link")

    def send_bundle(self, *args, **kwargs):
        raise PeerClosed("d0 closed the link")

    def refuse(self, reason):
        """It is gone already."""

    def admit(self, allowance):
        """Nothing more arrives."""


@pytest.fixture
def members(tmp_path, monkeypatch):
    monkeypatch.setattr("pipar_jax.roles.membership.LAST_WORDS_S", 0.05)  # there are none
    network = support.model("mlp", "float32")
    made = Membership(
        resolve(support.config(tmp_path, (17, 12))), network,
        tensors=lambda message: None, wake=lambda: None, tell=lambda event: None,
        stop=threading.Event(),
    )  # fmt: skip
    made.by_name["d0"] = Member(Gone(), None)
    made.links.admit(made.by_name["d0"].link, "d0")
    return made


@pytest.mark.parametrize(
    "send",
    [
        lambda members: members.broadcast(messages.Finish()),
        lambda members: members.send("d0", messages.Calibrate()),
        lambda members: members.send_bundle("d0", messages.PushState(round=0), {}),
    ],
    ids=["broadcast", "control", "bundle"],
)
def test_a_send_that_finds_the_link_gone_is_a_lost_peer(members, send):
    with pytest.raises(PeerError, match=r"device 0 was lost: d0 closed the link"):
        send(members)


def test_a_host_thread_that_finds_the_link_gone_is_a_lost_peer_too(members):
    members.links.local_failure(PeerClosed("d0 closed the link"))
    with pytest.raises(PeerError, match="a device was lost: d0 closed the link"):
        members.poll()


def test_the_mail_about_the_end_says_more_than_the_send_that_noticed_it(members):
    link = members.by_name["d0"].link
    members.links.mail.put((Incoming.LOST, link, PeerClosed("its data ended")))
    with pytest.raises(PeerError, match="device 0 was lost: its data ended"):
        members.broadcast(messages.Finish())


def test_links_that_go_while_a_new_one_is_counted_do_no_harm(members):
    """Links are taken out on the owner's thread while the I/O thread takes new ones in."""

    class Names(dict):
        def __contains__(self, link):
            members.links._waiting.pop(link, None)
            return super().__contains__(link)

    members.links._names = Names(members.links._names)
    for _ in range(5):
        members.links.on_link(fakes.Link("d0"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "the server was interrupted"),
        (PeerError("d1 is gone"), "d1 is gone"),
        (ValueError("oh"), "the server failed: ValueError('oh')"),
    ],
)
def test_members_are_told_why_a_run_ends(error, reason):
    assert server._reason(error) == reason


def test_what_neighbours_sent_each_other_is_told_once_for_each_link():
    """Each row is kept in metrics.jsonl: many of them would fill the disk."""
    numbers = {one.name: 0 for one in dataclasses.fields(LinkRow)}

    def row(source, target):
        return LinkRow(**{**numbers, "source": source, "target": target})

    met = {Boundary("d0", "n1", 0), Boundary("n1", "d0", 1), Boundary("n1", "d1", 0)}
    twice = [row("d0", "n1"), row("d0", "n1")]
    assert odd_rows(twice, "d0", met) is None
    assert odd_rows([], "d1", met) is None
    for rows in ([*twice, row("d0", "n1")], [row("n1", "d0")], [row("d0", "d1")]):
        assert "'stored' with what" in odd_rows(rows, "d0", met)


@pytest.mark.parametrize(
    "times",
    [(-1e308, 1e308), (1e300, 1e300), (0.0, float("inf")), (float("nan"), 1.0), (2.0, 1.0)],
)
def test_times_that_no_clock_shows_are_kept_out_of_the_trace(times):
    """Their difference, or they in microseconds, is not finite: nobody could read the trace."""
    plan, action = Plan((DevicePlan((1,), ("device", "server")),)), Action(0, FORWARD, 0, 0)
    for start_s, end_s in ((1.0, 2.0), times):
        rows = trace_rows.pack_rows([Timed(action, start_s, end_s)])
        message = fakes.bundle(fakes.Link("d0"), "trace", {"type": "trace"}, rows)
        if (start_s, end_s) == (1.0, 2.0):
            assert len(read_rows(message, [plan], "d0", [3], "device 0")) == 1
        else:
            with pytest.raises(ProtocolError, match="device 0 sent 'trace' with row 0"):
                read_rows(message, [plan], "d0", [3], "device 0")
