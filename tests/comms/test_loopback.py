"""Tensors, bundles and control messages between two endpoints."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import pytest

from comms import (
    ChannelError,
    ChannelOptions,
    ConnectError,
    LinkShape,
    PeerLost,
    Role,
    Tag,
)
from comms.wire.buffers import ALIGNMENT
from comms.wire.frame import DTYPES
from tests.comms.conftest import admitting
from tests.patience import PATIENCE_S

MIB = 1 << 20


def tag(role: Role = Role.ACTIVATION, **fields: int) -> Tag:
    return Tag(role=role, **fields)


def test_a_tensor_arrives_with_its_tag(workshop):
    pair = workshop.pair()
    sent = Tag(
        role=Role.COTANGENT, device=3, stage=1, step=70_000, micro_batch=2, micro_batches=4,
        samples_before=50, samples=25, batch_samples=100, attempt=4,
    )  # fmt: skip
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    pair.up.send(sent, array)
    message = pair.at_server.take()
    assert message.kind == "tensor" and message.tag == sent and message.link is pair.down
    assert (pair.down.peer, pair.up.peer) == ("d0", "server")
    np.testing.assert_array_equal(message.array, array)
    assert message.array.dtype == array.dtype
    assert message.nbytes == array.nbytes
    assert message.first_byte_s <= message.received_s <= time.monotonic()


def test_every_type_and_shape_crosses(workshop):
    pair = workshop.pair()
    for dtype in DTYPES.values():
        for shape in ((), (0,), (3, 0, 2), (1,), (5, 3), (1,) * 16):
            size = int(np.prod(shape))
            array = (np.arange(size) % 7).astype(dtype).reshape(shape)
            pair.up.send(tag(), array)
            received = pair.at_server.take_array()
            assert received.dtype == dtype and received.shape == shape
            assert received.tobytes() == array.tobytes()


def test_arrays_that_are_not_plain_memory_cross(workshop):
    pair = workshop.pair()
    base = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    readonly = base.copy()
    readonly.flags.writeable = False
    for array in (
        base.transpose(2, 0, 1), base[::2, ::-1], np.asfortranarray(base[0]), base.astype(">i4"),
        np.broadcast_to(np.float32(2), (3, 3)), readonly, base[1, 2, 3],
    ):  # fmt: skip
        pair.up.send(tag(), array)
        np.testing.assert_array_equal(pair.at_server.take_array(), array)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([object()]), np.zeros(1, "M8[s]")])
def test_what_is_no_tensor_is_refused_at_once(workshop, array):
    with pytest.raises(ChannelError, match="cannot be sent"):
        workshop.pair().up.send(tag(), array)


def test_a_tag_out_of_range_is_refused_at_once(workshop):
    with pytest.raises(ChannelError, match="outside 0 to"):
        workshop.pair().up.send(tag(step=-1), np.zeros(1))


def test_received_arrays_are_aligned_and_stay_valid_after_release(workshop):
    pair = workshop.pair()
    arrays = []
    for index in range(20):
        pair.up.send(tag(), np.full(30_000, index, np.float32))
        arrays.append(pair.at_server.take_array())
    for index, array in enumerate(arrays):
        assert array.ctypes.data % ALIGNMENT == 0
        assert (array == index).all()


def test_on_sent_tells_when_and_how_much_and_leaves_no_view(workshop):
    pair = workshop.pair()
    sent: queue.Queue[tuple[float, float, int]] = queue.Queue()
    array = np.ones(3 * MIB, np.uint8)
    began = time.monotonic()
    pair.up.send(tag(), array, on_sent=lambda *figures: sent.put(figures))
    pair.at_server.take_array()
    start_s, end_s, wire_bytes = sent.get(timeout=PATIENCE_S)
    assert began <= start_s <= end_s <= time.monotonic()
    assert array.nbytes < wire_bytes < array.nbytes * 1.01
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            array.resize(1)  # refuses while any view is alive
            break
        except ValueError:
            time.sleep(0.01)
    assert array.size == 1


def test_control_messages_and_bundles(workshop):
    pair = workshop.pair()
    body = {"schema": "mine", "round": 3, "nested": {"a": [1, 2.5, None, True]}, "text": "é"}
    pair.down.send_control(body)
    message = pair.at_client.take()
    assert message.kind == "control" and message.body == body and message.tag is None
    with pytest.raises(ChannelError, match="no tensors"):
        _ = message.array

    tensors = {
        "unit/kernel": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 4), np.int8),
        "scalar": np.float32(7), "large": np.arange(MIB, dtype=np.int32),
    }  # fmt: skip
    done = threading.Event()
    pair.up.send_bundle("weights", tensors, body, on_sent=lambda *_: done.set())
    message = pair.at_server.take()
    assert message.kind == "bundle" and message.name == "weights" and message.body == body
    assert message.tag.role is Role.WEIGHT
    assert list(message.tensors) == list(tensors)
    for name, array in message.tensors.items():
        np.testing.assert_array_equal(array, tensors[name])
    assert done.wait(PATIENCE_S)
    pair.up.send_bundle("nothing", {}, {})
    assert pair.at_server.take().payloads == {}


def test_a_control_message_must_be_json_and_of_bounded_size(workshop):
    pair = workshop.pair()
    with pytest.raises(ChannelError, match="plain JSON"):
        pair.up.send_control({"array": np.zeros(3)})
    with pytest.raises(ChannelError, match=r"Limits\.control_bytes"):
        pair.up.send_control({"text": "x" * (9 << 20)})


def test_many_tensors_keep_their_order_both_ways(workshop):
    pair = workshop.pair()
    count = 300
    for step in range(count):
        pair.up.send(tag(step=step), np.full(step * 7, step, np.int32))
        pair.down.send(tag(Role.COTANGENT, step=step), np.full(step * 3, step, np.int64))
    for collector in (pair.at_server, pair.at_client):
        for step in range(count):
            message = collector.take()
            assert message.tag.step == step and (message.array == step).all()
            message.release()


def test_nothing_is_lost_before_start(workshop):
    server, client = workshop.endpoint("server"), workshop.endpoint("client")
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, admitting(links.put))
    up = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
    for step in range(50):
        up.send(tag(Role.LABEL, step=step), np.full(10, step))
    up.drain(PATIENCE_S)
    up.close()
    link = links.get(timeout=PATIENCE_S)
    time.sleep(0.1)
    messages: queue.Queue = queue.Queue()
    lost: queue.Queue = queue.Queue()
    link.start(messages.put, lambda: None, lost.put)
    assert [messages.get(timeout=PATIENCE_S).tag.step for _ in range(50)] == list(range(50))
    assert isinstance(lost.get(timeout=PATIENCE_S), PeerLost)


def test_reading_pauses_while_too_much_waits_for_start(workshop):
    from comms import Limits

    options = ChannelOptions(limits=Limits(waiting_bytes=4 * MIB))
    server, client = workshop.endpoint("server", options), workshop.endpoint("client")
    links: queue.Queue = queue.Queue()
    _, port = server.listen("127.0.0.1", 0, admitting(links.put))
    up = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
    for step in range(32):
        up.send(tag(Role.WEIGHT, step=step), np.full(MIB, step, np.uint8))
    link = links.get(timeout=PATIENCE_S)
    time.sleep(0.5)
    assert link.stats().bytes_in < 16 * MIB
    messages: queue.Queue = queue.Queue()
    link.start(messages.put, lambda: None, lambda error: None)
    assert [messages.get(timeout=PATIENCE_S).tag.step for _ in range(32)] == list(range(32))


def test_credit_limits_what_the_receiver_holds(workshop):
    pair = workshop.pair(ChannelOptions(window_bytes=MIB), hold=True)
    array = np.zeros(MIB // 4, np.uint8)
    assert pair.up.available_bytes == MIB and pair.up.can_send(10 * MIB)
    for step in range(6):
        pair.up.send(tag(step=step), array)
    assert pair.up.available_bytes == 0 and not pair.up.can_send(1)
    held = [pair.at_server.take() for _ in range(4)]
    ran = threading.Event()
    pair.client.loop.post(ran.set)  # the I/O thread has seen that there is no credit
    assert ran.wait(PATIENCE_S)
    with pytest.raises(queue.Empty):
        pair.at_server.take(0.3)
    assert pair.down.stats().held_bytes == MIB
    # Labels and weights need no credit of their own, but tensors do not overtake each other.
    pair.up.send_control({"still": "works"})
    assert pair.at_server.take().kind == "control"
    pair.at_client.credit.clear()
    pair.at_server.credit.clear()
    held[0].release()
    held[0].release()
    assert pair.at_server.take().tag.step == 4
    assert pair.at_client.credit.wait(PATIENCE_S)
    held[1].release()
    assert pair.at_server.take().tag.step == 5
    assert pair.up.stats().credit_wait_s > 0.05


def test_an_empty_window_takes_a_tensor_of_any_size(workshop):
    pair = workshop.pair(ChannelOptions(window_bytes=1000))
    for _ in range(3):
        array = np.arange(MIB, dtype=np.int32)
        pair.up.send(tag(), array)
        np.testing.assert_array_equal(pair.at_server.take_array(), array)


def test_release_may_be_called_from_any_thread_and_credit_comes_back_exactly(workshop):
    pair = workshop.pair(ChannelOptions(window_bytes=MIB), hold=True)
    for step in range(64):
        pair.up.send(tag(step=step), np.zeros(MIB // 64, np.uint8))
    held = [pair.at_server.take() for _ in range(64)]
    threads = [
        threading.Thread(target=lambda part: [m.release() for m in part], args=(held[i::4],))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + PATIENCE_S
    while pair.up.available_bytes < MIB and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pair.up.available_bytes == MIB and pair.down.stats().held_bytes == 0


def test_the_accounts_of_both_sides_agree(workshop):
    pair = workshop.pair()
    for step in range(20):
        pair.up.send(tag(step=step), np.zeros(1000 * step, np.float32))
    for _ in range(20):
        pair.at_server.take_array()
    pair.up.drain(PATIENCE_S)
    out, into = pair.up.stats(), pair.down.stats()
    expected = sum(4000 * step for step in range(20))
    assert out.payload_out_bytes == into.payload_in_bytes == expected
    assert out.raw_out_bytes == into.raw_in_bytes == expected
    assert out.messages_out == into.messages_in == 20
    assert out.queued_messages == out.queued_bytes == 0
    assert 4000 * 19 <= out.queued_peak_bytes <= expected
    pair.up.begin_peak()
    assert pair.up.stats().queued_peak_bytes == 0
    assert out.repeated_frames == out.repeated_bytes == 0
    assert into.bytes_in >= expected + 20 * 108


def test_stats_and_state_survive_the_end(workshop):
    pair = workshop.pair()
    pair.up.send(tag(), np.zeros(10))
    pair.at_server.take_array()
    pair.up.close()
    assert pair.up.wait_closed(PATIENCE_S)
    assert pair.up.stats().messages_out == 1
    with pytest.raises(PeerLost, match="closed on this side"):
        pair.up.send(tag(), np.zeros(10))
    assert "closed the link" in str(pair.at_server.take_lost())


def test_a_shaped_link_delays_and_paces(workshop, quiet):
    pair = workshop.pair(shape=LinkShape(40.0, 0.05))
    array = np.zeros(MIB, np.uint8)
    times: queue.Queue = queue.Queue()
    began = time.monotonic()
    pair.up.send(tag(), array, on_sent=lambda *figures: times.put(figures))
    message = pair.at_server.take()
    floor_s = array.nbytes * 8 / 40e6
    took_s = message.received_s - began
    assert floor_s + 0.05 <= took_s
    assert not quiet or took_s < 10  # later than that is no pace
    start_s, end_s, _ = times.get(timeout=PATIENCE_S)
    assert floor_s * 0.98 <= end_s - start_s
    assert not quiet or end_s - start_s < floor_s * 5


def test_the_time_that_messages_queue_is_counted(workshop):
    pair = workshop.pair(shape=LinkShape(40.0, 0.0))
    array = np.zeros(MIB // 8, np.uint8)
    queued = threading.Event()
    pair.client.loop.post(lambda: queued.wait(PATIENCE_S))  # all are there before the first leaves
    for step in range(4):  # the second waits for the first, the third for both, ...
        pair.up.send(tag(step=step), array)
    queued.set()
    pair.up.drain(PATIENCE_S)
    # The emulated line makes up for a late start, which takes some milliseconds off each wait.
    assert pair.up.stats().queue_s >= (1 + 2 + 3) * array.nbytes * 8 / 40e6 * 0.9


def test_a_listener_that_is_gone_is_told_at_once_where_it_need_not_be_waited_for(workshop, within):
    server = workshop.endpoint("server")
    _, port = server.listen("127.0.0.1", 0, lambda link: None)
    server.close()
    client = workshop.endpoint("client")
    with within(20.0), pytest.raises(ConnectError, match=r"cannot reach server .* after 1 tries"):
        client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=3600.0, retry=False)
