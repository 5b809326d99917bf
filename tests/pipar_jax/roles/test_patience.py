"""A run in which nobody shows progress ends and names who owes what; others are waited for."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import pytest

from pipar_jax.config import Config
from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.roles import admission, waits
from pipar_jax.roles import worker as workers
from pipar_jax.roles.patience import Moving, Patience, limit_s, pulse_s
from pipar_jax.roles.refusals import EVERY_S, FIRST, Refusals
from pipar_jax.roles.replies import TAKES_LONG, Reply
from pipar_jax.schedule.plan import COORDINATOR
from tests.pipar_jax.roles import fakes, generate
from tests.pipar_jax.roles.test_fuzz import Coordinator, config, loader, network, plan


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def waiting(progress_s=0.0):
    made, clock = Config(), Clock()
    made.network.progress_s = progress_s
    found = Patience(made.network, clock)
    found.begin()
    return found, clock


def test_the_deadline_is_the_larger_of_300_s_and_20_actions_unless_it_is_given():
    made = Config()
    assert limit_s(made.network, 0.0) == limit_s(made.network, 15.0) == 300
    assert limit_s(made.network, 16.0) == 320
    made.network.progress_s = 7.0
    assert limit_s(made.network, 1000.0) == 7
    assert pulse_s(made.network) == pytest.approx(1.4)
    assert pulse_s(Config().network) == 5


def test_who_shows_nothing_is_named_with_what_it_owes_the_longest_silent_first():
    found, clock = waiting()
    clock.now += 10
    found.pulse("d1", 7)
    found.check(["d0", "d1", "n1"], "trained")
    clock.now += 290
    found.progress("n1")
    clock.now += 299
    found.pulse("d1", 7)  # no action is over since
    found.check(["d0", "d1", "n1"], "trained")
    clock.now += 2
    with pytest.raises(PeerError) as error:
        found.check(["d1", "n1", "d0"], "trained")
    line = str(error.value)
    assert "no progress for 300 s: 'trained' is missing from device 0 for 601 s, device 1" in line
    assert "compute node 1 for 301 s" in line and "network.progress_s" in line


def test_the_clock_stands_while_a_host_compiles_and_runs_again_when_it_has():
    found, clock = waiting(5.0)
    found.working("d0", "compiling")
    clock.now += 1000
    found.check(["d0"], "prepared")
    found.check(["d0", "d1"], "prepared")
    found.answered("d0")
    clock.now += 4
    found.check(["d1"], "prepared")
    clock.now += 2
    with pytest.raises(PeerError, match="'prepared' is missing from device 1"):
        found.check(["d1"], "prepared")


def test_a_long_action_makes_the_run_wait_longer():
    found, clock = waiting()
    found.action(100.0)
    clock.now += 1999
    found.check(["d0"], "trained")
    clock.now += 2
    with pytest.raises(PeerError, match="no progress for 2000 s"):
        found.check(["d0"], "trained")


def test_a_transfer_is_progress_and_heartbeats_are_none():
    clock, carried = Clock(), SimpleNamespace(bytes_in=0, bytes_out=0)
    link = SimpleNamespace(stats=lambda: carried)
    moving = Moving(link, clock)
    for _ in range(5000):  # pings of 120 bytes each way, for an hour and more
        clock.now += 1
        carried.bytes_in += 240
        carried.bytes_out += 240
        assert not moving.look()
    moving = Moving(link, clock)
    for _ in range(3):
        clock.now += 60
        carried.bytes_out += 60 * 10_000  # a slow link at work
        assert moving.look()
    assert not moving.look()


@pytest.fixture
def hasty(monkeypatch, request):
    """A run whose deadline is short: 0.3 s, or as told."""
    made = resolve(config("pipar"))
    made.network.progress_s = getattr(request, "param", 0.3)
    monkeypatch.setattr("tests.pipar_jax.roles.test_fuzz.config", lambda *named: made)
    monkeypatch.setattr(waits, "LOOK_S", 0.02)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (messages.Calibrate(), messages.Calibrated),
        (messages.PullState(()), messages.PulledState),
        (messages.SurveyEcho(), messages.Echoed),
        (messages.Finish(), messages.Bye),
    ],
    ids=["calibrated", "pulled", "echoed", "bye"],
)
def test_a_device_that_does_nothing_ends_the_run(hasty, command, kind):
    side = Coordinator("pipar")
    side.members.send("d1", command)
    with pytest.raises(PeerError) as error:
        side.members.collect(kind, ("d1",))
    name = registry.kind_of(kind).name
    assert f"'{name}' is missing from device 1 for" in str(error.value)
    pulses = [one for one in side.links["d0"].said if one["type"] == "pulse"]
    assert pulses  # devices hear that the coordinator goes on


def test_a_device_that_was_not_asked_is_not_waited_for(hasty):
    """As one that joins while others are asked, or is back while its answer is waited for."""
    side = Coordinator("pipar")
    side.members.send("d0", messages.SurveyEcho())
    side.members.settle("d0", messages.Echoed)
    assert side.members.collect(messages.Echoed, ("d0", "d1")) == {}


@pytest.mark.parametrize("what", ["compiling", "timing", "tuning", "evaluating"])
def test_a_device_that_says_it_works_where_nothing_takes_long_ends_the_run_too(hasty, what):
    side = Coordinator("pipar")
    side.members.send("d1", messages.SurveyEcho())
    working = registry.encode(messages.Working(what, 0, 0))
    side.links["d1"].on_message(fakes.control(side.links["d1"], working))
    with pytest.raises(PeerError, match="'echoed' is missing from device 1 for"):
        side.members.collect(messages.Echoed, ("d1",))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", TAKES_LONG)
def test_a_device_that_compiles_or_times_itself_is_waited_for(hasty, kind):
    side = Coordinator("pipar")
    side.members.by_name["d1"].owed.add([Reply(kind)])
    working = registry.encode(messages.Working("compiling", 0, 0))
    side.links["d1"].on_message(fakes.control(side.links["d1"], working))
    rng, link = random.Random(0), side.links["d1"]
    answer = fakes.control(link, generate.body(registry.kind_of(kind), rng))
    timer = threading.Timer(1.0, lambda: link.on_message(answer))  # three times the deadline
    timer.start()
    side.members.collect(kind, ("d1",))
    timer.join()


@pytest.mark.parametrize("hasty", [3.0], indirect=True)
def test_a_device_that_goes_on_is_waited_for(hasty):
    """Pulses for longer than the deadline, which is far from the time between two of them."""
    side = Coordinator("pipar")
    side.members.send("d1", messages.SurveyEcho())
    link, count = side.links["d1"], iter(range(1, 100))
    wait = side.members.waiting("trained", computing=True)
    stop = threading.Event()

    def pulse():
        while not stop.wait(0.2) and (actions := next(count)) < 20:
            link.on_message(fakes.control(link, registry.encode(messages.Pulse(actions))))
        link.on_message(fakes.control(link, registry.encode(messages.Echoed())))

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        while not side.members.early.take(messages.Echoed, ("d1",)):
            wait.look(("d1",))
    finally:
        stop.set()
        thread.join()


def test_a_worker_whose_coordinator_does_nothing_ends_too(alone, monkeypatch):
    made = resolve(config("pipar"))
    made.network.progress_s = 0.3
    monkeypatch.setattr(workers, "LOOK_S", 0.02)
    worker = workers.Worker(made, "d0", network(), loader(0))
    link = fakes.Link("server")
    worker.connected(link)
    link.on_message(fakes.control(link, registry.encode(messages.Working("evaluating", 0, 0))))
    link.on_message(fakes.control(link, registry.encode(messages.SurveyEcho())))
    worker.host.actions = 3
    with pytest.raises(PeerError, match=r"no progress for 0\.3 s: 'a word' is missing from the"):
        worker.follow()
    # In either order: on a busy machine the pulse may be due before the question is read.
    assert sorted(one["type"] for one in link.said) == ["echoed", "pulse"]


def test_a_device_that_is_interrupted_says_so(alone):
    class Interrupted(fakes.Link):
        def send_control(self, body):
            super().send_control(body)
            if len(self.said) == 1:
                raise KeyboardInterrupt

    worker = workers.Worker(config("pipar"), "d0", network(), loader(0))
    link = Interrupted(COORDINATOR)
    alone.connect = lambda *args, **kwargs: link
    join = admission.device_join(config("pipar"), "d0", loader(0), network())
    with pytest.raises(KeyboardInterrupt):
        worker.run(("127.0.0.1", 1), join, 1.0)
    assert link.said[-1] == {"type": "leave", "reason": "device 0 was interrupted"}


def test_a_link_joins_under_its_own_name_alone():
    side = Coordinator("pipar")
    for peer, why in (("d1", "it joins as 'd0', but its link is that of 'd1'"),
                      ("d0", "device 0 has joined already")):  # fmt: skip
        link = side.stranger(peer)
        join = registry.encode(admission.device_join(config("pipar"), "d0", loader(0), network()))
        link.on_message(fakes.control(link, join))
        side.members.poll()
        assert why in link.said[-1]["reason"] and link.ended is not None
        assert why in side.events[-1]["reason"]


def test_what_was_not_asked_for_or_comes_twice_ends_the_member():
    side = Coordinator("pipar")
    link = side.links["d0"]
    prepared = registry.encode(messages.Prepared(0.1, 5))
    side.members.send("d0", messages.Prepare(plan("pipar"), (17, 14), (3, 2), "ab"))
    link.on_message(fakes.control(link, prepared))
    side.members.poll()
    link.on_message(fakes.control(link, prepared))
    with pytest.raises(ProtocolError, match="device 0 sent 'prepared', which was not requested"):
        side.members.poll()
    assert link.ended is not None and side.links["d1"].ended is None


def test_refusals_are_told_in_bounds_and_counted(monkeypatch):
    events, now = [], [0.0]
    monkeypatch.setattr("pipar_jax.roles.refusals.time", SimpleNamespace(monotonic=lambda: now[0]))
    refusals = Refusals(events.append)
    for _ in range(10_000):
        now[0] += 0.01
        refusals.add(None, "127.0.0.1:5", "no")
    assert refusals.count == 10_000
    assert FIRST < len(events) <= FIRST + 100 / EVERY_S + 1
    refusals.close()
    assert events[-1] == {"event": "refusals", "count": 10_000}


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
