"""Who goes, who goes on and from which step, whatever happens at the same time in a round."""

from __future__ import annotations

import pytest

from pipar_jax.errors import PeerError, RunError
from pipar_jax.protocol import messages
from pipar_jax.roles import waits
from tests.pipar_jax.roles.crews import FIRST, STOP, Crew

SHARED = ("pipar shared", "mpsl shared")


def first_time(crew, host, kind, act, number=1):
    """Acts when a host is told something of a kind for the first time, or another one."""

    def when(to, said):
        if to == host and isinstance(said, kind) and crew.times[host, kind] == number:
            act()

    before = crew.when
    crew.when = lambda to, said: (before(to, said), when(to, said))


def steps_of(crew, host, kind):
    """The steps that a host was told with commands of a kind."""
    return [said.step for said in crew.asked[host] if isinstance(said, kind)]


@pytest.mark.parametrize("method", [*SHARED, "pipar", "fl"])
def test_hundreds_of_devices_may_go_at_once(tmp_path, method):
    """As when their access point does; and each is told of to the others, who are gone as well."""
    crew = Crew(tmp_path, method, 160, quorum=1)
    others = [f"d{index}" for index in range(1, 160)]
    first_time(crew, "d0", messages.Release, lambda: crew.lose(*others))
    if method in SHARED:
        crew.halted = lambda host: messages.Halted(0, FIRST + 1, FIRST)
    done = crew.conduct()
    assert done.places == (0,) and sorted(crew.lost) == sorted(others)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("second", ["d2", "n1"])
def test_below_the_quorum_another_may_be_lost_while_the_rest_is_finished(tmp_path, method, second):
    if second == "n1" and method != "mpsl shared":
        pytest.skip("there is no node")
    crew = Crew(tmp_path, method, 4, nodes=2, quorum=3, below="repeat")
    # Nobody comes to the end before the second loss.
    crew.trains = lambda host, said: (
        isinstance(said, messages.Release) and crew.times[host, messages.Release] >= 3
    )
    first_time(crew, "d3", messages.Release, lambda: crew.lose("d0", "d1"))
    first_time(crew, "d3", messages.Release, lambda: crew.lose(second), number=2)
    crew.halted = lambda host: messages.Halted(0, FIRST + 1, FIRST)
    first_time(crew, "d3", messages.Rewind, lambda: back_at(crew, FIRST + 1))
    done = crew.conduct()
    assert crew.lost == ["d0", "d1", second]
    assert done.places == ((3,) if second == "d2" else (2, 3))
    assert done.whole == (second == "d2")


def back_at(crew, step):
    """From now on all are at a step, and can go back no further."""
    crew.halted = lambda host: messages.Halted(0, step, step)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("number", [0, FIRST - 2, STOP + 1, 2**31 - 1])
@pytest.mark.parametrize("field", ["step", "least", "both"])
def test_a_device_that_says_it_is_where_nobody_can_be_goes_alone(tmp_path, method, number, field):
    """Everybody else could not go back there, and would end."""
    crew = Crew(tmp_path, method, 4, quorum=1)
    first_time(crew, "d1", messages.Release, lambda: crew.lose("d0"))

    def halted(host):
        step = number if host == "d1" and field != "least" else FIRST + 1
        least = number if host == "d1" and field != "step" else FIRST
        return messages.Halted(0, step, least)

    crew.halted = halted
    first_time(crew, "d2", messages.Rewind, lambda: back_at(crew, FIRST + 1))
    done = crew.conduct()
    # A lie about how far it could go back by itself has no effect.
    lost = ["d0"] if field == "least" and number < FIRST else ["d0", "d1"]
    assert crew.lost == lost
    assert set(steps_of(crew, "d2", messages.Rewind)) == {FIRST + 1}
    assert done.places == tuple(place for place in range(4) if f"d{place}" not in lost)


@pytest.mark.parametrize("method", SHARED)
def test_answers_of_another_round_or_step_end_their_sender_alone(tmp_path, method):
    crew = Crew(tmp_path, method, 4, quorum=1)
    first_time(crew, "d1", messages.Release, lambda: crew.lose("d0"))
    crew.halted = lambda host: messages.Halted(9 if host == "d1" else 0, FIRST, FIRST)
    done = crew.conduct()
    assert crew.lost == ["d0", "d1"] and done.places == (2, 3)


@pytest.mark.parametrize("method", SHARED)
def test_a_step_that_was_not_finite_is_taken_back_although_all_have_taken_it(tmp_path, method):
    """And what has become of it meanwhile is nobody else's fault."""
    crew = Crew(tmp_path, method, 3, quorum=1)
    last = {place: chain[-1] for place, chain in enumerate(crew.plan.chains)}

    def diverge():
        for place, step in ((1, FIRST), (2, FIRST + 1)):
            crew.say(last[place], messages.NonFinite("loss", place, 0, step))

    first_time(crew, "d2", messages.Release, diverge)
    crew.halted = lambda host: messages.Halted(0, FIRST + 1, FIRST)
    first_time(crew, "d2", messages.Rewind, lambda: back_at(crew, FIRST))
    done = crew.conduct()
    assert crew.lost == [] and done.places == (0, 2)
    assert steps_of(crew, "d2", messages.Rewind) == [FIRST]
    (out,) = [event for event in crew.events if event["event"] == "device_dropped"]
    assert (out["device"], out["step"], out["why"]) == (1, FIRST, "nonfinite")


def test_what_is_shared_and_not_finite_ends_the_run_unless_it_is_taken_back(tmp_path):
    for taken_back in (True, False):
        crew = Crew(tmp_path, "pipar shared", 3, quorum=1)

        def tell(crew=crew, taken_back=taken_back):
            if taken_back:
                crew.say("server", messages.NonFinite("loss", 1, 0, STOP - 1))
            crew.say("server", messages.NonFinite("weights", None, 0, STOP - 1, ("fc2",)))

        first_time(crew, "d2", messages.Release, tell)
        crew.halted = lambda host: messages.Halted(0, STOP, STOP - 1)
        first_time(crew, "d2", messages.Rewind, lambda crew=crew: back_at(crew, STOP - 1))
        if taken_back:
            assert crew.conduct().places == (0, 2)
        else:
            with pytest.raises(RunError, match="all devices, round 0, step 7"):
                crew.conduct()


@pytest.fixture
def soon(monkeypatch):
    """The progress deadline is over soon: only those that say nothing at all are missing then."""
    monkeypatch.setattr(waits, "LOOK_S", 0.02)
    return 0.3


def test_with_copies_a_device_that_hangs_goes_and_no_node(tmp_path, soon):
    """The nodes of its chain are over with the round when it is dropped."""
    crew = Crew(tmp_path, "mpsl", 2, quorum=1, progress_s=soon)

    def trains(host, said):
        if isinstance(said, messages.Release):
            return host == "d1"
        return isinstance(said, messages.Drop) and host in ("n1", "server")

    crew.trains = trains
    done = crew.conduct()
    assert crew.lost == ["d0"] and done.places == (1,)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("hangs", ["d0", "n1"])
def test_where_gradients_are_summed_who_hangs_goes_and_those_that_wait_for_it_do_not(
    tmp_path, soon, method, hangs
):
    """All are missing: who has stopped when it is told to does not hang."""
    if hangs == "n1" and method != "mpsl shared":
        pytest.skip("there is no node")
    crew = Crew(tmp_path, method, 3, nodes=2, quorum=1, progress_s=soon)
    crew.trains = lambda host, said: isinstance(said, messages.Release) and crew.lost
    crew.halted = lambda host: None if host == hangs else messages.Halted(0, FIRST, FIRST)
    done = crew.conduct()
    assert crew.lost == [hangs]
    assert done.places == tuple(place for place in range(3) if f"d{place}" != hangs)


@pytest.mark.parametrize("method", SHARED)
def test_a_round_in_which_all_answer_and_nobody_goes_on_ends(tmp_path, soon, method):
    crew = Crew(tmp_path, method, 3, quorum=1, progress_s=soon)
    crew.trains = lambda host, said: False
    with pytest.raises((PeerError, RunError)):
        crew.conduct()
    assert crew.times["server", messages.Halt] <= 3
