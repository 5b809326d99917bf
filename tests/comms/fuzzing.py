"""Material for the fuzzers: correct streams, ways to damage them, and a link without a socket."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections import deque

import numpy as np

from comms import ChannelOptions, parse_codec
from comms.link.doorstep import Doorstep
from comms.link.incoming import pack_json
from comms.link.link import Link
from comms.link.stream import Stream
from comms.wire.buffers import BufferPool
from comms.wire.event_loop import READ, Timer
from comms.wire.frame import (
    HEADER_BYTES,
    MAX_RANK,
    PING,
    PONG,
    SEQUENCED,
    STATUS,
    Flag,
    Header,
    Kind,
    checksum_of,
    pack_header,
)
from comms.wire.greeting import Terms

EXTREMES = (0, 1, 2, 7, 255, 256, 2**16, 2**31, 2**32 - 1)
EXTREMES_64 = (*EXTREMES, 2**40, 2**63, 2**64 - 1)
EXTREME_FLOATS = (0.0, -1.0, 1e-320, 1e308, float("inf"), -float("inf"), float("nan"))

#: JSON values, as text, that have been or could be trouble where something else is expected.
TOKENS = (
    "null", "true", "false", "0", "-1", "1", "-0", "0.0", "-0.0", "1.5", "1e308", "1e-400", "1e400",
    "-1e400", "NaN", "Infinity", "-Infinity", str(2**31), str(2**32), str(2**53), str(2**62),
    str(2**63), str(-(2**63)), str(2**64), "1" * 401, "-" + "9" * 401, "1" * 2000, "0." + "1" * 300,
    '""', '"x"', '"' + "a" * 32 + '"', '"' + "g" * 32 + '"', '"' + "x" * 2000 + '"', '"\\ud800"',
    '"\\udfff x"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\u001b[2J"', '"a\\nb"', '"\\u202e"',
    "[]", "{}", "[[]]", '{"a":1,"a":2}', "[" * 900 + "]" * 900, '{"a":' * 300 + "1" + "}" * 300,
    "[1,", '{"a"', '"', "tru", "\x00", "'a'", "[" * 3000,
)  # fmt: skip


def spoiled_json(rng: random.Random, value: object) -> bytes:
    """Returns the JSON of a value of which something is wrong, most of the time."""
    text = json.dumps(value)
    way = rng.randrange(8)
    if way <= 3 and isinstance(value, dict) and value:
        name = rng.choice(list(value))
        fields = {key: json.dumps(one) for key, one in value.items()}
        fields[name] = rng.choice(TOKENS)
        if rng.random() < 0.2:
            fields.pop(rng.choice(list(fields)))
        if rng.random() < 0.2:
            fields[rng.choice(("extra", "schema", "name", ""))] = rng.choice(TOKENS)
        return ("{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in fields.items()) + "}").encode()
    if way == 4:
        return rng.choice(TOKENS).encode()
    data = bytearray(text.encode())
    if way == 5:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 6:
        del data[rng.randrange(len(data)) :]
    else:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randrange(1, 6))
    return bytes(data)


Part = tuple[Header, tuple[int, ...], bytes]


def valid_frames(rng: random.Random) -> list[Part]:
    """Returns a correct stream of a few messages: header, shape and payload of each frame."""
    frames: list[Part] = []

    def add(header: Header, payload: bytes, shape: tuple[int, ...] = (), total: int = 0) -> None:
        sequence = 1 + sum(1 for each, _, _ in frames if each.sequence)
        header = header._replace(
            sequence=sequence if header.kind in SEQUENCED else 0,
            length=len(payload),
            total=total or len(payload),
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
            name = rng.choice(("bfloat16", "float16", "fp8:16", "int8:16", "int4:16", "bits:16",
                               "fp8_e5m2:16", "bits:abs0.1", "bits:lossless"))  # fmt: skip
            codec, parameter = parse_codec(name)
            header = Header(Kind.TENSOR, 3, codec.code, 11, 1, codec_parameter=parameter)
            array = np.array([rng.choice((0.0, 0.0, 1.5)) for _ in range(16)], np.float32)
            payload = codec.encode(array, parameter).tobytes()
            if rng.random() < 0.3:
                payload = rng.randbytes(len(payload))
            add(header, payload, (16,))
        else:
            add(Header(Kind.PING), PING.pack(1.0))
            add(Header(Kind.PONG), PONG.pack(1.0, 2.0, 3.0))
            add(Header(Kind.STATUS), STATUS.pack(0, 0, 1e6))
    if rng.random() < 0.1:
        add(Header(Kind.GOODBYE), b'{"reason": "over"}')
    return frames


def pack(part: Part, checked: bool = False) -> bytes:
    """Returns a frame's bytes, with the checksum that its payload has."""
    header, shape, payload = part
    if checked:
        header = header._replace(
            flags=header.flags | int(Flag.CHECKED), checksum=checksum_of(payload)
        )
    return pack_header(header, shape) + payload


def _field(rng: random.Random, header: Header) -> Header:
    name = rng.choice(header._fields)
    if name == "clock_s":
        value: float = rng.choice(EXTREME_FLOATS)
    elif name in ("kind", "role", "codec", "dtype", "rank", "flags"):
        value = rng.randrange(256) if rng.random() < 0.5 else rng.randrange(10)
    elif name in ("sequence", "offset", "total", "length", "checksum"):
        value = rng.choice(EXTREMES_64)
    else:
        value = rng.choice(EXTREMES)
    return header._replace(**{name: value})


def _signal(rng: random.Random, kind: int) -> bytes:
    """Returns a payload of a signal that is of the right size and says what it should not."""
    if kind == Kind.STATUS:
        counts = rng.choice(EXTREMES_64), rng.choice(EXTREMES_64)
        return STATUS.pack(*counts, rng.choice((*EXTREME_FLOATS, 1e12, 1.1e12)))
    if kind == Kind.PING:
        return PING.pack(rng.choice(EXTREME_FLOATS))
    if kind == Kind.PONG:
        return PONG.pack(*(rng.choice((*EXTREME_FLOATS, 1e12, 1.0)) for _ in range(3)))
    return spoiled_json(rng, {"reason": "over"})


def _json_of(rng: random.Random, kind: int) -> bytes:
    """Returns the JSON of a control message or manifest, or of something else."""
    fields: dict[str, object] = {"schema": 1, "body": {"type": "join", "n": 1}}
    if kind == Kind.MANIFEST:
        fields |= {"name": "w", "tensors": ["x"]}
    return spoiled_json(rng, fields)


def mutate(rng: random.Random, part: Part, checked: bool = False) -> bytes:
    """Damages one frame; most of the time its checks are right all the same."""
    header, shape, payload = part
    way = rng.randrange(10)
    if way <= 2:
        for _ in range(rng.randrange(1, 3)):
            header = _field(rng, header)
        if header.rank != len(shape) and header.rank <= MAX_RANK:
            shape = tuple(rng.choice(EXTREMES_64) for _ in range(header.rank))
    elif way == 3 and shape:
        shape = tuple(rng.choice(EXTREMES_64) for _ in shape)
    elif way == 4 and header.kind not in SEQUENCED:
        payload = _signal(rng, header.kind)
        header = header._replace(length=len(payload), total=len(payload))
    elif way <= 6 and header.kind in (Kind.CONTROL, Kind.MANIFEST):
        payload = _json_of(rng, header.kind)
        header = header._replace(length=len(payload), total=len(payload))
    elif way == 7:
        payload = rng.randbytes(len(payload))
    elif way == 8:
        data = bytearray(pack(part, checked))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.5:
            head = data[: HEADER_BYTES - 4] + data[HEADER_BYTES:][: 8 * min(data[10], MAX_RANK)]
            data[HEADER_BYTES - 4 : HEADER_BYTES] = struct.pack("<I", zlib.crc32(head))
        return bytes(data)
    elif way == 9:
        return rng.randbytes(rng.randrange(1, 300))
    return pack((header, shape, payload), checked)


class FakeLoop:
    """The I/O thread for a link that is driven by hand."""

    on_thread = True

    def __init__(self) -> None:
        self.calls: deque = deque()

    def post(self, call) -> None:
        self.calls.append(call)

    soon = post

    def at(self, when_s, call) -> Timer:
        return Timer(when_s, call)

    def watch(self, *_) -> None:
        pass

    forget = watch

    def run(self) -> None:
        while self.calls:
            self.calls.popleft()()


class FakeTransport:
    """A connection that brings given bytes and takes all."""

    secure = False
    socket = None

    def __init__(self, data: bytes, pieces: int = 1 << 30) -> None:
        self.data, self.at, self.pieces, self.closed = data, 0, pieces, False

    def receive(self, first, then=None):
        if self.at == len(self.data):
            return None
        room = len(first) + (0 if then is None else len(then))
        taken = self.data[self.at : self.at + min(room, self.pieces)]
        self.at += len(taken)
        inside = min(len(taken), len(first))
        first[:inside] = taken[:inside]
        if then is not None:
            then[: len(taken) - inside] = taken[inside:]
        return len(taken)

    def send(self, buffers):
        return sum(map(len, buffers))

    def _ignore(self, *_) -> None:
        pass

    limit_unsent = limit_in_flight = wake_at = shut = _ignore

    def close(self) -> None:
        self.closed = True


class FakeEndpoint:
    """What a stream needs of its endpoint."""

    def __init__(self, options: ChannelOptions) -> None:
        self.options, self.loop = options, FakeLoop()
        self.pool, self.doorstep = BufferPool(0), Doorstep(options.limits)

    def forget(self, stream) -> None:
        pass

    redial = forget


def drive(options, data, *, dialled, checked, allowance, on_message, pieces=1 << 30) -> Link:
    """Lets a link read bytes until it has ended or wants more; returns it.

    Args:
        options: of its endpoint.
        data: what the peer sent.
        dialled: whether this side has opened it.
        checked: whether checksums were agreed on.
        allowance: what it admits the peer with; None: it does not.
        on_message: gets each message.
        pieces: bytes of a read.
    """
    endpoint = FakeEndpoint(options)
    terms = Terms(name="d0", session="a" * 32, window_bytes=1 << 20, checksum=checked)
    stream = Stream(endpoint, terms, "there", dialled=dialled, session=terms.session)
    link = Link(stream, lambda job: job(), endpoint.doorstep.leave)
    if allowance is not None:
        link.admit(allowance)
    link.start(on_message, lambda: None, lambda error: None)
    transport = FakeTransport(data, pieces)
    stream.guard.run(stream.attach, transport, b"", terms)
    endpoint.loop.run()
    while link.error is None and transport.at < len(data):
        before = transport.at
        stream.guard.run(stream.connection.run, READ)
        endpoint.loop.run()
        assert link.error is not None or transport.at > before, "it reads no further"
    assert (link.error is None) or transport.closed
    return link
