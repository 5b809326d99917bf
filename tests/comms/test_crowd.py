"""Many devices on one I/O thread, and tensors larger than 2 GiB."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import psutil
import pytest

from comms import ChannelOptions, Endpoint, Role, Tag
from experiments.benchmarks import channel_peers
from pipar_jax.launch.pinning import PinnedProcess
from tests.comms.conftest import admitting
from tests.patience import PATIENCE_S


def test_devices_share_one_thread_and_get_equal_turns(workshop):
    server = workshop.endpoint("server", ChannelOptions(window_bytes=1 << 18))
    arrived: queue.Queue = queue.Queue()

    def on_link(link):
        link.start(arrived.put, lambda: None, lambda error: None)

    _, port = server.listen("127.0.0.1", 0, admitting(on_link))
    client = workshop.endpoint("devices")
    threads = threading.active_count()
    devices, tensors = 40, 10
    links = [
        client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
        for _ in range(devices)
    ]
    assert threading.active_count() == threads
    for step in range(tensors):
        for device, link in enumerate(links):
            array = np.full(16_384, device * 100 + step, np.float32)
            link.send(Tag(role=Role.ACTIVATION, device=device, step=step), array)
    steps = dict.fromkeys(range(devices), 0)
    for _ in range(devices * tensors):
        message = arrived.get(timeout=PATIENCE_S)
        tag = message.tag
        assert tag.step == steps[tag.device]
        assert (message.array == tag.device * 100 + tag.step).all()
        steps[tag.device] += 1
        message.release()
    assert set(steps.values()) == {tensors}


def test_a_busy_link_does_not_starve_a_small_one(workshop):
    server = workshop.endpoint("server", ChannelOptions(window_bytes=1 << 30))
    small: queue.Queue = queue.Queue()

    def on_link(link):
        def take(message):
            if message.tag.device == 1:
                small.put(message)
            message.release()

        link.start(take, lambda: None, lambda error: None)

    _, port = server.listen("127.0.0.1", 0, admitting(on_link))
    busy = workshop.endpoint("busy").connect(
        "127.0.0.1", port, name_of_peer="s", timeout_s=PATIENCE_S
    )
    quiet = workshop.endpoint("quiet").connect(
        "127.0.0.1", port, name_of_peer="s", timeout_s=PATIENCE_S
    )
    large = np.zeros(64 << 20, np.uint8)
    done = threading.Event()

    def feed(*_):
        if not done.is_set():
            busy.send(Tag(role=Role.ACTIVATION, device=0), large, on_sent=feed)

    for _ in range(8):
        feed()
    for _ in range(5):
        quiet.send(Tag(role=Role.ACTIVATION, device=1), np.zeros(100))
        small.get(timeout=PATIENCE_S)
    assert busy.stats().queued_messages > 0, "the busy link has shown nothing"
    done.set()
    busy.close()


def run_crowd(devices: int, tensors: int) -> dict[str, float]:
    with PinnedProcess("server") as server, PinnedProcess("crowd") as crowd:
        port = server.call(channel_peers.start_crowd_server, 1 << 18)
        before = server.call(channel_peers.crowd_state)
        crowd.call(channel_peers.send_from_crowd, port, devices, tensors, 64 << 10)
        until = time.monotonic() + PATIENCE_S  # what has left may still be on its way
        while True:
            after = server.call(channel_peers.crowd_state)
            if after["messages"] == devices * tensors or time.monotonic() > until:
                break
            time.sleep(0.05)
    return {**after, "threads": after["threads"] - before["threads"]}


def test_a_crowd_arrives_complete_in_bounded_memory():
    state = run_crowd(100, 10)
    assert state["messages"] == 1000 and state["links"] == 100 and state["threads"] == 0
    assert state["peak_bytes"] < 300e6


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_thousand_devices_of_a_hundred_tensors_each():
    state = run_crowd(1000, 100)
    assert state["messages"] == 100_000 and state["links"] == 1000 and state["threads"] == 0
    assert state["peak_bytes"] < 300e6


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_tensor_of_more_than_two_gibibytes_crosses():
    if psutil.virtual_memory().available < 7 << 30:
        pytest.skip("needs 7 GiB of free memory")
    messages: queue.Queue = queue.Queue()
    with Endpoint("server") as server, Endpoint("client") as client:
        _, port = server.listen(
            "127.0.0.1", 0, admitting(lambda link: link.start(messages.put, lambda: None, print))
        )
        link = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
        array = np.arange((1 << 29) + 1000, dtype=np.uint32)
        link.send(Tag(role=Role.ACTIVATION), array)
        message = messages.get(timeout=120)
        assert message.nbytes == array.nbytes > 2 << 30
        assert (message.array[:: 1 << 12] == array[:: 1 << 12]).all()
        assert message.array[-1] == array[-1]
