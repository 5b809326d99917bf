"""A run that may lose devices: a loss is an event, whoever comes back takes its place again."""

from __future__ import annotations

import threading

import pytest

from comms import PeerClosed
from pipar_jax.errors import JoinError, PeerError, ProtocolError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.roles import admission
from pipar_jax.roles.assembly import assemble
from pipar_jax.roles.membership import Membership
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.roles.test_fuzz import SAMPLES, loader, network, plan
from tests.pipar_jax.runtime import support


class Side:
    """The coordinator's side of a run that may lose devices, and what it told."""

    def __init__(self, tmp_path, monkeypatch, **fields) -> None:
        monkeypatch.setattr("pipar_jax.roles.waits.LAST_WORDS_S", 0.05)
        made = support.config(tmp_path, SAMPLES, dtype="float32", batch=7, method="pipar")
        for name, value in {"quorum": 1, **fields}.items():
            setattr(made.cohort, name, value)
        made.network.join_timeout_s = 0.3
        self.config, self.events, self.lost = resolve(made), [], []
        self.members = Membership(
            self.config, network(), tensors=lambda message: None, wake=lambda: None,
            tell=self.events.append, stop=threading.Event(),
        )  # fmt: skip
        self.members.lost = self.lost.append

    def join(self, index):
        link = fakes.Link(f"d{index}")
        self.members.links.on_link(link)
        join = admission.device_join(self.config, f"d{index}", loader(index), network())
        link.on_message(fakes.control(link, registry.encode(join)))
        self.members.poll()
        return link

    def kinds(self):
        return [event["event"] for event in self.events if event["event"] != "waiting"]


@pytest.fixture
def side(tmp_path, monkeypatch):
    return Side(tmp_path, monkeypatch)


def said(message):
    return lambda link: link.on_message(fakes.control(link, registry.encode(message)))


LOSSES = {
    "gone": (lambda link: link.on_lost(PeerClosed("its data ended")), "lost"),
    "failed": (said(messages.Failed("out of memory")), "lost"),
    "left": (said(messages.Leave("it was interrupted")), "left"),
    "not asked": (said(messages.Prepared(0.1, 5)), "lost"),
    "no message": (lambda link: link.on_message(fakes.control(link, {"type": "x"})), "lost"),
    "a tensor": (
        lambda link: link.on_message(fakes.bundle(link, "bye", {"type": "bye"}, {})), "lost",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", LOSSES)
def test_a_device_that_is_gone_is_an_event_and_may_come_back(side, how):
    side.join(0)
    link = side.join(1)
    away, kind = LOSSES[how]
    away(link)
    side.members.poll()
    assert side.kinds() == ["device_joined", "device_joined", f"device_{kind}"]
    assert side.lost == ["d1"] and list(side.members.by_name) == ["d0"]
    assert link.ended is not None
    side.members.send("d1", messages.Calibrate())  # says nothing to nobody
    link.on_message(fakes.control(link, registry.encode(messages.Pulse(1))))
    side.members.poll()
    assert side.kinds()[-1] == f"device_{kind}"
    side.join(1)
    assert side.events[-1]["event"] == "device_returned" and side.events[-1]["away_s"] >= 0
    assert list(side.members.by_name) == ["d0", "d1"]
    assert side.members.population[1].losses == (kind == "lost")


def test_who_is_back_before_its_loss_is_noticed_is_asked_to_try_again(side):
    side.join(0)
    second = side.join(0)
    assert second.said[-1]["type"] == "refused" and second.said[-1]["again"] is True
    assert list(side.members.by_name) == ["d0"]


def test_waiting_goes_on_without_those_that_are_lost(side):
    links = [side.join(0), side.join(1)]
    side.members.broadcast(messages.Prepare(plan("pipar"), SAMPLES, (3, 2), "ab"))
    links[0].on_message(fakes.control(links[0], registry.encode(messages.Prepared(0.1, 5))))
    links[1].on_lost(PeerClosed("its data ended"))
    assert list(side.members.collect(messages.Prepared, ("d0", "d1"))) == ["d0"]


def test_what_a_send_finds_gone_is_lost_too(side):
    side.join(0)
    side.join(1).refuse("cut")
    side.members.broadcast(messages.Calibrate())
    assert side.lost == []
    assert side.members.collect(messages.Calibrated, ("d1",)) == {}
    assert side.lost == ["d1"]


def test_a_run_that_may_lose_nobody_ends_with_the_first_loss(tmp_path, monkeypatch):
    side = Side(tmp_path, monkeypatch, quorum=0)
    side.join(0)
    side.join(1).on_lost(PeerClosed("its data ended"))
    with pytest.raises(PeerError, match="device 1 was lost: its data ended"):
        side.members.poll()


def test_a_bundle_that_does_not_fit_ends_the_device_and_no_more(side):
    side.join(0)
    with pytest.raises(ProtocolError), side.members.reading("d0"):
        raise ProtocolError("device 0 sent nonsense")
    assert side.lost == ["d0"]


def test_a_run_begins_with_as_many_devices_as_it_needs(tmp_path, monkeypatch):
    side = Side(tmp_path, monkeypatch, min_devices=1, wait_s=0.1)
    with pytest.raises(JoinError, match="1 devices are needed"):
        assemble(side.members, side.config.cohort, side.config.network.join_timeout_s)
    side.join(1)
    assemble(side.members, side.config.cohort, side.config.network.join_timeout_s)
    assert list(side.members.by_name) == ["d1"]
