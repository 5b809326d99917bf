"""The tensor channel against bare sockets and grpcio, on slow links, and with many devices.

  python -m experiments.bench_channel [--quick] [--json=FILE]

Two processes on this machine, the receiver on one core and the sender on the other. The baseline is
a bare sendall/recv_into pair that receives each tensor into its own buffer. grpcio is measured if
it is installed (extra ``peers``), and real shaped links (``tc`` in network namespaces) when run as
root on Linux. Takes about two minutes, with --quick less than one.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from comms import codec_names, parse_codec
from experiments.benchmarks import channel_peers as peers
from experiments.benchmarks import harness
from experiments.benchmarks.namespaces import ShapedNamespace, namespaces_work
from pipar_jax.launch.certificates import add_certificate, make_authority
from pipar_jax.launch.pinning import PinnedProcess, first_cores

MB = 1 << 20
HOST = "127.0.0.1"
Case: TypeAlias = Callable[[], object]


def measure(run: harness.Bench) -> None:
    """Measures everything and adds the rows."""
    cores = first_cores(2)
    with (
        _certificates() as folder,
        PinnedProcess("receiver", cores=cores[-1:]) as receiver,
        PinnedProcess("sender", cores=cores[:1]) as sender,
    ):
        ports = receiver.call(peers.start_receivers, HOST, folder)
        _throughput(run, sender, ports, folder)
        _latency(run, sender, ports)
        _emulated(run, sender, ports)
    _real_links(run)
    _crowd(run, cores)
    _codecs(run)


@contextlib.contextmanager
def _certificates() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        add_certificate(make_authority(f"{folder}/trial"), "server", [HOST])
        yield f"{folder}/trial"


def _throughput(
    run: harness.Bench, sender: PinnedProcess, ports: dict[str, int], folder: str | None
) -> None:
    def case(kind: str, nbytes: int) -> Case:
        tls = folder if kind.endswith("tls") else None
        count = max(2, (64 if run.quick else 256) * MB // nbytes)
        return lambda: harness.Seconds(
            sender.call(peers.send_tensors, kind, HOST, ports[kind], tls, nbytes, count) / count
        )

    for size in (1, 16, 64):
        for suffix, target in (("", 0.9), (" tls", 0.85)):
            if "channel" + suffix not in ports:
                continue
            kinds = ["bare" + suffix, "channel" + suffix]
            if not suffix:
                kinds.append("channel unchecked")
            if size == 16 and not suffix and "grpc" in ports:
                kinds.append("grpc")
            samples = run.compare({kind: case(kind, size * MB) for kind in kinds}, repeats=9)
            for kind in kinds:
                gb_s = size * MB / samples.median(kind) / 1e9
                run.row(f"{kind}, {size} MB", gb_s, "GB/s", spread=samples.spread(kind))
            ratio = samples.ratio(kinds[0], kinds[1])
            run.row(f"{kinds[1]} / {kinds[0]}, {size} MB", ratio, "x", target, "higher")
            if "channel unchecked" in kinds:
                ratio = samples.ratio("channel unchecked", "channel")
                run.row(f"channel / unchecked, {size} MB", ratio, "x")
            if "grpc" in kinds:
                ratio = samples.ratio("grpc", "channel")
                run.row("channel / grpc, 16 MB", ratio, "x", 2.0, "higher")
    if "grpc" not in ports:
        run.missing("No grpcio figures: it is not installed (extra `peers`).")


def _latency(run: harness.Bench, sender: PinnedProcess, ports: dict[str, int]) -> None:
    def case(kind: str) -> Case:
        return lambda: harness.Seconds(sender.call(peers.round_trips, kind, HOST, ports[kind], 300))

    samples = run.compare({kind: case(kind) for kind in ("bare", "channel")}, repeats=9)
    bare, channel = samples.median("bare") * 1e6, samples.median("channel") * 1e6
    run.row("round trip of 1 KB, bare", bare, "µs", spread=samples.spread("bare"))
    run.row("round trip of 1 KB, channel", channel, "µs", spread=samples.spread("channel"))
    run.row("round trip of 1 KB, channel - bare", channel - bare, "µs", 200.0)


def _emulated(run: harness.Bench, sender: PinnedProcess, ports: dict[str, int]) -> None:
    port, seconds = ports["channel"], 1.0 if run.quick else 5.0
    for rate in (10.0, 25.0, 50.0):
        run.progress(f"emulated link of {rate:g} Mbit/s")
        goodput = sender.call(peers.paced_goodput, HOST, port, rate, seconds)
        run.row(f"goodput / rate, emulated {rate:g} Mbit/s", goodput, "x", 0.98, "higher")
        beat = sender.call(peers.heartbeat_under_load, HOST, port, rate, 64 * MB, seconds)
        run.row(f"heartbeat during 64 MB, emulated {rate:g} Mbit/s", beat * 1e3, "ms", 200.0)


def _sent_s(sender: PinnedProcess, kind: str, host: str, port: int, nbytes: int) -> harness.Seconds:
    return harness.Seconds(sender.call(peers.send_tensors, kind, host, port, None, nbytes, 1))


def _real_links(run: harness.Bench) -> None:
    if not namespaces_work():
        run.missing("No figures of real slow links: they need root, Linux, ip and tc.")
        return
    for rate in (10.0,) if run.quick else (10.0, 25.0, 50.0):
        with (
            ShapedNamespace(rate, latency_ms=50) as space,
            PinnedProcess("far receiver") as receiver,
            PinnedProcess("near sender") as sender,
        ):
            receiver.call(peers.enter_namespace, space.name)
            ports = receiver.call(peers.start_receivers, space.far_address, None)
            host, nbytes = space.far_address, int(rate * 1e6 / 8 * (1 if run.quick else 2))

            cases = {
                kind: functools.partial(_sent_s, sender, kind, host, ports[kind], nbytes)
                for kind in ("bare", "channel")
            }
            samples = run.compare(cases, repeats=3)
            ratio = samples.ratio("bare", "channel")
            run.row(f"channel / bare, tc {rate:g} Mbit/s", ratio, "x", 0.98, "higher")
            beat = sender.call(
                peers.heartbeat_under_load, host, ports["channel"], None, 64 * MB, 3.0
            )
            run.row(f"heartbeat during 64 MB, tc {rate:g} Mbit/s", beat * 1e3, "ms", 300.0)


def _crowd(run: harness.Bench, cores: list[int]) -> None:
    devices, tensors = (200, 20) if run.quick else (1000, 100)
    run.progress(f"{devices} devices")
    with (
        PinnedProcess("crowd server", cores=cores[-1:]) as server,
        PinnedProcess("crowd", cores=cores[:1]) as crowd,
    ):
        port = server.call(peers.start_crowd_server, 1 << 18)
        before = server.call(peers.crowd_state)
        seconds = crowd.call(peers.send_from_crowd, port, devices, tensors, 64 << 10)
        after = server.call(peers.crowd_state)
    arrived = after["messages"] / (devices * tensors)
    run.row(f"{devices} devices: tensors arrived / sent", arrived, "x", 1.0, "higher")
    run.row(f"{devices} devices: server's peak memory", after["peak_bytes"] / MB, "MB", 300.0)
    run.row(f"{devices} devices: threads added", after["threads"] - before["threads"], "", 0.0)
    run.row(f"{devices} devices: throughput", after["bytes"] / seconds / 1e9, "GB/s")


def _code(name: str, array: np.ndarray[Any, Any]) -> None:
    codec, parameter = parse_codec(name)
    payload = codec.encode(array, parameter)
    codec.decode(payload, array.dtype, array.shape, parameter)


def _codecs(run: harness.Bench) -> None:
    array = np.random.default_rng(0).standard_normal(4 * MB, np.float32)
    target = np.empty_like(array)
    cases: dict[str, Case] = {"memcpy": lambda: np.copyto(target, array)}
    for name in codec_names():
        cases[name] = functools.partial(_code, name, array)
    samples = run.compare(cases, repeats=5)
    run.row("memcpy", array.nbytes / samples.median("memcpy") / 1e9, "GB/s")
    for name in codec_names()[1:]:
        codec, parameter = parse_codec(name)
        ratio = array.nbytes / codec.encoded_bytes(array.dtype, array.shape, parameter)
        run.row(f"{name}: encode + decode", array.nbytes / samples.median(name) / 1e9, "GB/s")
        run.row(f"{name}: bytes before / after", ratio, "x")


if __name__ == "__main__":
    harness.run(measure)
