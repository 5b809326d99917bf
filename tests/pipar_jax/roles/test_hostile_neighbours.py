"""A device or node does what it should not on its links to neighbours, and goes alone.

Whole runs of three devices over a chain of two nodes and back. Device 0 is hostile in a way of each
test's own; nobody else is lost, and the weights are those of a run that loses it as the script has
it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from comms import ChannelError, Encoded, Role, Tag
from comms.codecs.bits import BitCodec
from pipar_jax.errors import ProtocolError
from pipar_jax.protocol import messages
from pipar_jax.roles import broken_links, membership, peer_links
from pipar_jax.roles.host_replies import HostReplies
from pipar_jax.roles.peer_links import PeerLinks
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.runtime.tensor_sender import TensorSender
from pipar_jax.schedule.plan import COORDINATOR, Boundary
from tests.patience import PATIENCE_S
from tests.pipar_jax.roles.open_runs import (
    OpenRun,
    before_batch,
    config,
    equal,
    pause_until_there,
    replayed,
    told,
)
from tests.pipar_jax.runtime import support

DEVICES = range(3)
FIRST, WIDTH = Boundary("d0", "n1", 0), 12
#: All links of the chains, by the node that waits for them or opens them.
LINKS = {
    "n1": (*(Boundary(f"d{i}", "n1", 0) for i in DEVICES), Boundary("n1", "n2", 1)),
    "n2": (*(Boundary("n2", f"d{i}", 2) for i in DEVICES), Boundary("n1", "n2", 1)),
}


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    yield support.chain()
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Whoever goes after a while goes soon: nobody else's link breaks here."""
    made = broken_links.BrokenLinks
    monkeypatch.setattr(membership, "BrokenLinks", lambda patience_s: made(0.5))


@pytest.fixture
def tables(monkeypatch):
    """The links of each host, as soon as it has any."""
    found, add = {}, LinkTable.add

    def note(self, boundary, link):
        add(self, boundary, link)
        found[self.host] = self

    monkeypatch.setattr(LinkTable, "add", note)
    return found


def setting(folder, rounds=4, **cohort):
    made = config(folder, "mpsl", rounds, **{"quorum": 2, **cohort})
    made.model.dtype = "float64"
    made.nodes.count, made.pipeline.cuts = 2, "1,2,3"
    return made


def lost_alone(run):
    """Checks that device 0 was lost, and nobody else; returns why."""
    assert run.error is None, run.error
    (lost,) = run.kinds("device_lost", "node_lost")
    assert lost.get("device") == 0, lost
    assert run.script()[-1]["commit"] == [1, 2]
    return lost["reason"]


def replays(made, network, run):
    """Returns whether a run that replays the script has the same weights."""
    made.name, made.cohort.script = "replay", str(run.folder / "membership.jsonl")
    again = OpenRun(made, network=network).run(DEVICES)
    assert again.error is None, again.error
    assert not again.kinds("device_lost", "node_lost") and again.script() == run.script()
    return equal(again.weights(), run.weights())


def instead(monkeypatch, method, wanted, change):
    """Sends something else once: the first tensor of device 0 from a step on that is wanted."""
    send, done = getattr(TensorSender, method), []

    def changed(self, action, target, part, parcel, *rest):
        boundary = getattr(target, "target", target)
        if action.device == 0 and action.step >= 2 and wanted(boundary) and not done:
            done.append(action)
            contents = parcel.contents()
            parcel = SimpleNamespace(
                contents=lambda: change(contents), codec="raw", array_bytes=contents.nbytes
            )
        send(self, action, target, part, parcel, *rest)

    monkeypatch.setattr(TensorSender, method, changed)
    return done


def of_another_type(contents):
    return np.asarray(contents).view(np.int64 if contents.itemsize == 8 else np.int32)


def not_decodable(contents):
    return Encoded("bits:8", np.full(64, 255, np.uint8), contents.dtype, contents.shape)


@pytest.mark.parametrize("checked", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_payload_that_the_server_cannot_decode_costs_a_device_and_not_the_run(
    tmp_path, monkeypatch, checked
):
    """Even where a codec's own check is wrong, and it is computed with before that is noticed."""
    made = config(tmp_path, "pipar", quorum=2)
    made.pipeline.activation_codec = "bits:8"
    with monkeypatch.context() as patch:
        if not checked:
            patch.setattr(BitCodec, "check_payload", lambda *payload: None)
        sent = instead(patch, "send_up", lambda one: one.lower == "d0", not_decodable)
        run = OpenRun(made).run(DEVICES)
    assert sent
    reason = lost_alone(run)
    assert reason.startswith("device 0 sent a tensor (") and "cannot be read" in reason
    assert equal(replayed(tmp_path, made, run), run.weights())


def test_a_tensor_of_another_type_costs_its_sender(tmp_path, monkeypatch, network):
    made = setting(tmp_path)
    with monkeypatch.context() as patch:
        sent = instead(patch, "send_up", lambda one: one == FIRST, of_another_type)
        run = OpenRun(made, network=network).run(DEVICES)
    assert sent
    reason = lost_alone(run)
    assert reason.startswith("device 0 sent compute node 1 a tensor (") and "int64" in reason
    assert replays(made, network, run)


def test_a_payload_that_cannot_be_decoded_costs_its_sender(tmp_path, monkeypatch, network):
    made = setting(tmp_path)
    made.pipeline.activation_codec = "bits:8"
    with monkeypatch.context() as patch:
        sent = instead(patch, "send_up", lambda one: one == FIRST, not_decodable)
        run = OpenRun(made, network=network).run(DEVICES)
    assert sent
    reason = lost_alone(run)
    assert reason.startswith("device 0 sent compute node 1 a tensor (")
    assert "cannot be read" in reason
    assert replays(made, network, run)


def without_credit(link):
    link.stream.queue.window_bytes = 1 << 40
    tag = Tag(role=Role.ACTIVATION, stage=1, micro_batches=2, samples=4, batch_samples=7,
              attempt=2**31)  # fmt: skip
    for _ in range(64):  # of a round to come: they wait there
        link.send(tag, np.zeros((4, WIDTH)))


def cut(link):
    link.stream.connection.transport.socket.shutdown(socket.SHUT_RDWR)


def say_goodbye(link):
    link.close("it leaves this neighbour alone")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("act", "says"),
    [(without_credit, "device 0 sent compute node 1 what breaks the channel's protocol: "),
     (cut, "the link between device 0 and compute node 1 has ended, although both are there: "),
     (say_goodbye, "the link between device 0 and compute node 1 has ended")],
)  # fmt: skip
def test_what_a_device_does_to_a_link_costs_the_device(
    tmp_path, monkeypatch, network, tables, act, says
):
    """It says nothing of it to the coordinator, and stays a member."""
    made = setting(tmp_path)
    made.pipeline.window_mb = 0.004
    send = HostReplies.send

    def silent(self, said, states):
        if not (self._name == "d0" and isinstance(said, messages.NeighbourLost)):
            send(self, said, states)

    def go():
        with contextlib.suppress(ChannelError):
            act(tables["d0"].link_for(FIRST))

    with monkeypatch.context() as patch:
        patch.setattr(HostReplies, "send", silent)
        before_batch(patch, 0, 2, go)
        run = OpenRun(made, network=network).run(DEVICES)
    assert lost_alone(run).startswith(says)
    assert replays(made, network, run)


def test_a_device_that_does_not_dial_costs_the_device(tmp_path, monkeypatch, network, tables):
    """It says that it has met its neighbours, which wait for it."""
    connect = PeerLinks.connect

    def nowhere(self, number, boundaries, addresses, anew=()):
        hostile = self.link_table.host == "d0"
        connect(self, number, () if hostile else boundaries, addresses, anew)

    def late():
        """The time, but long after once all others have come."""
        missing = [one for node in LINKS for one in (
            tables[node].missing(LINKS[node]) if node in tables else LINKS[node])]  # fmt: skip
        only = {name for one in missing for name in one[:2]} == {"d0", "n1", "n2"}
        return time.monotonic() + 1e6 * (only and len(missing) == 2)

    made = setting(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PeerLinks, "connect", nowhere)
        patch.setattr(peer_links, "time", SimpleNamespace(monotonic=late))
        run = OpenRun(made, network=network).run(DEVICES)
    assert "device 0 did not connect to compute node" in lost_alone(run)
    assert all(row["commit"] == [1, 2] for row in run.script())
    assert replays(made, network, run)


def test_what_a_device_sends_once_it_is_lost_is_of_no_importance(
    tmp_path, monkeypatch, network, tables
):
    """It keeps its links to neighbours for as long as it likes."""
    made = setting(tmp_path)
    ended = []

    def go():
        tables["d0"].control[COORDINATOR].send_control({"type": "nonsense"})
        told(run, "device_lost", 1)
        link = tables["d0"].link_for(FIRST)
        with contextlib.suppress(ChannelError):
            link.send(Tag(role=Role.WEIGHT), np.zeros(3))
        ended.append(link.wait_closed(PATIENCE_S))

    run = OpenRun(made, network=network)
    with monkeypatch.context() as patch:
        before_batch(patch, 0, 2, go)
        run.run(DEVICES)
    assert ended == [True]
    assert "nonsense" in lost_alone(run)
    assert replays(made, network, run)


@pytest.mark.soak
def test_a_device_lives_on_when_a_node_sends_it_what_it_must_not(tmp_path, monkeypatch, network):
    """What it says of the node is not believed of one device alone: it goes, and comes back."""
    made = setting(tmp_path, rounds=12, wait_s=0.2)
    made.network.rejoin_s = 60.0
    with monkeypatch.context() as patch:
        sent = instead(patch, "send_down", lambda one: one == FIRST, of_another_type)
        run = OpenRun(made, when=pause_until_there(), network=network).run(DEVICES)
    assert sent
    assert run.error is None and not run.errors
    (lost,) = run.kinds("device_lost", "node_lost")
    assert lost["device"] == 0 and "compute node 1 has ended" in lost["reason"]
    assert "a tensor (" in lost["reason"]
    assert [one["device"] for one in run.kinds("device_returned")] == [0]
    assert run.script()[-1]["commit"] == [0, 1, 2]
    assert replays(made, network, run)


def test_a_run_that_needs_the_device_ends_and_names_it(tmp_path, monkeypatch, network):
    """The node that has ended the link could be replaced, and is not to blame."""
    made = setting(tmp_path, quorum=0)
    made.nodes.replicate_every = 1
    instead(monkeypatch, "send_up", lambda one: one == FIRST, of_another_type)
    run = OpenRun(made, network=network).run(DEVICES)
    assert isinstance(run.error, ProtocolError)
    assert str(run.error).startswith("device 0 sent compute node 1 a tensor (")
    assert not run.kinds("node_lost")
