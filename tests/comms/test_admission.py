"""What a peer may send before its link's owner has admitted it, and from then on."""

from __future__ import annotations

import itertools
import queue
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from comms import (
    Allowance,
    ChannelError,
    ChannelOptions,
    Encoded,
    FrameError,
    LimitError,
    Limits,
    PeerClosed,
    PeerLost,
    Role,
    Tag,
    codec_names,
    parse_codec,
)
from comms.link.inbox import Inbox
from comms.link.incoming import pack_json
from comms.wire.buffers import BufferPool
from comms.wire.frame import HEADER_BYTES, SEQUENCED, Header, Kind, pack_header
from tests.comms.conftest import Collector
from tests.comms.test_frames import Pipe, frame, pump
from tests.patience import PATIENCE_S

LIMITS = Limits(join_bytes=2000)


def meet(workshop, options=None):
    """Returns the accepted link, not admitted, and the one that was connected."""
    server, client = workshop.endpoint("server", options), workshop.endpoint("device 0")
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, links.put)
    up = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
    return links.get(timeout=PATIENCE_S), up


def inbox(limits=LIMITS, allowance=None):
    got: list = []
    made = Inbox(
        limits, allowance, 1 << 30, BufferPool(0), False,
        on_tensor=got.append, on_bundle=got.append,
        on_control=lambda body, _: got.append(body), on_signal=lambda *_: None,
    )  # fmt: skip
    return made, got


def feed(into, *frames):
    pipe = Pipe(itertools.repeat(1 << 20))
    for data in frames:
        pipe.data += data
    pump(into, pipe)


def control(sequence, size=0, **fields):
    payload = pack_json({"body": {"text": "x" * size}})
    return frame(Header(Kind.CONTROL, flags=1, sequence=sequence, **fields), payload)


#: For each kind of frame that carries messages, one with which a stranger might begin.
FIRST = {
    Kind.TENSOR: frame(Header(Kind.TENSOR, 1, 0, 11, 1, sequence=1), b"\0" * 4, (1,)),
    Kind.CONTROL: control(1, size=2000),
    Kind.MANIFEST: frame(
        Header(Kind.MANIFEST, 4, sequence=1), pack_json({"name": "w", "tensors": [], "body": {}})
    ),
    Kind.CHUNK: frame(Header(Kind.CHUNK, flags=1, sequence=1), b"\0" * 4),
}


def test_a_stranger_may_join_with_one_small_control_message():
    made, got = inbox()
    feed(made, control(1, size=1000), frame(Header(Kind.PING), b"\0" * 8))
    assert [len(body["text"]) for body in got] == [1000]


@pytest.mark.parametrize("kind", sorted(SEQUENCED), ids=lambda kind: kind.name)
@pytest.mark.parametrize("joined", [False, True])
def test_whatever_else_a_stranger_sends_is_refused_before_memory_is_taken(kind, joined):
    made, got = inbox()
    made._begin_message = None if not joined else made._begin_message
    data = FIRST[kind]
    if joined:
        feed(made, control(1))
        made._begin_message = None  # where memory is taken: calling it would be a TypeError
        header = Header(kind, flags=int(kind in (Kind.CONTROL, Kind.CHUNK)), sequence=2)
        data = frame(header, b"\0" * 4)
    with pytest.raises(FrameError, match=r"before this link was admitted|without the beginning"):
        feed(made, data)
    assert len(got) == int(joined)


def test_a_join_of_many_chunks_counts_as_a_whole():
    made, _ = inbox()
    begun = Header(Kind.CONTROL, flags=1, sequence=1, total=LIMITS.join_bytes + 1, length=4)
    with pytest.raises(LimitError, match=r"2001 bytes before .*Limits\.join_bytes"):
        feed(made, pack_header(begun) + b"\0" * 4)


def test_a_join_that_a_cut_interrupts_goes_on():
    made, got = inbox()
    data = control(1, size=500)
    feed(made, data[:50])
    made.restart(b"")
    feed(made, data[:200])
    made.restart(b"")
    rest = data[200:]
    header = Header(
        Kind.CHUNK, flags=1, sequence=1, offset=200 - HEADER_BYTES, total=len(data) - HEADER_BYTES
    )
    feed(made, pack_header(header._replace(length=len(rest))) + rest)
    assert len(got) == 1


def test_over_a_link_a_stranger_is_told_and_its_owner_hears_one_line(workshop):
    down, up = meet(workshop)
    at_server, at_client = Collector(down), Collector(up)
    up.send_control({"type": "join"})
    assert at_server.take().body == {"type": "join"} and down.allowance is None
    up.send(Tag(role=Role.ACTIVATION), np.full(3, np.nan))
    lost = str(at_server.take_lost())
    assert "device 0" in lost and "a second message arrived before" in lost and "\n" not in lost
    assert "before this link was admitted" in str(at_client.take_lost())
    assert at_server.messages.empty()


def test_admission_holds_before_what_is_sent_after_it_arrives(workshop):
    for _ in range(20):
        down, up = meet(workshop)
        at_server = Collector(down)

        def answer(message, up=up):
            up.send(Tag(role=Role.ACTIVATION), np.ones(3))

        up.start(answer, lambda: None, lambda error: None)
        up.send_control({"type": "join"})
        at_server.take()
        down.admit()
        down.send_control({"type": "welcome"})
        assert at_server.take_array().tolist() == [1, 1, 1]


SMALL = Allowance(tensor_bytes=400, bundle_bytes=1000, bundle_tensors=3, control_bytes=500)


@pytest.mark.parametrize(
    ("send", "match"),
    [
        (lambda up: up.send(Tag(role=Role.LABEL), np.zeros(101, np.float32)), "tensor_bytes"),
        (lambda up: up.send(Tag(role=Role.WEIGHT), np.zeros(101, np.float32)), "tensor_bytes"),
        (
            lambda up: up.send(Tag(role=Role.LABEL), np.zeros(101, np.float32), codec="int4"),
            "tensor_bytes",
        ),
        (lambda up: up.send_bundle("w", {"a": np.zeros(1001, np.uint8)}, {}), "bundle_bytes"),
        (
            lambda up: up.send_bundle("w", {n: np.zeros(334, np.uint8) for n in "abc"}, {}),
            "bundle_bytes",
        ),
        (
            lambda up: up.send_bundle("w", {n: np.zeros(0, np.uint8) for n in "abcd"}, {}),
            "bundle_tensors",
        ),
        (lambda up: up.send_bundle("w", {"a" * 500: np.zeros(0)}, {}), "control_bytes"),
        (lambda up: up.send_control({"a": "b" * 500}), "control_bytes"),
    ],
)
@pytest.mark.parametrize("towards", ["listener", "dialler"])
def test_an_allowance_is_kept_on_either_side(workshop, send, match, towards):
    down, up = meet(workshop)
    narrow, wide = (down, up) if towards == "listener" else (up, down)
    narrow.admit(SMALL)
    wide.admit()
    at, back = Collector(narrow), Collector(wide)
    wide.send(Tag(role=Role.LABEL), np.zeros(100, np.float32))
    wide.send_bundle("w", {name: np.zeros(333, np.uint8) for name in "abc"}, {})
    wide.send_control({"a": "b" * 400})
    assert {at.take().kind for _ in range(3)} == {"tensor", "bundle", "control"}
    send(wide)
    assert match in str(at.take_lost()) and match in str(back.take_lost())


@pytest.mark.parametrize("name", codec_names())
def test_no_codec_declares_more_than_was_allowed(workshop, name):
    """However small a payload is, decoding would take the memory of the array it declares."""
    codec, parameter = parse_codec(name)
    down, up = meet(workshop)
    down.admit(SMALL)
    at = Collector(down)
    shape = (101,)
    size = codec.encoded_bytes(np.dtype(np.float32), shape, parameter)
    text = name if name in ("raw", "bfloat16", "float16") else f"{name}:{parameter}"
    data = np.zeros(size if codec.exact_size else 8, np.uint8)
    up.send(Tag(role=Role.LABEL), Encoded(text, data, np.dtype(np.float32), shape))
    assert "Allowance.tensor_bytes" in str(at.take_lost())


DECODED = (
    "raw", "bfloat16", "float16", "fp8", "fp8_e5m2", "int8", "int4", "bits:1", "bits:7", "bits:15",
    "bits:6s", "bits:abs1e-3", "bits:rel1e-2", "bits:lossless",
)  # fmt: skip


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("filled", [1.0, 0.3, 0.0])
def test_decoding_takes_a_few_times_the_array_at_most(name, dtype, filled):
    codec, parameter = parse_codec(name)
    rng = np.random.default_rng(3)
    array = (rng.normal(size=1 << 19) * (rng.random(1 << 19) < filled)).astype(dtype)
    payload = codec.encode(array, parameter)
    tracemalloc.start()
    codec.decode(payload, array.dtype, array.shape, parameter)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 6 * array.nbytes + (2 << 20), f"{peak / array.nbytes:.1f} times the array"


def test_every_codec_is_measured():
    assert {name.partition(":")[0] for name in DECODED} == set(codec_names())


def test_an_allowance_can_be_set_again_and_never_exceeds_the_limits(workshop):
    down, up = meet(workshop, ChannelOptions(limits=Limits(message_bytes=800)))
    at = Collector(down)
    for most, size in ((SMALL, 400), (Allowance(tensor_bytes=1 << 40, bundle_bytes=0), 800)):
        down.admit(most)
        up.send(Tag(role=Role.LABEL), np.zeros(size, np.uint8))
        assert at.take_array().size == size
    assert down.allowance.tensor_bytes == 800
    up.send(Tag(role=Role.LABEL), np.zeros(801, np.uint8))
    assert "801 bytes declared; at most 16 and 800" in str(at.take_lost())


@pytest.mark.parametrize(
    "field", ["tensor_bytes", "bundle_bytes", "bundle_tensors", "control_bytes"]
)
@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_an_allowance_is_made_of_counts(field, value):
    values = {"tensor_bytes": 1, "bundle_bytes": 1, field: value}
    with pytest.raises(ChannelError, match=f"Allowance.{field} must be a whole number from 0"):
        Allowance(**values)


def test_a_peer_that_is_refused_hears_why_and_is_heard_no_more(workshop):
    down, up = meet(workshop)
    down.admit()
    at_server, at_client = Collector(down), Collector(up)
    up.send(Tag(role=Role.LABEL, step=1), np.zeros(3))
    at_server.take()
    for step in range(20):
        down.send(Tag(role=Role.WEIGHT, step=step), np.zeros(1 << 20, np.uint8))
    down.refuse("device 0 sent labels beyond the classes")
    error = at_client.take_lost()
    assert isinstance(error, PeerClosed) and str(error).endswith("labels beyond the classes")
    assert down.wait_closed(PATIENCE_S) and isinstance(down.error, PeerLost)
    with pytest.raises(PeerLost, match="refused on this side"):
        down.send_control({})
    assert at_server.lost.empty() and at_server.messages.empty()


def test_what_a_refused_peer_still_sends_is_not_delivered(workshop):
    down, up = meet(workshop)
    down.admit()
    at_server = Collector(down)
    done: queue.Queue = queue.Queue()

    def both() -> None:
        down.stream.say_goodbye("no", refuse=True)
        down.stream.arrivals.deliver(message)
        done.put(True)

    up.send_control({"n": 1})
    message = at_server.take()
    workshop.endpoints[0].loop.post(both)
    done.get(timeout=PATIENCE_S)
    assert at_server.messages.empty()


def test_a_reason_can_be_given_on_closing(workshop):
    down, up = meet(workshop)
    Collector(down)
    at_client = Collector(up)
    down.close("it has trained enough")
    assert str(at_client.take_lost()).endswith("it has trained enough")
