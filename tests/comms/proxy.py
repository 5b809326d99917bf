"""A proxy between two endpoints that cuts and stalls connections at seeded random points."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

Fault = Literal["none", "close", "reset", "stall", "stale"]


class Flow:
    """One proxied connection: two sockets, bytes on their way, and the fault that awaits it."""

    def __init__(self, client: socket.socket, server: socket.socket, fault: Fault, after: int):
        self.sides = (client, server)
        self.waiting: dict[socket.socket, deque[bytes]] = {client: deque(), server: deque()}
        self.fault = fault
        self.after = after
        self.passed = 0

    def other(self, side: socket.socket) -> socket.socket:
        return self.sides[1] if side is self.sides[0] else self.sides[0]


class Proxy:
    """Forwards to a port and, after so many bytes of each connection, commits a fault.

    close: both sides see an orderly end. reset: both see a reset. stall: nothing passes any more
    and nobody is told. stale: the client's side is closed at once, while what it had sent is held
    back and reaches the server only when a later connection has passed its own handshake.

    Args:
        port: where to forward to.
        faults: what to choose from, at random.
        span: least and most bytes after which the fault comes, log-uniform.
        seed: of the choices.
        limit: how many faults to commit; connections after that are left alone.
    """

    def __init__(
        self, port: int, faults: Sequence[Fault], span: tuple[int, int], seed: int, limit: int
    ) -> None:
        self.committed: list[Fault] = []
        self.stale_delivered = 0
        self._target = port
        self._faults = faults
        self._span = span
        self._random = random.Random(seed)
        self._limit = limit
        self._flows: dict[socket.socket, Flow] = {}
        self._stale: list[tuple[socket.socket, bytes]] = []
        self._stalled: deque[tuple[float, Flow]] = deque()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.port: int = self._listener.getsockname()[1]
        self._running = True
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def close(self) -> None:
        self._running = False
        self._thread.join()
        for flow in set(self._flows.values()):
            self._end(flow)
        for server, _ in self._stale:
            server.close()
        for _, flow in self._stalled:
            self._end(flow)
        self._listener.close()
        self._selector.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while self._running:
            while self._stalled and self._stalled[0][0] < time.monotonic() - 5:
                self._end(self._stalled.popleft()[1])
            for key, events in self._selector.select(0.02):
                side = key.fileobj
                if side is self._listener:
                    self._accept()
                elif side in self._flows:
                    flow = self._flows[side]
                    with contextlib.suppress(BlockingIOError):
                        try:
                            if events & selectors.EVENT_WRITE:
                                self._write(flow, side)
                            if events & selectors.EVENT_READ and side in self._flows:
                                self._read(flow, side)
                        except OSError as error:
                            if isinstance(error, BlockingIOError):
                                raise
                            self._end(flow)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        fault: Fault = "none"
        after = 0
        if len(self.committed) < self._limit:
            fault = self._random.choice(self._faults)
            low, high = self._span
            after = int(low * (high / low) ** self._random.random())
        flow = Flow(client, server, fault, after)
        for side in flow.sides:
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._flows[side] = flow
            self._selector.register(side, selectors.EVENT_READ)

    def _read(self, flow: Flow, side: socket.socket) -> None:
        data = side.recv(1 << 16)
        if not data:
            self._end(flow)
            return
        flow.passed += len(data)
        if flow.fault != "none" and flow.passed >= flow.after:
            keep = len(data) - (flow.passed - flow.after)
            self._commit(flow, side, data[: max(keep, 0)], data)
            return
        if side is flow.sides[1] and flow.passed > 1500 and self._stale:
            self._deliver_stale()
        self._forward(flow, side, data)

    def _forward(self, flow: Flow, side: socket.socket, data: bytes) -> None:
        target = flow.other(side)
        flow.waiting[target].append(data)
        self._write(flow, target)

    def _write(self, flow: Flow, side: socket.socket) -> None:
        waiting = flow.waiting[side]
        while waiting:
            try:
                sent = side.send(waiting[0])
            except BlockingIOError:
                break
            if sent < len(waiting[0]):
                waiting[0] = waiting[0][sent:]
                break
            waiting.popleft()
        # Bounded: while one side takes nothing the other is not read.
        self._selector.modify(
            side, selectors.EVENT_READ | (selectors.EVENT_WRITE if waiting else 0)
        )

    def _commit(self, flow: Flow, side: socket.socket, part: bytes, whole: bytes) -> None:
        self.committed.append(flow.fault)
        if flow.fault == "stall":
            for each in flow.sides:
                self._selector.unregister(each)
                del self._flows[each]
            self._stalled.append((time.monotonic(), flow))
            return
        if flow.fault == "stale":
            client, server = flow.sides
            held = b"".join(flow.waiting[server]) + (whole if side is client else b"")
            for each in flow.sides:
                self._selector.unregister(each)
                del self._flows[each]
            client.close()
            self._stale.append((server, held))
            return
        self._forward(flow, side, part)
        if flow.fault == "reset":
            for each in flow.sides:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if side in self._flows:
            self._end(flow)

    def _deliver_stale(self) -> None:
        for server, held in self._stale:
            with contextlib.suppress(OSError):
                server.send(held)
                self.stale_delivered += 1
            server.close()
        self._stale.clear()

    def _end(self, flow: Flow) -> None:
        for side in flow.sides:
            if self._flows.pop(side, None) is not None:
                self._selector.unregister(side)
            side.close()
