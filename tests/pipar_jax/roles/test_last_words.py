"""What is said last, and in which order: nobody guesses where somebody has told the reason."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from comms import PeerClosed, PeerLost, Role, Tag
from pipar_jax.errors import JoinError, PeerError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import Form, kind_of
from pipar_jax.roles import rights
from pipar_jax.roles.host_replies import HostReplies
from pipar_jax.roles.rights import EarlyTensors
from pipar_jax.roles.worker import Worker
from pipar_jax.runtime.state_files import StateFiles, StateTag
from pipar_jax.schedule.plan import COORDINATOR
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.runtime import support


class Ended(fakes.Link):
    """A link that has ended with mail that nobody has read, which a send notices."""

    def __init__(self, *said):
        super().__init__(COORDINATOR)
        self.last = said

    def start(self, on_message, on_credit, on_lost):
        super().start(on_message, on_credit, on_lost)
        for said in self.last:
            on_message(fakes.control(self, registry.encode(said)))
        self.ended, self.error = "gone", PeerLost("lost the server")
        on_lost(self.error)


def joining(alone, tmp_path, *said):
    """Returns what ends a device whose first send finds its link ended."""
    alone.connect = lambda *of, **how: Ended(*said)
    network = support.model("mlp", "float32")
    made = resolve(support.config(tmp_path, (14, 14), dtype="float32"))
    one = Worker(made, "d0", network, support.batches(made, (14, 14))[0])
    with pytest.raises((PeerError, JoinError)) as error:
        one.run(("127.0.0.1", 1), messages.Finish(), 1.0)
    return error.value


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("made", "kind"), [(messages.Abort, PeerError),
                                            (messages.Refused, JoinError)])  # fmt: skip
def test_a_send_that_notices_the_end_first_gives_the_coordinators_reason(
    alone, tmp_path, made, kind, again
):
    error = joining(alone, tmp_path, messages.Pulse(3), made("that is why", again))
    assert isinstance(error, kind) and "that is why" in str(error) and error.again is again


def test_a_coordinator_that_said_nothing_was_lost(alone, tmp_path):
    error = joining(alone, tmp_path, messages.Pulse(3))
    assert "lost the coordinator" in str(error) and error.again


def test_a_state_that_is_kept_after_the_end_ends_nothing_more(tmp_path):
    told = []

    def done(tag, reason):
        told.append((tag, reason))
        raise PeerClosed("the server is gone")

    files = StateFiles("d0", [tmp_path], done)
    tags = [StateTag("ab", 1), StateTag("ab", 2)]
    for tag in tags:
        files.save(tag, {"w": np.zeros(3)})
    files.close()
    assert told == [(tag, None) for tag in tags]


@pytest.mark.parametrize("said", [messages.Dropped(1), messages.Rewound(1, 2)], ids=repr)
def test_what_has_to_come_behind_weights_is_sent_behind_them(said):
    """A control message overtakes bundles, and would make those that it overtakes unexpected."""
    sent = []
    link = SimpleNamespace(
        send_control=lambda body: sent.append(("control", body)),
        send_bundle=lambda name, tensors, body, on_sent, codec: sent.append((name, body)),
    )
    made = HostReplies(
        "d0", lambda: link, SimpleNamespace(replied=lambda said: None), None, codec="raw",
        traced=False,
    )  # fmt: skip
    made.send(said, {})
    assert sent == [(kind_of(type(said)).name, registry.encode(said))]
    assert kind_of(type(said)).form is Form.EITHER


def tensor(role, nbytes):
    return SimpleNamespace(tag=Tag(role=role), nbytes=nbytes)


@pytest.mark.parametrize("role", [Role.LABEL, Role.SIDE])
def test_what_a_neighbour_sends_ahead_is_bounded_for_it_alone(role, monkeypatch):
    early, half = EarlyTensors(), rights.MOST_AHEAD_BYTES // 2
    kept = [early.add("d0", tensor(role, half), None) for _ in range(3)]
    assert kept == [True, True, False]
    assert early.add("d1", tensor(role, half), None)  # an innocent one
    # Others wait within the credit of their link.
    assert all(early.add("d2", tensor(Role.ACTIVATION, 10 * half), None) for _ in range(2))
    monkeypatch.setattr(rights, "MOST_AHEAD", 2)
    assert not early.add("d2", tensor(Role.ACTIVATION, 1), None)
    assert [peer for peer, *_ in early.take()] == ["d0", "d0", "d1", "d2", "d2"]
    assert not early.take() and early.add("d2", tensor(role, half), None)
