"""A fuzzer against a live server, which must keep its limits and its honest peers."""

from __future__ import annotations

import contextlib
import gc
import queue
import random
import socket
import struct
import time

import numpy as np
import psutil
import pytest

from comms import ChannelOptions, CodecError, Endpoint, Limits, Role, Tag
from comms.wire.greeting import Terms
from comms.wire.handshake import ClientHandshake
from tests.comms.conftest import admitting
from tests.comms.fuzzing import mutate, pack, valid_frames
from tests.patience import PATIENCE_S

LIMITS = Limits(message_bytes=1 << 20, control_bytes=1 << 14, bundle_tensors=8)
OPTIONS = ChannelOptions(limits=LIMITS, deadline_s=5.0, window_bytes=1 << 20, checksum=False)


class RawPeer:
    """Knows the handshake, and then sends whatever it is told."""

    def __init__(self, port: int, session: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        handshake = ClientHandshake(
            Terms(name="fuzzer", session=session, window_bytes=1 << 20), None
        )
        self.socket.sendall(handshake.opening)
        while not handshake.done:
            data = self.socket.recv(4096)
            assert data, "the server closed during the handshake"
            self.socket.sendall(handshake.feed(data))

    def close(self) -> None:
        # A reset, so that thousands of connections do not leave thousands of waiting ports.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def read_and_release(message) -> None:
    """Decodes what arrived, as a consumer does; a payload that is none is an error of its own."""
    for payload in message.payloads.values() if message.kind != "control" else ():
        with contextlib.suppress(CodecError):
            assert payload.array.nbytes <= LIMITS.message_bytes
    message.release()


def fuzz(workshop, frames: int, seed: int) -> None:
    rng = random.Random(seed)
    server: Endpoint = workshop.endpoint("server", OPTIONS)
    honest_messages: queue.Queue = queue.Queue()
    honest_links: queue.Queue = queue.Queue()

    def on_link(link):
        if link.peer == "honest":
            link.start(honest_messages.put, lambda: None, lambda error: None)
            honest_links.put(link)
        else:
            link.start(read_and_release, lambda: None, lambda error: None)

    _, port = server.listen("127.0.0.1", 0, admitting(on_link))
    honest = workshop.endpoint("honest").connect(
        "127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S
    )
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    sent = connections = step = 0
    while sent < frames:
        assert server.loop.failure is None, "the server's thread has died"
        peer = RawPeer(port, f"{rng.getrandbits(128):032x}")
        connections += 1
        stream = valid_frames(rng)
        victim = rng.randrange(len(stream))
        data = b"".join(pack(part) for part in stream[:victim])
        data += mutate(rng, stream[victim])
        data += b"".join(pack(part) for part in stream[victim + 1 :])
        # Several fuzzed streams in one go: what follows a damaged frame is damage itself.
        data += b"".join(mutate(rng, part) for part in stream)
        sent += 1  # the victim; whether the rest is still read depends on what was done to it
        with contextlib.suppress(OSError):  # the server may have closed already, as it should
            peer.socket.sendall(data)
        if connections % 4 == 0:
            peer.socket.settimeout(10)
            try:
                peer.socket.shutdown(socket.SHUT_WR)
                while peer.socket.recv(1 << 16):
                    pass  # ends when the server closes, which it must
            except (ConnectionError, OSError) as error:
                assert not isinstance(error, TimeoutError), "the server hangs on to a bad peer"
        peer.close()
        if connections % 50 == 0:
            array = np.full(1000, step, np.int32)
            honest.send(Tag(role=Role.ACTIVATION, step=step), array)
            message = honest_messages.get(timeout=PATIENCE_S)
            assert message.tag.step == step
            np.testing.assert_array_equal(message.array, array)
            message.release()
            step += 1
    assert server.loop.failure is None and honest.error is None and step > 0
    until = time.monotonic() + PATIENCE_S
    while len(server.links) > 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(server.links) == 1, "links of dead peers are left"
    gc.collect()
    grown = process.memory_info().rss - before
    assert grown < 48 << 20, f"grew by {grown >> 20} MiB"


def test_a_server_withstands_mutated_frames(workshop):
    fuzz(workshop, 2500, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_server_withstands_two_hundred_thousand_mutated_frames(workshop):
    fuzz(workshop, 200_000, seed=2)
