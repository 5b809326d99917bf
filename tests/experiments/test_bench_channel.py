"""The pieces of the channel's benchmark at a tiny size: every peer delivers, figures make sense."""

from __future__ import annotations

import subprocess
import sys

import pytest

from comms import ChannelError
from experiments.benchmarks import channel_peers as peers
from experiments.benchmarks.namespaces import ShapedNamespace, namespaces_work
from pipar_jax.launch.certificates import add_certificate, make_authority
from pipar_jax.launch.pinning import PinnedProcess
from tests.patience import PROCESS_S

HOST = "127.0.0.1"


def test_every_peer_delivers(tmp_path):
    folder = str(tmp_path / "trial")
    add_certificate(make_authority(folder), "server", [HOST])
    with PinnedProcess("receiver") as receiver, PinnedProcess("sender") as sender:
        ports = receiver.call(peers.start_receivers, HOST, folder)
        for kind, port in ports.items():
            tls = folder if kind.endswith("tls") else None
            assert sender.call(peers.send_tensors, kind, HOST, port, tls, 1 << 16, 3) > 0
        for kind in ("bare", "channel"):
            assert sender.call(peers.round_trips, kind, HOST, ports[kind], 5) > 0
        goodput = sender.call(peers.paced_goodput, HOST, ports["channel"], 20.0, 0.3)
        assert 0 < goodput <= 1.0
        beat_s = sender.call(peers.heartbeat_under_load, HOST, ports["channel"], 20.0, 1 << 26, 0.5)
        assert beat_s > 0


def test_a_link_that_ends_is_no_endless_wait():
    with PinnedProcess("sender") as sender:
        with PinnedProcess("receiver") as receiver:
            ports = receiver.call(peers.start_receivers, HOST, None)
            assert sender.call(peers.round_trips, "channel", HOST, ports["channel"], 2) > 0
        with pytest.raises(ChannelError):
            sender.call(peers.round_trips, "channel", HOST, ports["channel"], 2)


@pytest.mark.soak
def test_a_heartbeat_passes_on_a_real_slow_link():
    if not namespaces_work():
        pytest.skip("needs root on Linux with ip and tc")
    with (
        ShapedNamespace(10.0, latency_ms=50) as space,
        PinnedProcess("receiver") as receiver,
        PinnedProcess("sender") as sender,
    ):
        receiver.call(peers.enter_namespace, space.name)
        ports = receiver.call(peers.start_receivers, space.far_address, None)
        beat_s = sender.call(
            peers.heartbeat_under_load, space.far_address, ports["channel"], None, 16 << 20, 3.0
        )
        assert beat_s < 0.3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("binary", ["bench_channel", "bench_codec"])
def test_the_binaries_say_what_they_do_and_refuse_what_they_do_not_know(binary):
    command = [sys.executable, "-m", f"experiments.{binary}"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=PROCESS_S)
    assert "--quick" in done.stdout and "--json=FILE" in done.stdout
    wrong = subprocess.run([*command, "--quack"], capture_output=True, text=True, timeout=PROCESS_S)
    assert wrong.returncode != 0 and "quack" in wrong.stderr
