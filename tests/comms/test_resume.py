"""Streams that survive their connections: nothing lost, nothing twice, nothing out of order."""

from __future__ import annotations

import contextlib
import queue
import time

import numpy as np
import pytest

from comms import ChannelOptions, PeerClosed, PeerLost, Role, Tag
from tests.comms.proxy import Proxy
from tests.patience import PATIENCE_S

RESUME = ChannelOptions(deadline_s=1.0, resume_s=20.0, replay_bytes=1 << 20, window_bytes=1 << 22)


def tensor(step: int) -> np.ndarray:
    """The tensor of a step: its size and its content follow from the step."""
    rng = np.random.default_rng(step)
    return rng.integers(0, 1 << 30, size=int(rng.integers(0, 60_000)), dtype=np.int32)


def exchange(workshop, faults, *, rounds: int, seed: int, options=RESUME, least=60) -> Proxy:
    """Streams both ways through a proxy that commits `rounds` faults; checks every tensor."""
    with contextlib.ExitStack() as stack:
        proxies: list[Proxy] = []

        def through(port: int) -> int:
            proxy = Proxy(port, faults, (least, 600_000), seed, rounds)
            proxies.append(stack.enter_context(proxy))
            return proxy.port

        pair = workshop.pair(options, through=through)
        proxy, step = proxies[0], 0
        while True:
            batch = 8
            for offset in range(batch):
                array = tensor(step + offset)
                pair.up.send(Tag(role=Role.ACTIVATION, step=step + offset), array)
                pair.down.send(Tag(role=Role.COTANGENT, step=step + offset), array)
                pair.up.send_control({"step": step + offset})
            pair.down.send_bundle("weights", {"a": tensor(step), "b": tensor(step + 1)}, {})
            controls = []
            for collector, extra in ((pair.at_server, batch), (pair.at_client, 1)):
                expected = step
                for _ in range(batch + extra):
                    message = collector.take()
                    if message.kind == "control":
                        controls.append(message.body["step"])
                    elif message.kind == "bundle":
                        for at, array in enumerate(message.tensors.values()):
                            np.testing.assert_array_equal(array, tensor(step + at))
                    else:
                        assert message.tag.step == expected
                        np.testing.assert_array_equal(message.array, tensor(expected))
                        expected += 1
                    message.release()
                assert expected == step + batch
            assert controls == list(range(step, step + batch))
            step += batch
            if len(proxy.committed) >= rounds:
                break
        pair.up.drain(PATIENCE_S)
        pair.down.drain(PATIENCE_S)
        assert pair.at_server.messages.empty() and pair.at_client.messages.empty()
        assert pair.up.stats().unacked_bytes == 0
        # Faults that come before the first WELCOME cut no stream.
        assert pair.up.stats().reconnects > rounds * 0.3
        assert pair.up.stats().repeated_bytes + pair.down.stats().repeated_bytes > 0
        pair.client.close()
        return proxy


@pytest.mark.parametrize("fault", ["close", "reset", "stale"])
def test_a_cut_stream_resumes(workshop, fault):
    proxy = exchange(workshop, [fault], rounds=25, seed=1)
    assert fault != "stale" or proxy.stale_delivered > 0


def test_a_stalled_connection_is_replaced(workshop):
    exchange(workshop, ["stall"], rounds=3, seed=2)


def test_all_faults_mixed(workshop):
    exchange(workshop, ["close", "reset", "stale"], rounds=40, seed=3)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_rounds_of_all_faults(workshop, seed):
    faults = ["close", "reset", "stale"] * 16 + ["stall"]
    exchange(workshop, faults, rounds=1000, seed=seed)


def test_what_waits_for_replay_is_bounded_and_its_owner_is_told_late(workshop):
    pair = workshop.pair(RESUME)
    sent: queue.Queue = queue.Queue()
    pair.server.loop.post(
        pair.down.stream.transport.shut
    )  # the client's acknowledgements still arrive
    pair.up.send(Tag(role=Role.WEIGHT), np.zeros(8 << 20, np.uint8), on_sent=lambda *a: sent.put(a))
    highest = 0
    until = time.monotonic() + PATIENCE_S
    while sent.empty() and time.monotonic() < until:
        highest = max(highest, pair.up.stats().unacked_bytes)
    start_s, end_s, wire_bytes = sent.get(timeout=PATIENCE_S)
    assert wire_bytes > 8 << 20 and start_s <= end_s
    assert highest <= RESUME.replay_bytes + (1 << 20) + 200


def test_a_stream_that_is_not_resumed_in_time_is_lost(workshop, quiet):
    options = ChannelOptions(deadline_s=1.0, resume_s=0.6)
    pair = workshop.pair(options)
    began = time.monotonic()
    pair.server.loop.post(lambda: [pair.server.reception.stop(), pair.down.stream.detach()])
    error = pair.at_client.take_lost()
    assert "server" in str(error) and not isinstance(error, PeerClosed)
    took_s = time.monotonic() - began
    assert took_s > 0.5 and (not quiet or took_s < 10)
    pair.server.loop.post(lambda: pair.down.stream.connection_ended("a test cut it"))
    assert "did not come back within 0.6 s" in str(pair.at_server.take_lost())


def test_a_restarted_listener_does_not_resume_a_stream_it_never_knew(workshop):
    pair = workshop.pair(ChannelOptions(resume_s=PATIENCE_S))
    port = pair.port
    pair.server.loop.post(lambda: pair.server.forget(pair.down.stream))
    pair.server.loop.post(pair.down.stream.detach)
    error = pair.at_client.take_lost()
    assert isinstance(error, PeerLost) and "restarted" in str(error)
    assert port == pair.port


def test_a_new_connection_that_is_never_completed_does_not_keep_a_stream_for_ever(workshop):
    from comms.wire.greeting import Terms

    pair = workshop.pair(ChannelOptions(resume_s=3.0))
    hello = Terms(name="d0", session=pair.down.stream.session, attempt=99, resumed=True)
    pair.server.loop.post(lambda: pair.server.reception.admit(hello))
    # The client's own attempts are older than 99 and refused from now on.
    assert isinstance(pair.at_server.take_lost(), PeerLost)
    told = str(pair.at_client.take_lost())
    assert "a later connection" in told or "did not come back" in told  # or too late to be told


def test_the_smaller_resume_time_counts(workshop):
    pair = workshop.pair(ChannelOptions(resume_s=5.0), client_options=ChannelOptions())
    assert pair.up.stream.resume_s == pair.down.stream.resume_s == 0.0
    pair.server.loop.post(pair.down.stream.detach)
    assert isinstance(pair.at_client.take_lost(), PeerLost)
