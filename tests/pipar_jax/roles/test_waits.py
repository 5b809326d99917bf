"""Which hosts go when a wait is over, and what time counts as theirs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipar_jax.config import NetworkConfig
from pipar_jax.errors import PeerError
from pipar_jax.protocol import messages
from pipar_jax.roles import waits
from pipar_jax.roles.pulses import OwnPulse, Pulses
from pipar_jax.schedule.plan import COORDINATOR
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.roles.test_fuzz import Coordinator
from tests.pipar_jax.roles.test_patience import waiting


class Waiting:
    """A wait on a clock that the test moves, with mail that is read when it is looked for."""

    def __init__(self, **how):
        self.patience, self.clock = waiting(10.0)
        self.members = {name: None for name in ("d0", "d1", "n1", "n2")}
        self.lost, self.mail = [], []
        self.how = how

    def begin(self, **how):
        return waits.Wait(
            self.patience, self.members, poll=self.poll, may_be_lost=lambda name: name[0] in "dn",
            lose=self.lose, what="trained",
            **{"computing": False, "expired": None, **self.how, **how},
        )  # fmt: skip

    def poll(self, seconds):
        self.clock.now += seconds
        if self.mail:
            self.mail.pop(0)()

    def lose(self, name, error):
        assert isinstance(error, PeerError)
        self.lost.append(name)
        del self.members[name]

    def look(self, wait, seconds, missing):
        """Looks for so long."""
        until_s = self.clock.now + seconds
        while self.clock.now < until_s:
            wait.look([name for name in missing if name in (*self.members, COORDINATOR)])


def test_what_is_done_between_two_waits_is_nobodys_delay():
    """As an evaluation, after which a device is waited for that has just joined."""
    side = Waiting()
    side.look(side.begin(), 5.0, ["d0"])
    side.clock.now += 1000.0
    side.look(side.begin(), 9.0, ["d0"])
    assert not side.lost
    side.look(side.begin(), 11.0, ["d0"])
    assert side.lost == ["d0"]


def test_what_is_done_between_two_looks_is_nobodys_delay():
    """As another wait, of which the first one has nothing."""
    side = Waiting()
    outer = side.begin(computing=True)
    for _ in range(2):
        side.look(outer, 4.0, ["d0"])
        side.clock.now += 1000.0
        side.look(side.begin(), 9.0, ["d1"])
        side.clock.now += 1000.0
    assert not side.lost
    side.patience.pulse("d0", 3)
    side.clock.now += 1000.0
    side.look(outer, 1.0, ["d0"])
    side.mail.append(lambda: side.patience.pulse("d0", 4))  # actions that are over count there
    side.look(outer, 9.9, ["d0"])
    assert not side.lost
    side.look(outer, 1.0, ["d0"])
    assert side.lost == ["d0"]


def test_while_nobody_is_waited_for_the_clock_stands():
    side = Waiting()
    wait = side.begin()
    side.look(wait, 1000.0, [])
    side.look(wait, 9.0, ["d0"])
    assert not side.lost


def test_while_a_device_is_missing_it_is_devices_that_go():
    """Nodes are not over with a round before their last device is."""
    side = Waiting()
    wait = side.begin()
    side.look(wait, 10.2, ["n1", "d0", "n2"])
    assert side.lost == ["d0"]
    side.look(wait, 9.5, ["n1", "n2"])  # they have waited for it, and have as long as it had
    assert side.lost == ["d0"]
    side.look(wait, 1.0, ["n1", "n2"])
    assert side.lost == ["d0", "n1", "n2"]


def test_a_wait_may_do_something_else_with_those_that_are_late():
    found = []
    side = Waiting(expired=lambda late, error: found.append((list(late), str(error))))
    side.look(side.begin(), 10.2, ["server", "n1", "d0"])
    ((late, error),) = found
    assert set(late) == {"n1", "d0"} and "no progress for 10 s" in error and not side.lost


def test_where_nobody_computes_actions_that_are_over_are_no_progress():
    """Whoever tells of them could keep all others waiting for its answer for ever."""
    side = Waiting()
    wait = side.begin()
    for actions in range(200):
        side.patience.pulse("d0", actions)
        side.look(wait, 0.1, ["d0"])
    assert side.lost == ["d0"]
    side = Waiting(computing=True)
    wait = side.begin()
    for actions in range(200):
        side.patience.pulse("d0", actions)
        side.look(wait, 0.1, ["d0"])
    assert not side.lost


def test_the_server_alone_is_nobody_whom_a_run_goes_on_without():
    side = Waiting()
    with pytest.raises(PeerError, match="'trained' is missing from the server"):
        side.look(side.begin(), 10.2, ["server"])


@pytest.mark.parametrize("peer", ["d0", COORDINATOR])
def test_a_link_that_always_carries_something_is_progress_for_working_s_alone(peer):
    patience, clock = waiting(100.0, 1000.0)
    link, carried = fakes.Link(peer), SimpleNamespace(bytes_in=0, bytes_out=0)
    link.stats = lambda: carried
    often = NetworkConfig(progress_s=1e-6)  # a pulse is due whenever one is asked for
    pulses, own = Pulses(often, patience), OwnPulse(often, patience)
    own.connected(link)
    began_s = clock.now
    with pytest.raises(PeerError, match=r"network\.working_s"):
        while clock.now < began_s + 10_000:
            carried.bytes_in += 64 << 20
            if peer == COORDINATOR:
                own.beat(link, 0)
            else:
                pulses.send({peer: SimpleNamespace(link=link)}, 0)
            patience.check([peer], "pulled")
            clock.now += 20
    assert 1000 < clock.now - began_s <= 1200


def test_a_question_gives_a_member_all_of_its_time_again_and_what_owes_nothing_does_not(
    monkeypatch,
):
    side, asked = Coordinator("pipar"), []
    monkeypatch.setattr(side.members.patience, "asked", asked.append)
    side.members.send("d0", messages.Pulse(1))
    assert asked == []
    side.members.send("d0", messages.SurveyEcho())
    side.members.send_bundle("d1", messages.Evaluate(0), {})
    assert asked == ["d0", "d1"]
