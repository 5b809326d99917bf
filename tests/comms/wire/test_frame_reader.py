"""Bytes to frames: waking late loses no frame, and large payloads land where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.link.allowance import Allowance
from comms.link.inbox import Inbox
from comms.options import Limits
from comms.wire.buffers import BufferPool
from comms.wire.frame import HEADER_BYTES, Header, Kind, Role, dtype_code, pack_header
from comms.wire.frame_reader import FrameReader


class Line:
    """A connection whose selector reports it only from `wake_bytes` on, as a socket's does."""

    def __init__(self):
        self.data = bytearray()
        self.wake_bytes = 1
        self.offered = []

    def wake_at(self, nbytes):
        self.wake_bytes = nbytes

    def receive(self, first, then=None):
        self.offered.append(len(first))
        if not self.data:
            return None
        count = 0
        for view in (first,) if then is None else (first, then):
            part = min(len(view), len(self.data))
            view[:part] = self.data[:part]
            del self.data[:part]
            count += part
        return count


class Sink:
    """Keeps the payloads; with each frame it expects what the test says."""

    def __init__(self, expectations):
        self.expectations = expectations
        self.payloads = []
        self.reader = FrameReader(self.begin, self.end)

    def begin(self, header, shape):
        self.reader.expect(*self.expectations[len(self.payloads) % len(self.expectations)])
        self.target = bytearray(header.length)
        return memoryview(self.target)

    def end(self, header):
        self.payloads.append(bytes(self.target))


def frame(payload):
    header = Header(Kind.CHUNK, sequence=1, total=len(payload), length=len(payload))
    return pack_header(header) + payload


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60_000), min_size=1, max_size=8),
    arrivals=st.lists(st.integers(1, 40_000), min_size=1, max_size=8),
    expectations=st.lists(
        st.tuples(st.integers(HEADER_BYTES, 200), st.integers(1, 50_000)), min_size=1, max_size=4
    ),
    budget=st.integers(1, 100_000),
)
def test_no_frame_waits_for_bytes_that_never_come(sizes, arrivals, expectations, budget):
    """Whatever is expected, a reader woken only when it asked to be gets every frame."""
    payloads = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    stream = b"".join(map(frame, payloads))
    line, sink, at, turn = Line(), Sink(expectations), 0, 0
    while at < len(stream):
        count = arrivals[turn % len(arrivals)]
        line.data += stream[at : at + count]
        at, turn = at + count, turn + 1
        if len(line.data) >= line.wake_bytes:
            while sink.reader.pump(line, budget):
                pass
    assert sink.payloads == payloads
    assert line.wake_bytes == 1 and not line.data


def test_a_payload_behind_a_large_one_is_read_into_place_from_its_first_byte():
    size = 100_000
    line, sink = Line(), Sink([(HEADER_BYTES, 1)])
    line.data += frame(b"a" * size) * 3
    while sink.reader.pump(line, 1 << 30):
        pass
    assert len(sink.payloads) == 3
    # Part of the first was staged with its head; the others were offered whole.
    assert line.offered.count(size) == 2


@pytest.mark.parametrize(
    ("rate", "size", "wake"),
    [
        (None, 1 << 20, 1),
        (10e6, 1 << 20, 1),
        (200e6, 1 << 20, 100_000),
        (4e9, 1 << 20, 1 << 19),
        (4e9, 1 << 15, 1),
    ],
)
def test_only_large_frames_on_fast_links_gather(rate, size, wake):
    """Half a millisecond's bytes, from 64 KiB to 512 KiB, behind a frame of 64 KiB and more."""
    tensors = []
    inbox = Inbox(
        Limits(), Allowance.of(Limits()), 1 << 30, BufferPool(0), False,
        on_tensor=tensors.append, on_bundle=tensors.append,
        on_signal=lambda *signal: None, on_control=lambda *body: None,
    )  # fmt: skip

    class Rate:
        bytes_per_s = rate

        def add(self, *frame):
            pass

        def restart(self):
            pass

    inbox.rate = Rate()
    line, array = Line(), np.zeros(size, np.uint8)

    def tensor(sequence):
        header = Header(
            Kind.TENSOR, int(Role.ACTIVATION), dtype=dtype_code(array.dtype), rank=1,
            sequence=sequence, total=size, length=size,
        )  # fmt: skip
        return pack_header(header, array.shape) + array.tobytes()

    line.data += tensor(1) + tensor(2)[: HEADER_BYTES + 8 + size // 4]
    while inbox.pump(line, 1 << 30):
        pass
    assert len(tensors) == 1 and line.wake_bytes == wake
    # After a cut the link may be another one: every byte that it brings counts again.
    inbox.restart(b"")
    line.data += tensor(3)[: HEADER_BYTES + 8 + size // 4]
    inbox.received += 1
    inbox._lanes[0] = None
    inbox.pump(line, 1 << 30)
    assert line.wake_bytes == 1
