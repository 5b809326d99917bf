"""What the coordinator makes of links that end while it sends."""

import threading

import pytest

from comms import Endpoint, PeerClosed
from pipar_jax.errors import PeerError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages
from pipar_jax.roles.members import Member, Members
from tests.pipar_jax.runtime import support


class Gone:
    """A link whose peer has said goodbye."""

    def send_control(self, body):
        raise PeerClosed("d0 closed the link")

    def send_bundle(self, *args, **kwargs):
        raise PeerClosed("d0 closed the link")


@pytest.fixture
def members(tmp_path, monkeypatch):
    monkeypatch.setattr("pipar_jax.roles.members.LAST_WORDS_S", 0.05)  # there are none
    endpoint = Endpoint("server")
    network = support.model("mlp", "float32")
    made = Members(
        resolve(support.config(tmp_path, (17, 12))), network, endpoint,
        tensors=lambda message: None, wake=lambda: None, tell=lambda event: None,
        stop=threading.Event(),
    )  # fmt: skip
    made.by_name["d0"] = Member(Gone(), None)
    made._names[made.by_name["d0"].link] = "d0"
    yield made
    endpoint.close()


@pytest.mark.parametrize(
    "send",
    [
        lambda members: members.broadcast(messages.Finish()),
        lambda members: members.send("d0", messages.Calibrate()),
        lambda members: members.send_bundle("d0", messages.Store(), {}),
    ],
    ids=["broadcast", "control", "bundle"],
)
def test_a_send_that_finds_the_link_gone_is_a_lost_peer(members, send):
    with pytest.raises(PeerError, match=r"a device was lost: d0 closed the link"):
        send(members)


def test_a_host_thread_that_finds_the_link_gone_is_a_lost_peer_too(members):
    members.local_failure(PeerClosed("d0 closed the link"))
    with pytest.raises(PeerError, match="a device was lost: d0 closed the link"):
        members.look()


def test_the_mail_about_the_end_says_more_than_the_send_that_noticed_it(members):
    link = members.by_name["d0"].link
    members._inbox.put(("lost", link, PeerClosed("its data ended")))
    with pytest.raises(PeerError, match="device 0 was lost: its data ended"):
        members.broadcast(messages.Finish())
