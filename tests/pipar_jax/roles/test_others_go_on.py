"""Whatever becomes of one device, and whatever it says, costs the others nothing but its part."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from pipar_jax.errors import RunError
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import KINDS, Sender
from pipar_jax.protocol.wire_fields import Figure, Real, Whole, struct
from pipar_jax.roles.host_replies import HostReplies
from pipar_jax.roles.peer_links import PeerLinks
from tests.pipar_jax.roles import lies
from tests.pipar_jax.roles.open_runs import (
    OpenRun,
    break_batch,
    config,
    pause_until_there,
    replayed,
    together,
    told,
)


def shared(made):
    made.pipeline.weights, made.pipeline.dispatch = "shared", "fixed"
    return made


def right(run, *lost):
    """The run has ended as it should, and nobody else with an error."""
    assert run.error is None, run.error
    assert {one["device"] for one in run.kinds("device_lost")} <= set(lost)
    assert not run.kinds("node_lost")
    assert set(run.errors) <= set(lost), run.errors


@pytest.mark.parametrize("weights", [pytest.param("copy", marks=pytest.mark.soak), "shared"])
def test_who_vanishes_while_it_meets_its_neighbours_is_not_in_the_round(
    tmp_path, monkeypatch, weights
):
    """A node that has never met it could not begin the round, and would end."""
    connect, vanished = PeerLinks.connect, []

    def vanish(self, number, *meeting):
        if self.link_table.host == "d2" and len(vanished) < 2:
            vanished.append(number)
            raise RunError("it is gone")
        connect(self, number, *meeting)

    monkeypatch.setattr(PeerLinks, "connect", vanish)
    made = config(tmp_path, "mpsl", rounds=10, min_devices=2, quorum=1, wait_s=0.2)
    if weights == "shared":
        shared(made)

    def come(run, event):
        first = event["event"] == "round_finished" and event["round"] == 0
        if first or event["event"] == "device_lost":
            run.start(2)

    run = OpenRun(made, when=together(come, pause_until_there()))
    run.run(range(2))
    assert len(vanished) == 2
    right(run, 2)


def test_who_is_lost_and_back_while_others_end_is_told_to_end_too(tmp_path, monkeypatch):
    say_goodbye, gone = HostReplies.say_goodbye, []
    made = config(tmp_path, "pipar", rounds=1, quorum=1)
    run = OpenRun(made)

    def when(run, event):
        if event["event"] == "device_lost":
            run.start(1)

    def end(self):
        if self._name == "d1" and not gone:
            gone.append(True)
            raise RunError("it is gone")
        if self._name == "d0":  # the others' end takes a while
            told(run, "device_returned", 1)
        say_goodbye(self)

    monkeypatch.setattr(HostReplies, "say_goodbye", end)
    run.when = when
    run.run(range(3))
    right(run, 1)
    assert len(run.kinds("device_returned")) == 1
    assert "it is gone" in str(run.errors[1])  # and its second part has no error


@pytest.mark.sampled(4)
@pytest.mark.parametrize("step", [0, 3, pytest.param(4, marks=pytest.mark.soak), 5])
@pytest.mark.parametrize("method", ["pipar", "mpsl"])
def test_where_gradients_are_summed_nothing_is_left_of_what_was_not_finite(
    tmp_path, monkeypatch, method, step
):
    """Also where all hosts have taken the step before they are told, as they may have."""
    made = shared(config(tmp_path, method, rounds=3, quorum=2))
    made.run.nonfinite = "drop"
    done = break_batch(monkeypatch, 1, step)
    run = OpenRun(made).run(range(3))
    assert done == [step]
    right(run)
    outs = [out for row in run.script() for out in row["out"]]
    assert outs == [{"place": 1, "step": step, "why": "nonfinite"}]
    weights = run.weights()
    assert all(np.isfinite(array).all() for array in weights.values())
    for name, array in replayed(tmp_path, made, run).items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-4, atol=1e-6)


# --- what a device says ---------------------------------------------------------------------------

#: Kinds that a host sends when it is asked, or by itself: those that ``HostReplies`` sends.
HONEST = 2
#: Liars of a run.
LIARS = 6


#: What hosts say to whoever asks them, past ``HostReplies``: see ``test_lies``.
OTHERS = {messages.JoinDevice, messages.JoinNode, messages.LookSeen, messages.Profiled,
          messages.Referenced, messages.Took}  # fmt: skip


@functools.cache
def all_lies():
    """Each number in each message of a host, replaced by the limits of what its field takes."""
    found = [
        (kind.made, path, value)
        for kind in KINDS.values()
        if kind.sender is Sender.HOST and kind.made not in OTHERS
        for path, spec in lies.numbers(struct(kind.made))
        for value in _limits(spec)
    ]
    random.Random(0).shuffle(found)
    return found


def _limits(spec):
    if isinstance(spec, Figure):
        return ["nan", 1e308, -1e308]
    assert isinstance(spec, Whole | Real)
    return [spec.least, spec.most]


def settings(folder, method):
    name, _, weights = method.partition(" ")
    samples = (14,) * (HONEST + LIARS)
    made = config(folder, name, rounds=2, samples=samples, quorum=1, wait_s=0.1)
    made.run.evaluate_every, made.run.nonfinite = 1, "drop"
    made.checkpoint.every_rounds, made.checkpoint.device_state = 1, "device"
    if weights:
        shared(made)
    return made, samples


def chunks():
    """Runs with some liars each: one for each method in `make test`, all of them in `make soak`."""
    for method in ("pipar shared", "mpsl shared", "fl", "sl"):
        for first in range(0, len(all_lies()), LIARS):
            marks = [pytest.mark.soak] * (first > 0)
            yield pytest.param(method, first, marks=marks, id=f"{method} {first}")


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(("method", "first"), list(chunks()))
def test_no_number_that_a_device_says_costs_another_one_its_part(
    tmp_path, monkeypatch, method, first
):
    made, samples = settings(tmp_path, method)
    liars = {f"d{HONEST + i}": lie for i, lie in enumerate(all_lies()[first : first + LIARS])}
    send, lied = HostReplies.send, set()

    def lie(self, said, states):
        kind, path, value = liars.get(self._name, (None, (), 0))
        if type(said) is kind and self._name not in lied:
            changed = lies.told(said, path, value)
            if changed is not None:
                lied.add(self._name)
                said = changed
        send(self, said, states)

    monkeypatch.setattr(HostReplies, "send", lie)
    run = OpenRun(made, samples).run(range(len(samples)))
    right(run, *range(HONEST, HONEST + LIARS))
    assert run.script()[-1]["commit"][:HONEST] == list(range(HONEST))


def test_a_ledger_at_its_budget_costs_its_own_device_its_part(tmp_path, monkeypatch):
    made = config(tmp_path, "fl", rounds=2, quorum=1, wait_s=0.1)
    made.privacy.epsilon, made.privacy.unit, made.privacy.update_clip = 8.0, "user", 0.5
    made.aggregation.weighted = False
    send = HostReplies.send

    def lie(self, said, states):
        if type(said) is messages.Stored and self._name == "d2":
            said = lies.told(said, ("spent",), 1e300)
        send(self, said, states)

    monkeypatch.setattr(HostReplies, "send", lie)
    run = OpenRun(made).run(range(3))
    right(run, 2)
    assert len(run.kinds("round_finished")) == 2 and not run.kinds("stopped")
    assert run.script()[-1]["commit"] == [0, 1]
    (lost,) = run.kinds("device_lost")
    assert "above privacy.epsilon=8" in lost["reason"]


def test_every_number_of_every_message_is_lied_about():
    kinds = {kind for kind, _, _ in all_lies()}
    for kind in (messages.Halted, messages.Rewound, messages.Stored, messages.Progress,
                 messages.NonFinite, messages.Met, messages.Dropped):  # fmt: skip
        assert kind in kinds
