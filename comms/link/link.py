"""A link: the stream of tensors and messages between this process and one peer."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from comms.codecs.base import Array, Encoded
from comms.emulation.shaping import LinkShape
from comms.errors import ChannelError, PeerLost
from comms.link.allowance import Allowance
from comms.link.message import Message
from comms.link.meter import LinkStats, to_mbps
from comms.link.outgoing import OnSent, Outgoing, Sending
from comms.link.packing import Job, pack_bundle, pack_control, pack_tensor, set_payload
from comms.link.stream import Stream
from comms.wire.event_loop import READ
from comms.wire.frame import Role, Tag


class Link(Stream):
    """One peer's link; made by `Endpoint.connect` or handed to `on_link`.

    The public methods may be called from any thread and never wait, but for `drain`. Callbacks run
    on the I/O thread and must only post.

    Attributes:
        peer: the name that the peer gave in the handshake.
        address: the peer's address, as text.
        attempt: how many connections this stream has had.
    """

    def __repr__(self) -> str:
        """Names the peer and the state."""
        state = "lost" if self._error else "up" if self._transport else "down"
        return f"<link to {self.peer} at {self.address}, {state}>"

    def start(
        self,
        on_message: Callable[[Message], None],
        on_credit: Callable[[], None],
        on_lost: Callable[[ChannelError], None],
    ) -> None:
        """Begins delivery; what arrived before is delivered first.

        Args:
            on_message: gets every message.
            on_credit: called when the peer has given credit back.
            on_lost: called once, with a PeerLost that says why, when the link has ended for good;
                not called after this side's own `close`.
        """

        def begin() -> None:
            lost_before = self._error
            self._on_credit, self._on_lost = on_credit, on_lost
            self._arrivals.start(on_message)
            if lost_before is not None:
                if not self._closing:
                    on_lost(lost_before)
                return
            self._set_interest()
            self._read_again = True
            self._run_ready(READ)

        self._loop.post(begin)

    def admit(self, allowance: Allowance | None = None) -> None:
        """Says what the peer may send from now on; may be called again when that changes.

        A link that a listener accepted is not admitted at first: its peer may send one control
        message of at most `Limits.join_bytes`, and nothing else until this is called. Whatever
        goes beyond, then or later, ends the link before anything is allocated for it. A link that
        `Endpoint.connect` made begins with all that the limits allow, and can be narrowed.

        It holds from the next message that begins to arrive, and before anything that is sent
        after this call can have reached the peer.

        Args:
            allowance: what is taken, as far as the endpoint's `Limits` allow it; None is all that
                they allow.
        """
        limits = self._options.limits
        given = Allowance.of(limits) if allowance is None else allowance.within(limits)
        if self._inbox.allowance is None:
            self._loop.post(lambda: self._endpoint.doorstep.leave(self))
        self._inbox.allowance = given

    @property
    def allowance(self) -> Allowance | None:
        """What the peer may send; None while it is not admitted."""
        return self._inbox.allowance

    def send(
        self,
        tag: Tag,
        array: Array | Encoded,
        *,
        codec: str = "raw",
        on_sent: OnSent | None = None,
    ) -> None:
        """Sends a tensor; returns at once.

        Args:
            tag: what the header says of it.
            array: any shape; must not change until `on_sent`. An `Encoded` is sent as it is.
            codec: name of the codec, such as "raw" or "int8:128".
            on_sent: gets (start_s, end_s, wire_bytes): when the first and the last byte left this
                process, the emulated link's time included, and the bytes with headers. From this
                call on the link holds no view of the array. It is not called for what is still
                unsent when the link is lost.

        Raises:
            PeerLost: if the link has ended.
            ChannelError: if the array or the tag cannot be sent.
        """
        sending = Sending(on_sent)
        message, job = pack_tensor(tag, array, codec, sending, self._options.limits)
        self._submit([message], [] if job is None else [job])

    def send_control(self, body: dict[str, Any]) -> None:
        """Sends a control message, which overtakes waiting tensors between two chunks.

        Raises:
            PeerLost: if the link has ended.
            ChannelError: if the body is no JSON or too large.
        """
        message = pack_control(body, self._options.limits)
        self._submit([message], [], control=True)

    def send_bundle(
        self,
        name: str,
        tensors: Mapping[str, Array | Encoded],
        body: dict[str, Any],
        on_sent: OnSent | None = None,
        *,
        tag: Tag | None = None,
        codec: str = "raw",
    ) -> None:
        """Sends named weights as one message: a manifest, then a frame per tensor.

        Args:
            name: what the bundle is.
            tensors: arrays by name, or `Encoded` ones; none may change until `on_sent`.
            body: JSON values that travel with them.
            on_sent: as in `send`, for the whole bundle.
            tag: what the headers say; its role must be WEIGHT.
            codec: the codec for every tensor that it takes; the others go raw.

        Raises:
            PeerLost: if the link has ended.
            ChannelError: if something cannot be sent.
        """
        tag = Tag(role=Role.WEIGHT) if tag is None else tag
        sending, limits = Sending(on_sent), self._options.limits
        self._submit(*pack_bundle(name, tensors, body, sending, limits, tag=tag, codec=codec))

    @property
    def available_bytes(self) -> int:
        """Activation and cotangent bytes that the peer would take now."""
        return max(0, self._outbox.peer_window_bytes - self._used_bytes())

    def can_send(self, nbytes: float) -> bool:
        """Whether a tensor of `nbytes` (before the codec) has credit; an empty window takes any."""
        used = self._used_bytes()
        return used == 0 or used + nbytes <= self._outbox.peer_window_bytes

    def set_shape(self, shape: LinkShape) -> None:
        """Shapes what this side sends from now on; a schedule counts from now."""
        self._change_shape(lambda: self.reshape(shape))

    def share_shape(self, other: Link) -> None:
        """Sends over the same emulated line as another link of this endpoint, in turns with it.

        Both then have one rate together, as links over one radio do. Set the other's shape first.
        """
        self._change_shape(lambda: self.join_shape(other))

    def _change_shape(self, change: Callable[[], None]) -> None:
        """Lets nothing leave until the change was made, so that what is sent next is under it."""
        with self._lock:
            self._outbox.shapes_due += 1

        def apply() -> None:
            with self._lock:
                self._outbox.shapes_due -= 1
            change()

        self._loop.post(apply)

    @property
    def rtt_s(self) -> float | None:
        """Shortest recent round trip of a heartbeat, emulated delay included."""
        return self._clock.rtt_s

    @property
    def offset_s(self) -> float | None:
        """The peer's monotonic clock minus ours."""
        return self._clock.offset_s

    @property
    def error(self) -> PeerLost | None:
        """Why the link has ended, or None while it has not."""
        return self._error

    def stats(self) -> LinkStats:
        """Returns the link's figures as of now."""
        out, inbox, arrivals = self._outbox, self._inbox, self._arrivals
        return LinkStats(
            bytes_out=out.bytes_out,
            bytes_in=inbox.bytes_in,
            payload_out_bytes=out.payload_out_bytes,
            payload_in_bytes=arrivals.payload_bytes,
            raw_out_bytes=out.raw_out_bytes,
            raw_in_bytes=arrivals.raw_bytes,
            messages_out=out.messages_out,
            messages_in=arrivals.messages,
            frames_out=out.frames_out,
            frames_in=inbox.frames_in,
            queued_messages=len(out.control) + len(out.data),
            queued_bytes=self._submitted_raw_bytes - out.departed_raw_bytes,
            queued_peak_bytes=self._queued_peak_bytes,
            unacked_bytes=out.unacked_bytes,
            credit_used_bytes=self._used_bytes(),
            held_bytes=inbox.held_bytes,
            blocked_s=out.blocked_s,
            credit_wait_s=out.credit_wait_s,
            queue_s=out.queue_s,
            encode_s=self._encode_s,
            reconnects=max(0, self._reconnects),
            repeated_frames=out.repeated_frames,
            repeated_bytes=out.repeated_bytes,
            rtt_s=self._clock.rtt_s,
            offset_s=self._clock.offset_s,
            rate_out_mbps=to_mbps(out.rate_bytes),
            rate_in_mbps=to_mbps(inbox.rate.bytes_per_s),
            timed_in_bytes=inbox.rate.timed_bytes,
            timed_in_s=inbox.rate.timed_s,
        )

    def drain(self, timeout_s: float) -> None:
        """Waits until all that was sent has left (is acknowledged, if the stream can resume).

        Raises:
            PeerLost: if the link ends before.
            ChannelError: if it takes longer than `timeout_s`.
        """
        if self._loop.on_thread:
            raise ChannelError("drain() would block the I/O thread: call it from another one")
        done = threading.Event()

        def wait() -> None:
            self._drainers.append(done)
            self._check_drained()

        self._loop.post(wait)
        if not done.wait(timeout_s):
            raise ChannelError(
                f"{self.peer} did not take what was sent within {timeout_s:g} s: "
                f"{self._submitted_raw_bytes - self._outbox.departed_raw_bytes} bytes still wait"
            )
        if self._error is not None and not self._outbox.empty:
            raise self._error

    def close(self, reason: str = "the run on that side is over") -> None:
        """Ends the link in good order: what waits is still sent, for a second at most.

        Args:
            reason: what the peer is told, as the reason of its `PeerClosed`.
        """
        self._loop.post(lambda: self.say_goodbye(reason))

    def refuse(self, reason: str) -> None:
        """Ends the link to a peer that is not wanted, or not any more.

        What waits to be sent is dropped but for the reason, and nothing that still arrives is
        delivered, except what the I/O thread is handing over at this moment. As after `close`,
        `on_lost` is not called on this side.

        Args:
            reason: what the peer is told, as the reason of its `PeerClosed`.
        """
        self._loop.post(lambda: self.say_goodbye(reason, refuse=True))

    def wait_closed(self, timeout_s: float) -> bool:
        """Waits until the link has ended and returns whether it has."""
        return self._closed.wait(timeout_s)

    def _used_bytes(self) -> int:
        return self._reserved_bytes - self._outbox.peer_released_bytes

    def _encode(self, job: Job) -> None:
        """Runs on the codec worker."""
        began_s = time.monotonic()
        try:
            set_payload(job.message, job.codec.encode(job.array, job.parameter))
        except Exception as error:
            failure = error
            self._endpoint.loop.post(lambda: self._failed_here(failure))
            return
        self._encode_s += time.monotonic() - began_s
        self._post_flush()

    def _submit(self, messages: list[Outgoing], jobs: list[Job], *, control: bool = False) -> None:
        with self._lock:
            if self._error is not None or self._closing:
                raise self._error or self._closed_here()
            self._reserved_bytes += sum(message.cost for message in messages)
            self._submitted_raw_bytes += sum(message.raw_bytes for message in messages)
            queued = self._submitted_raw_bytes - self._outbox.departed_raw_bytes
            self._queued_peak_bytes = max(self._queued_peak_bytes, queued)
            (self._outbox.control if control else self._outbox.data).extend(messages)
        for job in jobs:
            self._endpoint.encode(functools.partial(self._encode, job))
        self._post_flush()
