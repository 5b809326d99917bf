"""A bit that flips on the way is noticed, and mended where the stream can resume."""

from __future__ import annotations

import contextlib
import queue
import random

import numpy as np
import pytest

from comms import ChannelOptions, PeerLost, Role, Tag
from comms.wire.frame import HEADER_BYTES, checksum_of
from tests.comms.conftest import tls
from tests.comms.proxy import Proxy
from tests.comms.test_frames import Pipe, Received, outbox_of, outgoing, pump

ARRAY = np.arange(40_000, dtype=np.float32)


class Flipper:
    """A transport's receive that changes one bit of what it reads, `times` times.

    Args:
        transport: where it reads.
        after_bytes: how many bytes are read before the next bit is changed.
        times: how many bits are changed.
    """

    def __init__(self, after_bytes: int, times: int) -> None:
        self.after_bytes, self.times, self.left = after_bytes, times, after_bytes
        self.flipped = 0

    def spoil(self, views, count):
        self.left -= count
        if self.left > 0 or self.flipped == self.times:
            return
        self.left = self.after_bytes
        self.flipped += 1
        view = next(view for view in views if len(view))
        view[min(count, len(view)) - 1] ^= 4


def spoil(link, flipper):
    """Has a link read through a flipper, on this and every later connection."""
    attach = link.stream.attach

    def tap(transport):
        receive = transport.receive

        def read(first, then=None):
            count = receive(first, then)
            if count:
                flipper.spoil((first, then or memoryview(b"")), count)
            return count

        transport.receive = read

    def attach_and_tap(transport, leftover, terms):
        tap(transport)
        attach(transport, leftover, terms)

    link.stream.attach = attach_and_tap
    tap(link.stream.transport)


def test_a_flipped_bit_is_mended_by_resuming(workshop):
    pair = workshop.pair(ChannelOptions(resume_s=20.0))
    flipper = Flipper(after_bytes=300_000, times=6)
    spoil(pair.down, flipper)
    for step in range(20):
        pair.up.send(Tag(role=Role.ACTIVATION, step=step), ARRAY + step)
    for step in range(20):
        np.testing.assert_array_equal(pair.at_server.take_array(), ARRAY + step)
    assert flipper.flipped == 6 and pair.up.stats().reconnects >= 1


def test_a_flipped_bit_ends_a_link_that_cannot_resume_and_its_line_says_so(workshop):
    pair = workshop.pair()
    spoil(pair.down, Flipper(after_bytes=100_000, times=1))
    # The sender may hear of the end before it has sent all.
    with contextlib.suppress(PeerLost):
        for step in range(5):
            pair.up.send(Tag(role=Role.ACTIVATION, step=step), ARRAY)
    error = pair.at_server.take_lost()
    assert isinstance(error, PeerLost) and "damaged in transit" in str(error)
    assert "d0" in str(error) and "resume_s above 0" in str(error)


def test_a_link_that_only_damages_is_given_up(workshop):
    pair = workshop.pair(ChannelOptions(resume_s=20.0))
    spoil(pair.down, Flipper(after_bytes=1, times=1 << 30))
    pair.up.send(Tag(role=Role.ACTIVATION), ARRAY)
    assert "damaged in transit" in str(pair.at_server.take_lost())


def flip_everywhere(checked):
    """Flips one bit of a stream at each place in turn; returns where nothing noticed it."""

    def stream():
        outbox = outbox_of(lambda: bytes(24), keep=False, replay_bytes=1, checked=checked)
        outbox.pace.rate_bytes, outbox.pace.chunk_bytes = 1e9, 40
        outbox.status_due = outbox.ping_due = True
        outbox.pongs.append((1.0, 2.0))
        outbox.queue.data.append(outgoing(np.arange(30, dtype=np.int32), Tag(role=Role.LABEL)))
        outbox.say_goodbye(b'{"reason": "over"}')
        pipe = Pipe([1 << 20])
        outbox.flush(pipe, 1 << 40)
        return bytes(pipe.data), outbox.writer.frames_out

    (whole, frames), unnoticed = stream(), []
    for at in range(len(whole)):
        received = Received()
        received.inbox.checked = checked
        pipe = Pipe(iter([1 << 20] * 10_000))
        pipe.data += whole
        pipe.data[at] ^= 16
        try:
            pump(received.inbox, pipe)
        except Exception as error:
            assert type(error).__name__ == "DamageError", (at, error)
        else:
            if received.inbox.frames_in == frames:  # else it waits for what a damaged rank promises
                unnoticed.append(at)
    return unnoticed


def test_every_byte_of_every_kind_of_frame_is_covered():
    assert len(flip_everywhere(False)) > 120, "the payloads: nothing covers them"
    assert flip_everywhere(True) == []


def test_what_a_cut_connection_brought_is_checked_with_the_rest():
    """Damage in the part before the cut: the whole frame is sent again."""
    outbox = outbox_of(lambda: b"", keep=True, replay_bytes=1 << 20, checked=True)
    outbox.pace.rate_bytes, outbox.pace.chunk_bytes = 1e9, 4096
    received = Received()
    received.inbox.checked = True
    array = np.arange(512, dtype=np.int32)
    outbox.queue.data.append(outgoing(array, Tag(role=Role.LABEL)))
    pieces = lambda: iter([1 << 20] * 1000)  # noqa: E731
    pipe = Pipe(pieces())
    outbox.flush(pipe, 1 << 40)
    pipe.data[HEADER_BYTES + 8 + 50] ^= 1
    del pipe.data[HEADER_BYTES + 8 + 100 :]
    pump(received.inbox, pipe)
    received.inbox.settle()
    assert received.inbox.partial_bytes == 100
    for expected in ("damage", "whole"):
        outbox.restart(received.inbox.received, received.inbox.partial_bytes, 0.0)
        outbox.status_due = False
        pipe = Pipe(pieces())
        outbox.flush(pipe, 1 << 40)
        try:
            pump(received.inbox, pipe)
        except Exception as error:
            assert expected == "damage" and "does not match its checksum" in str(error)
            received.inbox.settle()
            assert received.inbox.partial_bytes == 0
    np.testing.assert_array_equal(received.tensors[0].payload().array, array)


@pytest.mark.parametrize(
    ("at_server", "at_client", "secure", "expected"),
    [
        (None, None, False, True),
        (None, None, True, False),
        (False, False, False, False),
        (True, False, False, True),
        (False, True, False, True),
        (False, True, True, True),
    ],
)
def test_either_side_may_ask_and_tls_needs_none(
    workshop, certificates, at_server, at_client, secure, expected
):
    files, _ = certificates
    pair = workshop.pair(
        ChannelOptions(checksum=at_server, tls=tls(files, "server").tls if secure else None),
        client_options=ChannelOptions(checksum=at_client, tls=tls(files).tls if secure else None),
    )
    for link in (pair.up, pair.down):
        stream = link.stream
        assert (stream.outbox.checked, stream.inbox.checked) == (expected, expected)
    pair.up.send(Tag(role=Role.ACTIVATION), ARRAY)
    np.testing.assert_array_equal(pair.at_server.take_array(), ARRAY)


def test_a_frame_without_the_checksum_that_was_agreed_on_ends_the_link(workshop):
    pair = workshop.pair()
    pair.client.loop.post(lambda: setattr(pair.up.stream.outbox, "checked", False))
    pair.up.send(Tag(role=Role.ACTIVATION), ARRAY)
    assert "without a checksum" in str(pair.at_server.take_lost())


def test_the_checksum_is_xxh3():
    assert checksum_of(b"") == 0x2D06800538D394C2


def test_streams_through_faults_of_all_kinds_and_flipped_bits(workshop):
    rng, proxies = random.Random(5), []

    def through(port):
        proxies.append(Proxy(port, ["close", "reset"], (20_000, 400_000), 7, 12).__enter__())
        return proxies[0].port

    options = ChannelOptions(deadline_s=2.0, resume_s=20.0, replay_bytes=1 << 20)
    pair = workshop.pair(options, through=through)
    spoil(pair.down, Flipper(after_bytes=700_000, times=8))
    spoil(pair.up, Flipper(after_bytes=600_000, times=8))
    done: queue.Queue = queue.Queue()
    arrays = [ARRAY[: rng.randrange(1, ARRAY.size)] for _ in range(60)]
    for step, array in enumerate(arrays):
        for link in (pair.up, pair.down):
            link.send(Tag(role=Role.WEIGHT, step=step), array, on_sent=lambda *_: done.put(1))
    for step, array in enumerate(arrays):
        for at in (pair.at_server, pair.at_client):
            message = at.take(60)
            assert message.tag.step == step
            np.testing.assert_array_equal(message.array, array)
            message.release()
    pair.client.close()
    proxies[0].__exit__(None, None, None)
