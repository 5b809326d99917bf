"""What the coordinator makes of links that end while it sends, and what it tells of the end."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest

from comms import MessageKind, PeerClosed
from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import LinkRow
from pipar_jax.roles import round_results, server
from pipar_jax.roles.holdings import read_rows
from pipar_jax.roles.link_stats import odd_rows
from pipar_jax.roles.mail import Incoming, Member
from pipar_jax.roles.member_links import MOST_WAITING_BYTES
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.relay import Relay
from pipar_jax.roles.replies import reply
from pipar_jax.runtime import trace_rows
from pipar_jax.schedule.actions import FORWARD, Action, Span
from pipar_jax.schedule.plan import Boundary, DevicePlan, Order, Plan, WeightPolicy
from pipar_jax.schedule.trace import Timed
from tests.patience import PATIENCE_S
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
    monkeypatch.setattr("pipar_jax.roles.waits.LAST_WORDS_S", 0.05)  # there are none
    network = support.model("mlp", "float32")
    made = Membership(
        resolve(support.config(tmp_path, (17, 12))), network,
        tensors=lambda message: None, wake=lambda: None, tell=lambda event: None,
        stop=threading.Event(),
    )  # fmt: skip
    made.by_name["d0"] = Member(Gone(), None)
    made.links.admit(made.by_name["d0"].link, "d0")
    return made


def poll_until(members, done):
    until_s = time.monotonic() + PATIENCE_S
    while not done() and time.monotonic() < until_s:
        members.poll(0.01)
    assert done()


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
    send(members)  # whoever sends to many is not interrupted by one that is gone
    assert "d0" in members.by_name
    with pytest.raises(PeerError, match=r"device 0 was lost: d0 closed the link"):
        poll_until(members, lambda: False)


def test_a_host_thread_that_finds_the_link_gone_is_a_lost_peer_too(members):
    members.links.local_failure(PeerClosed("d0 closed the link"))
    with pytest.raises(PeerError, match="a device was lost: d0 closed the link"):
        members.poll()


def test_the_mail_about_the_end_says_more_than_the_send_that_noticed_it(members):
    link = members.by_name["d0"].link
    members.links.mail.put((Incoming.LOST, link, PeerClosed("its data ended")))
    members.broadcast(messages.Finish())
    with pytest.raises(PeerError, match="device 0 was lost: its data ended"):
        members.poll()


@pytest.mark.parametrize("may_be_lost", [True, False])
def test_a_member_is_lost_once_whatever_else_is_said_of_it(members, may_be_lost):
    """Whoever lies twice, or lies and goes, has gone already when that is read."""
    members.hosts = SimpleNamespace(may_be_lost=lambda name: may_be_lost)
    members.population = SimpleNamespace(go=lambda *of: None)
    told = []
    members.tell = told.append
    members.by_name["d0"] = Member(Gone(), SimpleNamespace(index=0))
    if not may_be_lost:
        with pytest.raises(ProtocolError, match="device 0 sent one lie"):
            members.blame("d0", "one lie")
        return
    members.blame("d0", "one lie")
    members.blame("d0", "another")
    members.lose("d0", PeerError("it is gone"))
    assert [event["event"] for event in told] == ["device_lost"]
    assert members.lost_hosts == ["d0"]


def test_a_trace_that_is_none_ends_its_own_device_alone(members, monkeypatch):
    members.hosts = SimpleNamespace(may_be_lost=lambda name: True)
    members.population = SimpleNamespace(go=lambda *of: None)
    members.by_name["d0"] = Member(Gone(), SimpleNamespace(index=0))
    monkeypatch.setattr(round_results, "read_rows", refuse)
    results = SimpleNamespace(
        _members=members, _places=1, _population=[SimpleNamespace(steps=3)],
        _table=SimpleNamespace(steps=lambda steps: steps), _setup=SimpleNamespace(plans=()),
    )  # fmt: skip
    mail = SimpleNamespace(message=SimpleNamespace())
    assert round_results.RoundResults.add_traces(results, {"d0": mail}) == {}
    assert members.lost_hosts == ["d0"]


def test_a_client_side_model_that_is_none_ends_its_own_turn_alone(members):
    members.hosts = SimpleNamespace(may_be_lost=lambda name: True)
    members.population = SimpleNamespace(go=lambda *of: None)
    members.by_name["d0"] = Member(Gone(), SimpleNamespace(index=0))
    now = SimpleNamespace(out={}, device=lambda place: "d0", turns_done=set(),
                          spans=(Span(0, 0, 1),),
                          end=SimpleNamespace(ends_s=lambda: None))  # fmt: skip

    def note_lost(name):
        now.out, now.spans = {0: name}, ()

    members.lost = note_lost
    members.early = SimpleNamespace(take=lambda kind, names: {"d0": None}, discard=lambda *of: None)

    def read(mail, wanted):
        with members.reading("d0"):
            refuse()

    relay = Relay(("a", "b"), members, SimpleNamespace(read=read, push=lambda *of: None))
    plan = Plan((DevicePlan((1,), ("device", "server")),), order=Order.SEQUENTIAL,
                weights=WeightPolicy.SHARED)  # fmt: skip
    relay.run(now, plan, lambda place, why: None)
    assert now.out == {0: "d0"} and not now.turns_done and relay.client_model == {}


def refuse(*args):
    raise ProtocolError("device 0 sent something else")


def bundle(nbytes):
    return SimpleNamespace(kind=MessageKind.BUNDLE, nbytes=nbytes, body={"type": "trained"},
                           release=lambda: None)  # fmt: skip


def control(nbytes, name="pulse"):
    return SimpleNamespace(kind=MessageKind.CONTROL, nbytes=nbytes, body={"type": name},
                           release=lambda: None)  # fmt: skip


def test_large_weights_that_were_asked_for_may_wait_to_be_read(members):
    """The coordinator may be busy for longer than a member is silent."""
    link, links = fakes.Link("d0"), members.links
    members.by_name["d0"] = Member(link, None)
    links.on_link(link)
    links.admit(link, "d0")
    members.by_name["d0"].owed.add([reply(messages.Trained, round=0)])
    for message in (bundle(1 << 30), control(50), control(50)):
        link.on_message(message)
    assert links.mail.qsize() == 3
    for _ in range(3):
        what, _, message = links.mail.get()
        assert what is Incoming.MESSAGE
        links.note_read(link, message)
    link.on_message(control(MOST_WAITING_BYTES + 1, "working"))
    link.on_message(control(50))  # while nobody has read that
    assert [links.mail.get()[0] for _ in range(2)] == [Incoming.MESSAGE, Incoming.WRONG]


def test_a_stranger_that_asked_in_time_may_wait_to_be_read(members, monkeypatch):
    monkeypatch.setattr("pipar_jax.roles.member_links.JOIN_S", 0.0)
    asked, silent = fakes.Link("d1"), fakes.Link("d2")
    for link in (asked, silent):
        members.links.on_link(link)
    asked.on_message(control(50, "join"))
    time.sleep(0.01)
    assert members.links.late() == [silent]


def test_what_strangers_ask_goes_with_their_links(members):
    links = [fakes.Link(f"d{i}") for i in range(200)]
    for link in links:
        members.links.on_link(link)
        link.on_message(control(50, "join"))
    held = [members.links.take_join(link) is not None for link in links]
    assert held == [link.ended is None for link in links] and not all(held) and any(held)
    assert members.links.take_join(links[-1]) is None  # it is read once
    while not members.links.mail.empty():
        assert members.links.mail.get()[2] is None


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
