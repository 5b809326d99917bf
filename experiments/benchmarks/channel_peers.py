"""The channel and the software that it is compared with, as peers in two processes.

Every peer has a receiving side, started once by ``start_receivers`` with its own threads, and a
sending side that times itself: from the first byte until the receiver has reported that the last
tensor is complete in its own buffer. Runs in processes of ``pipar_jax.launch.pinning``.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import resource
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from comms import (
    ChannelError,
    ChannelOptions,
    Endpoint,
    Link,
    LinkShape,
    Message,
    MessageKind,
    Role,
    Tag,
    TlsOptions,
)
from stages.allocator import peak_bytes

_LENGTH = struct.Struct("<Q")
_CLONE_NEWNET = 0x40000000
_TOKEN = "a token for a benchmark only"
_STATE: dict[str, Any] = {}
SMALL_BYTES = 1024


# -- receiving ---------------------------------------------------------------------------------


def enter_namespace(name: str) -> None:
    """Moves this thread, and those it starts later, into a network namespace."""
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def start_receivers(host: str, certificates: str | None) -> dict[str, int]:
    """Starts the receiving sides in this process and returns their ports by name."""
    ports = {
        "bare": _serve_bare(host, None),
        "channel": _serve_channel(host, None),
        "channel unchecked": _serve_channel(host, None, checksum=False),
    }
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        folder = Path(certificates)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        ports["bare tls"] = _serve_bare(host, context)
        ports["channel tls"] = _serve_channel(host, folder)
    with contextlib.suppress(ImportError):
        ports["grpc"] = _serve_grpc(host)
    return ports


def _serve_bare(host: str, context: ssl.SSLContext | None) -> int:
    listener = socket.create_server((host, 0))
    port: int = listener.getsockname()[1]

    def serve() -> None:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                sock = context.wrap_socket(sock, server_side=True)
            with sock, contextlib.suppress(OSError):
                _answer_bare(sock)

    threading.Thread(target=serve, daemon=True).start()
    return port


def _answer_bare(sock: socket.socket) -> None:
    """Receives tensors, each into its own buffer; answers with a byte, or with small tensors."""
    head = memoryview(bytearray(_LENGTH.size))
    while _receive_all(sock, head):
        (nbytes,) = _LENGTH.unpack(head)
        array = np.empty(nbytes, np.uint8)
        _receive_all(sock, array.data)
        if nbytes == SMALL_BYTES:
            sock.sendall(array.data)
        else:
            sock.sendall(b"\0")


def _receive_all(sock: socket.socket, view: memoryview) -> bool:
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


def _options(folder: Path | None, side: str, checksum: bool | None = None) -> ChannelOptions:
    tls = None
    if folder is not None:
        server = side == "server"
        tls = TlsOptions(
            authority=folder / "authority.pem",
            certificate=folder / "server.pem" if server else None,
            key=folder / "server.key" if server else None,
            server_name="server",
        )
    return ChannelOptions(token=_TOKEN, tls=tls, window_bytes=256 << 20, checksum=checksum)


def _serve_channel(host: str, folder: Path | None, checksum: bool | None = None) -> int:
    endpoint = Endpoint("receiver", options=_options(folder, "server", checksum))
    mailbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def consume() -> None:
        """Takes messages from a mailbox on its own thread, as a host does."""
        while True:
            message = mailbox.get()
            if message.kind == MessageKind.CONTROL:
                message.link.send_control(message.body)
                continue
            if message.tag is not None and message.tag.micro_batch + 1 == (
                message.tag.micro_batches
            ):
                message.link.send_control({"received": message.tag.step})
            message.release()

    def take(message: Message) -> None:
        """Answers small tensors immediately, so that a round trip does not include a host."""
        if message.kind == MessageKind.TENSOR and message.nbytes == SMALL_BYTES:
            message.link.send(Tag(role=Role.COTANGENT), message.array)
            message.release()
        else:
            mailbox.put(message)

    def on_link(link: Link) -> None:
        link.admit()
        link.start(take, lambda: None, lambda error: None)

    threading.Thread(target=consume, daemon=True).start()
    _STATE.setdefault("endpoints", []).append(endpoint)
    return endpoint.listen(host, 0, on_link)[1]


def _serve_grpc(host: str) -> int:
    from concurrent import futures

    import grpc

    def take(requests: Iterator[bytes], context: Any) -> bytes:
        arrays = [np.frombuffer(request, np.uint8).nbytes for request in requests]
        return _LENGTH.pack(sum(arrays))

    method = grpc.stream_unary_rpc_method_handler(take)
    handler = grpc.method_handlers_generic_handler("bench", {"take": method})
    server = grpc.server(futures.ThreadPoolExecutor(2), options=_grpc_options())
    server.add_generic_rpc_handlers((handler,))
    port: int = server.add_insecure_port(f"{host}:0")
    server.start()
    _STATE["grpc server"] = server
    return port


def _grpc_options() -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


# -- sending -----------------------------------------------------------------------------------


class _Channel:
    """The sending side of the channel, kept open between calls."""

    def __init__(
        self, host: str, port: int, folder: Path | None, checksum: bool | None = None
    ) -> None:
        self.endpoint = Endpoint("sender", options=_options(folder, "client", checksum))
        self.link = self.endpoint.connect(host, port, name_of_peer="receiver", timeout_s=10)
        self._replies: queue.SimpleQueue[Message | ChannelError] = queue.SimpleQueue()
        self.link.start(self._replies.put, lambda: None, self._replies.put)

    def reply(self) -> Message:
        """Waits for the receiver's next message.

        Raises:
          ChannelError: The link has ended.
        """
        item = self._replies.get()
        if isinstance(item, ChannelError):
            self._replies.put(item)  # for whoever asks again
            raise item
        return item


def _sender(kind: str, host: str, port: int, folder: str | None) -> Any:
    """Returns the open connection of a kind of peer, opened on first use."""
    if kind in _STATE:
        return _STATE[kind]
    made: Any
    if kind.startswith("channel"):
        checksum = False if kind.endswith("unchecked") else None
        made = _Channel(host, port, None if folder is None else Path(folder), checksum)
    elif kind == "grpc":
        import grpc

        channel = grpc.insecure_channel(f"{host}:{port}", options=_grpc_options())
        made = channel.stream_unary("/bench/take")
    else:
        made = socket.create_connection((host, port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if folder is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_verify_locations(Path(folder) / "authority.pem")
            made = context.wrap_socket(made, server_hostname="server")
    _STATE[kind] = made
    return made


def send_tensors(
    kind: str, host: str, port: int, folder: str | None, nbytes: int, count: int
) -> float:
    """Sends ``count`` float32 tensors of ``nbytes``; returns the seconds until all have arrived."""
    sender = _sender(kind, host, port, folder)
    array = _tensor(nbytes)
    began_s = time.perf_counter()
    if isinstance(sender, _Channel):
        for index in range(count):
            tag = Tag(role=Role.ACTIVATION, micro_batch=index, micro_batches=count)
            sender.link.send(tag, array)
        sender.reply().release()
    elif kind == "grpc":
        data = array.tobytes()
        began_s = time.perf_counter()
        sender(data for _ in range(count))
    else:
        view = memoryview(array.view(np.uint8).data)
        for _ in range(count):
            sender.sendall(_LENGTH.pack(nbytes))
            sender.sendall(view)
        for _ in range(count):
            if not sender.recv(1):
                raise ConnectionError("the bare receiver has ended")
    return time.perf_counter() - began_s


def _tensor(nbytes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    key = f"tensor of {nbytes}"
    if key not in _STATE:
        _STATE[key] = np.random.default_rng(0).random(nbytes // 4, np.float32)
    tensor: np.ndarray[Any, np.dtype[np.float32]] = _STATE[key]
    return tensor


def round_trips(kind: str, host: str, port: int, count: int) -> float:
    """Returns the median seconds of a round trip of 1 KB."""
    sender = _sender(kind, host, port, None)
    array = _tensor(SMALL_BYTES)
    seconds = []
    for _ in range(count):
        began_s = time.perf_counter()
        if isinstance(sender, _Channel):
            sender.link.send(Tag(role=Role.ACTIVATION), array)
            sender.reply().release()
        else:
            sender.sendall(_LENGTH.pack(SMALL_BYTES))
            sender.sendall(array.data)
            _receive_all(sender, np.empty(SMALL_BYTES, np.uint8).data)
        seconds.append(time.perf_counter() - began_s)
    return float(np.median(seconds))


def paced_goodput(host: str, port: int, rate_mbps: float, seconds: float) -> float:
    """Returns payload over rate on an emulated link."""
    sender = _sender("channel", host, port, None)
    sender.link.set_shape(LinkShape(rate_mbps))
    nbytes = int(rate_mbps * 1e6 / 8 * seconds) // 4 * 4
    took_s = send_tensors("channel", host, port, None, nbytes, 1)
    sender.link.set_shape(LinkShape())
    return nbytes * 8 / 1e6 / took_s / rate_mbps


def heartbeat_under_load(
    host: str, port: int, rate_mbps: float | None, nbytes: int, seconds: float
) -> float:
    """Returns the longest round trip of a control message while a large tensor is in flight.

    Args:
      host: Address of the channel's receiver.
      port: Its port.
      rate_mbps: Emulated rate, or None for the network as it is.
      nbytes: Size of the tensor.
      seconds: Duration; the connection is closed after it, during the tensor.
    """
    channel = _Channel(host, port, None)
    if rate_mbps is not None:
        channel.link.set_shape(LinkShape(rate_mbps))
    channel.link.send(Tag(role=Role.ACTIVATION), np.zeros(nbytes, np.uint8))
    until_s, longest_s = time.perf_counter() + seconds, 0.0
    while time.perf_counter() < until_s:
        time.sleep(0.05)
        began_s = time.perf_counter()
        channel.link.send_control({"beat": 1})
        if channel.reply().kind != MessageKind.CONTROL:
            raise RuntimeError(f"the tensor of {nbytes} bytes arrived before {seconds} s were over")
        longest_s = max(longest_s, time.perf_counter() - began_s)
    channel.endpoint.close(timeout_s=0.0)
    return longest_s


# -- a crowd -----------------------------------------------------------------------------------


def start_crowd_server(window_bytes: int) -> int:
    """Starts a server that counts tensors; returns its port."""
    _raise_file_limit()
    endpoint = Endpoint("server", options=ChannelOptions(window_bytes=window_bytes))
    counts: dict[str, int] = {"messages": 0, "links": 0, "bytes": 0}

    def take(message: Message) -> None:
        counts["messages"] += 1
        counts["bytes"] += message.array.nbytes
        message.release()

    def on_link(link: Link) -> None:
        counts["links"] += 1
        link.admit()
        link.start(take, lambda: None, lambda error: None)

    _STATE["crowd"] = (endpoint, counts)
    return endpoint.listen("127.0.0.1", 0, on_link)[1]


def crowd_state() -> dict[str, float]:
    """Returns the number of tensors of the crowd's server, and its memory and threads."""
    _, counts = _STATE["crowd"]
    return {
        **counts,
        "peak_bytes": peak_bytes(),
        "threads": threading.active_count(),
    }


def send_from_crowd(port: int, devices: int, tensors: int, nbytes: int) -> float:
    """Connects devices that send tensors; returns the seconds."""
    _raise_file_limit()
    with Endpoint("devices") as endpoint:
        links = [
            endpoint.connect("127.0.0.1", port, name_of_peer="server", timeout_s=30)
            for _ in range(devices)
        ]
        array = np.ones(nbytes // 4, np.float32)
        began_s = time.perf_counter()
        for step in range(tensors):
            for link in links:
                link.send(Tag(role=Role.ACTIVATION, step=step), array)
        for link in links:
            link.drain(300)
        return time.perf_counter() - began_s


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
