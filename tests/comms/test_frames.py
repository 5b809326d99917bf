"""Headers and the frames of whole messages, against any value and any damage."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms import Allowance, ChannelError, FrameError, Limits, Role, Tag
from comms.link.inbox import Inbox
from comms.link.incoming import pack_json
from comms.link.outbox import Outbox
from comms.link.outgoing import Outgoing, Sending
from comms.link.send_queue import SendQueue
from comms.wire.buffers import BufferPool
from comms.wire.frame import (
    DTYPES,
    HEADER_BYTES,
    MAGIC,
    MAX_CLOCK_S,
    Header,
    Kind,
    dtype_code,
    pack_header,
    tag_fields,
    unpack_header,
)
from comms.wire.transport import ConnectionEnded

U8, U32 = st.integers(0, 255), st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


@st.composite
def headers(draw):
    length = draw(st.integers(0, 2**40))
    offset = draw(st.integers(0, 2**40))
    return Header(
        kind=draw(st.sampled_from(list(Kind))), role=draw(st.sampled_from(list(Role))),
        codec=draw(U8),
        dtype=draw(U8), rank=draw(st.integers(0, 16)), flags=draw(st.integers(0, 15)),
        device=draw(U32), stage=draw(U32), step=draw(U32), micro_batch=draw(U32),
        micro_batches=draw(U32), samples_before=draw(U32), samples=draw(U32),
        batch_samples=draw(U32), attempt=draw(U32), part=draw(U32), sequence=draw(U64),
        offset=offset, total=offset + length + draw(st.integers(0, 2**40)), length=length,
        clock_s=draw(st.floats(-MAX_CLOCK_S, MAX_CLOCK_S)), codec_parameter=draw(U32),
        checksum=draw(U64),
    )  # fmt: skip


@given(header=headers(), data=st.data())
def test_a_header_and_its_shape_come_back(header, data):
    shape = tuple(data.draw(st.lists(U64, min_size=header.rank, max_size=header.rank)))
    packed = pack_header(header, shape)
    assert len(packed) == HEADER_BYTES + 8 * header.rank
    assert unpack_header(packed) == (header, shape)
    if header.rank:
        assert unpack_header(packed[:-1]) is None
    assert tag_fields(header.tag()) == header[6:15]


@given(header=headers(), at=st.integers(0, HEADER_BYTES + 8 * 16 - 1), flip=st.integers(1, 255))
def test_any_damaged_byte_of_a_header_or_shape_is_noticed(header, at, flip):
    packed = bytearray(pack_header(header, tuple(range(header.rank))))
    at %= len(packed)
    packed[at] ^= flip
    with pytest.raises(FrameError):  # whatever follows: a damaged rank may ask for more
        unpack_header(packed + bytes(8 * 16))


@pytest.mark.parametrize("clock_s", [float("nan"), float("inf"), -float("inf"), 1.1e12])
def test_a_clock_shows_a_time(clock_s):
    with pytest.raises(FrameError, match="clock"):
        unpack_header(pack_header(Header(Kind.PING, clock_s=clock_s)))


@given(data=st.binary(min_size=HEADER_BYTES, max_size=200))
def test_random_bytes_are_no_header(data):
    with pytest.raises(FrameError):
        unpack_header(data + bytes(8 * 16))


def test_the_layout_is_as_documented():
    header = Header(
        kind=1, role=2, codec=3, dtype=4, rank=1, flags=5, device=6, stage=7, step=8, micro_batch=9,
        micro_batches=10, samples_before=11, samples=12, batch_samples=13, attempt=21, part=14,
        sequence=15,
        offset=0, total=17, length=16, clock_s=1.0, codec_parameter=18,
        checksum=20,
    )  # fmt: skip
    packed = pack_header(header, (19,))
    fields = {
        (0, 4): MAGIC, (4, 2): 4, (6, 1): 1, (7, 1): 2, (8, 1): 3, (9, 1): 4, (10, 1): 1,
        (11, 1): 5, (12, 4): 6, (16, 4): 7, (20, 4): 8, (24, 4): 9, (28, 4): 10,
        (32, 4): 11, (36, 4): 12,
        (40, 4): 13, (44, 4): 21, (48, 4): 14, (52, 8): 15, (60, 8): 0, (68, 8): 17,
        (76, 8): 16, (84, 8): 0x3FF0000000000000, (92, 4): 18, (96, 8): 20,
        (104, 4): zlib.crc32(packed[:104] + packed[108:]), (108, 8): 19,
    }  # fmt: skip
    for (at, width), value in fields.items():
        expected = value if isinstance(value, bytes) else value.to_bytes(width, "little")
        assert packed[at : at + width] == expected, at


def test_every_element_type_has_a_number_of_its_own():
    assert {dtype_code(dtype) for dtype in DTYPES.values()} == set(DTYPES)
    with pytest.raises(ChannelError, match="cannot be sent"):
        dtype_code(np.dtype([("a", np.int8)]))


# -- outbox to inbox without a socket ---------------------------------------------------------


class Pipe:
    """A transport that keeps what is sent and hands it out in pieces of given sizes."""

    secure = False

    def __init__(self, pieces):
        self.data = bytearray()
        self.pieces = pieces

    def send(self, buffers):
        count = 0
        for buffer in buffers:
            self.data += buffer
            count += len(buffer)
        return count

    def receive(self, first, then=None):
        if not self.data:
            return None
        room = len(first) + (0 if then is None else len(then))
        count = min(next(self.pieces), len(self.data), room)
        inside = min(count, len(first))
        first[:inside] = self.data[:inside]
        if count > inside:
            then[: count - inside] = self.data[inside:count]
        del self.data[:count]
        return count

    def wake_at(self, nbytes):
        self.wake_bytes = nbytes


class Received:
    def __init__(self, limits=None, window_bytes=1 << 30):
        self.tensors, self.controls, self.bundles, self.signals = [], [], [], []
        limits = limits or Limits()
        self.inbox = Inbox(
            limits, Allowance.of(limits), window_bytes, BufferPool(0), False,
            on_tensor=self.tensors.append, on_bundle=self.bundles.append,
            on_signal=lambda *signal: self.signals.append(signal),
            on_control=lambda body, _: self.controls.append(body),
        )  # fmt: skip


def outgoing(array, tag, part=None, sending=None):
    header = Header(
        Kind.TENSOR, int(tag.role), 0, dtype_code(array.dtype), array.ndim,
        0 if part is None else 2, *tag_fields(tag),
    )._replace(total=array.nbytes, part=part or 0)  # fmt: skip
    payload = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return Outgoing(header, array.shape, payload, sending or Sending(None), raw_bytes=array.nbytes)


def outbox_of(status, **options):
    return Outbox(SendQueue(1 << 30, lambda: None), status, **options)


def pump(inbox, pipe):
    while pipe.data:
        inbox.pump(pipe, 1 << 30)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=12),
    pieces=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    chunk=st.integers(40, 2000),
)
def test_messages_survive_any_cutting_into_chunks_and_reads(sizes, pieces, chunk):
    import itertools

    outbox = outbox_of(lambda: b"", keep=False, replay_bytes=1)
    outbox.pace.rate_bytes, outbox.pace.chunk_bytes = 1e9, chunk
    pipe, received = Pipe(itertools.cycle(pieces)), Received()
    arrays = [np.arange(size, dtype=np.int32) for size in sizes]
    for step, array in enumerate(arrays):
        outbox.queue.data.append(outgoing(array, Tag(role=Role.LABEL, step=step)))
        body = pack_json({"body": {"step": step, "text": "x" * step}})
        header = Header(kind=Kind.CONTROL, flags=1, total=len(body))
        outbox.queue.control.append(
            Outgoing(header, (), memoryview(body), Sending(None), raw_bytes=len(body))
        )
    outbox.flush(pipe, 1 << 40)
    assert outbox.empty
    pump(received.inbox, pipe)
    assert [body["step"] for body in received.controls] == list(range(len(sizes)))
    assert len(received.tensors) == len(arrays)
    for step, (assembly, array) in enumerate(zip(received.tensors, arrays, strict=True)):
        assert assembly.tag.step == step
        np.testing.assert_array_equal(assembly.payload().array, array)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stream_cut_anywhere_any_number_of_times_loses_and_repeats_nothing(data):
    """Each connection brings some bytes across and loses the rest; resumption mends it."""
    import itertools

    outbox = outbox_of(lambda: b"", keep=True, replay_bytes=1 << 20)
    outbox.pace.rate_bytes, outbox.pace.chunk_bytes = 1e9, 700
    received = Received()
    arrays = [np.arange(size, dtype=np.int16) for size in data.draw(
        st.lists(st.integers(0, 3000), min_size=1, max_size=6))]  # fmt: skip
    for step, array in enumerate(arrays):
        outbox.queue.data.append(outgoing(array, Tag(role=Role.LABEL, step=step)))
    for cut in data.draw(st.lists(st.integers(0, 4000), max_size=8)):
        pipe = Pipe(itertools.repeat(997))
        outbox.flush(pipe, 1 << 40)
        del pipe.data[cut:]
        pump(received.inbox, pipe)
        received.inbox.settle()
        outbox.restart(received.inbox.received, received.inbox.partial_bytes, 0.0)
        outbox.status_due = False
    pipe = Pipe(itertools.repeat(997))
    outbox.flush(pipe, 1 << 40)
    pump(received.inbox, pipe)
    outbox.acknowledge(received.inbox.received)
    assert outbox.empty and outbox.unacked_bytes == 0
    assert [assembly.tag.step for assembly in received.tensors] == list(range(len(arrays)))
    for assembly, array in zip(received.tensors, arrays, strict=True):
        np.testing.assert_array_equal(assembly.payload().array, array)


def frame(header, payload=b"", shape=()):
    header = header._replace(length=len(payload), total=header.total or len(payload))
    return pack_header(header, shape) + payload


TENSOR = Header(kind=Kind.TENSOR, role=1, dtype=11, rank=1, sequence=1)
CONTROL = Header(kind=Kind.CONTROL, flags=1, sequence=1)
MANIFEST = Header(kind=Kind.MANIFEST, role=4, sequence=1)
SMALL = Limits(message_bytes=1 << 20, control_bytes=1 << 10, rank=4, bundle_tensors=3)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (frame(TENSOR._replace(sequence=2), b"\0" * 4, (1,)), "frame 2 arrived where 1"),
        (frame(TENSOR._replace(role=9), b"\0" * 4, (1,)), "role 9"),
        (frame(TENSOR._replace(dtype=99), b"\0" * 4, (1,)), "unknown element type"),
        (frame(TENSOR._replace(codec=99), b"\0" * 4, (1,)), "codec 99"),
        (frame(TENSOR._replace(codec=4, codec_parameter=3), b"\0" * 4, (1,)), "multiple of 8"),
        (frame(TENSOR, b"\0" * 4, (2,)), "4 bytes declared for shape"),
        (frame(TENSOR._replace(total=1 << 40), b"\0" * 4, (1 << 38,)), "at most 4 and 1048576"),
        (frame(TENSOR._replace(rank=5), b"\0" * 4, (1,) * 5), "rank 5"),
        (frame(TENSOR, b"", (0, )) and frame(TENSOR._replace(rank=2), b"", (1 << 60, 0)), "large"),
        (frame(TENSOR._replace(rank=2), b"", ((1 << 64) - 1, (1 << 64) - 1)), "at most"),
        (frame(TENSOR._replace(flags=2), b"\0" * 4, (1,)), "out of order"),
        (frame(TENSOR._replace(offset=4, total=8), b"\0" * 4, (2,)), "with an offset"),
        (frame(TENSOR._replace(flags=1), b"\0" * 4, (1,)), "wrong lane"),
        (frame(TENSOR._replace(total=8), b"", (2,)), "empty chunk"),
        (frame(TENSOR._replace(kind=Kind.CHUNK, rank=0), b"\0" * 4), "without the beginning"),
        (frame(CONTROL, b"x" * 1025), r"Limits\.control_bytes"),
        (frame(CONTROL, b"no json"), "not acceptable JSON"),
        (frame(CONTROL, b"[" * 1000), "not acceptable JSON"),
        (frame(CONTROL, b'{"body": {}}'), "schema version"),
        (frame(CONTROL, b'{"schema": 1}'), "without body"),
        (frame(MANIFEST, b'{"schema": 1}'), "without name"),
        (frame(MANIFEST, pack_json({"name": "w", "tensors": [*"abcd"], "body": {}})), "4 tensors"),
        (frame(MANIFEST, pack_json({"name": "w", "tensors": ["a", "a"], "body": {}})), "distinct"),
        (frame(MANIFEST, pack_json({"name": "w", "tensors": ["a"], "body": {}}))
         + frame(TENSOR._replace(sequence=2), b"\0" * 4, (1,)), "not part of it"),
        (frame(Header(kind=Kind.PING), b"x" * 5000), "PING frame of 5000"),
    ],
)  # fmt: skip
def test_what_breaks_the_rules_is_named_before_anything_is_allocated(data, match):
    import itertools

    received = Received(SMALL)
    pipe = Pipe(itertools.repeat(1 << 20))
    pipe.data += data
    with pytest.raises((FrameError, ChannelError), match=match):
        pump(received.inbox, pipe)


def test_sending_without_credit_is_noticed():
    import itertools

    received = Received(window_bytes=1000)
    pipe = Pipe(itertools.repeat(1 << 20))
    for sequence in (1, 2):
        pipe.data += frame(TENSOR._replace(sequence=sequence), b"\0" * 800, (200,))
    with pytest.raises(FrameError, match="without credit"):
        pump(received.inbox, pipe)
    assert len(received.tensors) == 1
    assert isinstance(ConnectionEnded("x"), Exception)
