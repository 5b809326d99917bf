"""A run in which nobody shows progress ends and names who owes what; others are waited for."""

from __future__ import annotations

import ast
import functools
import random
import threading
from types import SimpleNamespace

import pytest

from pipar_jax.config import Config
from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.roles import admission, membership, waits
from pipar_jax.roles import worker as workers
from pipar_jax.roles.patience import Moving, Patience, limit_s, pulse_s
from pipar_jax.roles.refusals import EVERY_S, FIRST, Refusals
from pipar_jax.roles.replies import TAKES_LONG, Reply
from pipar_jax.schedule.plan import COORDINATOR
from tests.pipar_jax.roles import fakes, generate
from tests.pipar_jax.roles.test_fuzz import Coordinator, config, loader, network, plan
from tests.sources import ROOT


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def waiting(progress_s=0.0, working_s=7200.0):
    made, clock = Config(), Clock()
    made.network.progress_s, made.network.working_s = progress_s, working_s
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
    found.working("d0")
    clock.now += 1000
    found.check(["d0"], "prepared")
    found.check(["d0", "d1"], "prepared")
    found.answered("d0")
    clock.now += 4
    found.check(["d1"], "prepared")
    clock.now += 2
    with pytest.raises(PeerError, match="'prepared' is missing from device 1"):
        found.check(["d1"], "prepared")


@pytest.mark.parametrize(
    "show", [Patience.working, Patience.transfer], ids=lambda one: one.__name__
)
@pytest.mark.parametrize("every_s", [1, 60, 99])
def test_work_and_transfers_count_for_working_s_however_often_they_are_shown(show, every_s):
    found, clock = waiting(100.0, 1000.0)
    began_s = clock.now
    with pytest.raises(PeerError) as error:
        while clock.now < began_s + 10_000:
            show(found, "d0")
            found.check(["d0", "d1"], "prepared")
            clock.now += every_s
    assert 1000 < clock.now - began_s <= 1000 + 100 + 2 * every_s
    line = str(error.value)
    assert "no progress for 100 s: 'prepared' is missing from device 1 for" in line
    assert line.endswith(
        "or raise network.progress_s or network.working_s: device 0 reported work, or kept a "
        "transfer going, for more than 1000 s"
    )


def ends_in_time(found, clock, show) -> None:
    """A host that is waited for shows something every 50 s: the wait ends, and in time."""
    began_s = clock.now
    with pytest.raises(PeerError):
        while clock.now < began_s + 10_000:
            show()
            found.check(["d0"], "prepared")
            clock.now += 50
    assert clock.now - began_s <= 1200


def test_work_and_transfers_take_turns_within_the_same_time():
    found, clock = waiting(100.0, 1000.0)
    ends_in_time(found, clock, lambda: (found.working if clock.now % 3 else found.transfer)("d0"))


def test_who_is_silent_once_it_works_is_waited_for_as_long_and_no_longer():
    """A single program may take all of the time: nothing is reported while it compiles."""
    found, clock = waiting(100.0, 1000.0)
    found.working("d0")
    clock.now += 1000
    found.check(["d0"], "prepared")
    clock.now += 100
    found.check(["d0"], "prepared")
    clock.now += 1
    with pytest.raises(PeerError, match=r"missing from device 0 for 1101 s.*network\.working_s"):
        found.check(["d0"], "prepared")


@pytest.mark.parametrize("ends", ["answered", "asked", "pulse", "forget"])
def test_an_answer_an_action_and_a_question_give_a_host_all_of_its_time_again(ends):
    found, clock = waiting(100.0, 1000.0)
    for round_ in range(3):
        for _ in range(19):
            found.transfer("d0")
            found.check(["d0"], "trained")
            clock.now += 50
        getattr(found, ends)(*(["d0", round_] if ends == "pulse" else ["d0"]))
    assert clock.now > 2900


def test_actions_give_no_time_where_nobody_computes():
    found, clock = waiting(100.0, 1000.0)
    found.begin(computing=False)

    def show() -> None:
        found.working("d0")
        found.pulse("d0", int(clock.now))

    ends_in_time(found, clock, show)


def test_time_in_which_nobody_waits_is_none_of_a_hosts_work():
    """Its answer may have come meanwhile; and other waits begin, and end, none of its time."""
    found, clock = waiting(100.0, 1000.0)
    found.working("d0")
    for other in range(9):
        clock.now += 100
        found.check(["d0"], "prepared")
        found.pause()
        clock.now += 5000
        if other % 2:
            found.begin(waiter=other)
        else:
            found.resume(computing=True, waiter=None if not other else other - 1)
    clock.now += 100
    found.check(["d0"], "prepared")  # 1000 s of waiting
    clock.now += 100
    found.check(["d0"], "prepared")
    clock.now += 1
    with pytest.raises(PeerError):
        found.check(["d0"], "prepared")


def test_who_works_holds_nobody_up_for_whom_others_do_not_wait():
    found, clock = waiting(100.0, 1000.0)
    found.working("d0")
    clock.now += 101
    with pytest.raises(PeerError) as error:
        found.check(["d1"], "prepared")
    assert "device 0" not in str(error.value) and "working_s" not in str(error.value)


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


@pytest.fixture
def timed(monkeypatch):
    """A run with deadlines of 100 s and 1000 s, by a clock that stands until it is moved."""
    made, clock = resolve(config("pipar")), Clock()
    made.network.progress_s, made.network.working_s = 100.0, 1000.0
    monkeypatch.setattr("tests.pipar_jax.roles.test_fuzz.config", lambda *named: made)
    for module in (membership, workers):
        monkeypatch.setattr(module, "Patience", functools.partial(Patience, clock=clock))
    return made, clock


def held_coordinator(made, clock, monkeypatch, what):
    """A device says that it works, whenever the coordinator looks."""
    side = Coordinator("pipar")
    side.members.send("d1", messages.Calibrate())
    link, poll = side.links["d1"], side.members.poll

    def say(timeout_s):
        clock.now += 20
        link.on_message(fakes.control(link, registry.encode(messages.Working(what, 1, 2))))
        poll(0.0)

    monkeypatch.setattr(side.members, "poll", say)
    side.members.collect(messages.Calibrated, ("d1",))


def held_worker(made, clock, monkeypatch, what):
    """The coordinator says that it works, whenever the device looks."""
    worker, link = workers.Worker(made, "d0", network(), loader(0)), fakes.Link("server")
    worker.connected(link)
    get = worker.mail.get

    def say(timeout_s):
        clock.now += 20
        link.on_message(fakes.control(link, registry.encode(messages.Working(what, 1, 2))))
        return get(0.0)

    monkeypatch.setattr(worker.mail, "get", say)
    worker.follow()


#: Whoever takes note of reported work, by its file, and a peer that never reports anything else.
HELD = {"membership.py": held_coordinator, "worker.py": held_worker}


@pytest.mark.parametrize("what", ["compiling", "timing", "tuning", "evaluating"])
@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_nobody_waits_for_ever_for_a_peer_that_only_says_that_it_works(
    alone, timed, monkeypatch, held, what
):
    made, clock = timed
    began_s = clock.now
    with pytest.raises(PeerError, match=r"no progress for 100 s: .*network\.working_s"):
        held(made, clock, monkeypatch, what)
    assert 1000 < clock.now - began_s <= 1200


def test_whoever_takes_note_of_reported_work_is_held_up_here():
    found = set()
    for path in (ROOT / "pipar_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "working":
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if "patience" in name:
                    found.add(path.name)
    assert found == set(HELD)


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
