"""A fuzzer against a live server, which must keep its limits and its honest peers."""

from __future__ import annotations

import contextlib
import gc
import queue
import random
import socket
import struct
import time
import zlib

import numpy as np
import psutil
import pytest

from comms import ChannelOptions, CodecError, Endpoint, Limits, Role, Tag
from comms.frame import HEADER_BYTES, PING, PONG, STATUS, Header, Kind, pack_header
from comms.greeting import Terms
from comms.handshake import ClientHandshake
from comms.incoming import pack_json
from tests.comms.conftest import admitting

LIMITS = Limits(message_bytes=1 << 20, control_bytes=1 << 14, bundle_tensors=8)
OPTIONS = ChannelOptions(limits=LIMITS, deadline_s=5.0, window_bytes=1 << 20, checksum=False)
EXTREMES = (0, 1, 2, 7, 255, 256, 2**16, 2**31, 2**32 - 1)
EXTREMES_64 = (*EXTREMES, 2**40, 2**63, 2**64 - 1)


class RawPeer:
    """Knows the handshake, and then sends whatever it is told."""

    def __init__(self, port: int, session: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        handshake = ClientHandshake(
            Terms(name="fuzzer", session=session, window_bytes=1 << 20), None, False
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


def valid_frames(rng: random.Random) -> list[tuple[Header, tuple[int, ...], bytes]]:
    """A correct stream of a few messages: header, shape and payload of each frame."""
    frames: list[tuple[Header, tuple[int, ...], bytes]] = []

    def add(header: Header, payload: bytes, shape: tuple[int, ...] = (), total: int = 0) -> None:
        sequence = 1 + sum(1 for each, _, _ in frames if each.sequence)
        numbered = header.kind in (Kind.TENSOR, Kind.CHUNK, Kind.CONTROL, Kind.MANIFEST)
        header = header._replace(
            sequence=sequence if numbered else 0, length=len(payload), total=total or len(payload)
        )
        frames.append((header, shape, payload))

    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(6)
        size = rng.randrange(0, 200)
        if kind == 0:
            add(Header(Kind.TENSOR, 1, 0, 11, 1), rng.randbytes(4 * size), (size,))
        elif kind == 1:
            add(Header(Kind.TENSOR, 3, 0, 6, 2), rng.randbytes(50), (10, 10), total=100)
            add(Header(Kind.CHUNK, offset=50), rng.randbytes(50), total=100)
        elif kind == 2:
            add(Header(Kind.CONTROL, flags=1), pack_json({"body": {"a": size}}))
        elif kind == 3:
            add(Header(Kind.MANIFEST, 4), pack_json({"name": "w", "tensors": ["x"], "body": {}}))
            add(Header(Kind.TENSOR, 4, 0, 11, 1, flags=2), rng.randbytes(8), (2,))
        elif kind == 4:
            codec = rng.choice((1, 4, 5, 7))
            bytes_of = {1: 32, 4: 4 + 16, 5: 4 + 8, 7: rng.randrange(8, 60)}[codec]
            header = Header(Kind.TENSOR, 3, codec, 11, 1, codec_parameter=16 * (codec > 1))
            add(header, rng.randbytes(bytes_of), (16,))
        else:
            add(Header(Kind.PING), PING.pack(1.0))
            add(Header(Kind.PONG), PONG.pack(1.0, 2.0, 3.0))
            add(Header(Kind.STATUS), STATUS.pack(0, 0, 1e6))
    return frames


def mutate(rng: random.Random, header: Header, shape: tuple[int, ...], payload: bytes) -> bytes:
    """Damages one frame; most of the time its CRC is right all the same."""
    way = rng.randrange(8)
    if way <= 3:
        for _ in range(rng.randrange(1, 3)):
            field = rng.randrange(len(header))
            name = header._fields[field]
            if name == "clock_s":
                value: float = rng.choice((0.0, -1.0, float("inf"), float("nan")))
            elif field <= 5:
                value = rng.randrange(256)
            elif name in ("sequence", "offset", "total", "length"):
                value = rng.choice(EXTREMES_64)
            else:
                value = rng.choice(EXTREMES)
            header = header._replace(**{name: value})
        return pack_header(header, shape) + payload
    if way == 4 and shape:
        shape = tuple(rng.choice(EXTREMES_64) for _ in shape)
        return pack_header(header, shape) + payload
    if way == 5:
        return pack_header(header, shape) + rng.randbytes(len(payload))
    data = bytearray(pack_header(header, shape) + payload)
    if way == 6:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.5:
            head = data[: HEADER_BYTES - 4] + data[HEADER_BYTES:][: 8 * min(data[10], 16)]
            data[HEADER_BYTES - 4 : HEADER_BYTES] = struct.pack("<I", zlib.crc32(head))
        return bytes(data)
    return rng.randbytes(rng.randrange(1, 300))


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
        "127.0.0.1", port, name_of_peer="server", timeout_s=5
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
        data = b"".join(pack_header(h, s) + p for h, s, p in stream[:victim])
        data += mutate(rng, *stream[victim])
        data += b"".join(pack_header(h, s) + p for h, s, p in stream[victim + 1 :])
        # Several fuzzed streams in one go: what follows a damaged frame is damage itself.
        data += b"".join(mutate(rng, *each) for each in stream)
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
            message = honest_messages.get(timeout=10)
            assert message.tag.step == step
            np.testing.assert_array_equal(message.array, array)
            message.release()
            step += 1
    assert server.loop.failure is None and honest.error is None and step > 0
    until = time.monotonic() + 10
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
