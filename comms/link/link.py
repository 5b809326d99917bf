"""A link as callers see it: tensors and messages to and from one peer, from any thread."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping

from comms.arrays import Array
from comms.codecs.base import Encoded
from comms.emulation.shaping import LinkShape
from comms.errors import ChannelError, PeerLost
from comms.link.allowance import Allowance
from comms.link.message import Message
from comms.link.meter import LinkStats, to_mbps
from comms.link.outgoing import OnSent, Outgoing, Sending
from comms.link.packing import Job, pack_bundle, pack_control, pack_tensor, set_payload
from comms.link.stream import Stream
from comms.wire.bounded_json import JsonBody
from comms.wire.frame import Role, Tag


class Link:
    """The link to one peer, created by ``Endpoint.connect`` or passed to ``on_link``.

    The public methods may be called from any thread and never block, except ``drain``. Callbacks
    run on the I/O thread and must only post.

    Args:
      stream: The I/O thread's half.
      encode: Runs a job on the codec worker.
      admitted: Called on the I/O thread when the link's owner admits the peer.

    Attributes:
      stream: The I/O thread's half; only that thread may call it.
      peer: Name of the peer in the handshake.
      address: The peer's address, as text.
    """

    def __init__(
        self,
        stream: Stream,
        encode: Callable[[Callable[[], None]], None],
        admitted: Callable[[Stream], None],
    ) -> None:
        self.stream = stream
        self.peer = stream.peer
        self.address = stream.address
        self._queue = stream.queue
        self._options = stream.options
        self._encode_on_worker = encode
        self._admitted = admitted
        self._encode_s = 0.0
        stream.belong_to(self)

    @property
    def attempt(self) -> int:
        """Number of connections of this link so far."""
        return self.stream.attempt

    def __repr__(self) -> str:
        """Returns peer and state."""
        state = "lost" if self.error else "up" if self.stream.transport else "down"
        return f"<link to {self.peer} at {self.address}, {state}>"

    def start(
        self,
        on_message: Callable[[Message], None],
        on_credit: Callable[[], None],
        on_lost: Callable[[ChannelError], None],
    ) -> None:
        """Starts delivery; messages that have arrived before are delivered first.

        Args:
          on_message: Called with every message.
          on_credit: Called when the peer has returned credit.
          on_lost: Called once, with a PeerLost with the reason, when the link has ended
            permanently; not called after this side's own ``close``.
        """
        self.stream.guard.post(lambda: self.stream.start(on_message, on_credit, on_lost))

    def admit(self, allowance: Allowance | None = None) -> None:
        """Sets what the peer may send from now on; may be called repeatedly.

        A link of a listener is not admitted at first: its peer may send one control message of at
        most ``Limits.join_bytes``, and nothing else until this call. Any violation, then or later,
        ends the link before memory is allocated. A link of ``Endpoint.connect`` starts with the
        full limits, which this call can restrict. The allowance applies to the next message that
        starts to arrive, and before any message that is sent after this call can have reached the
        peer.

        Args:
          allowance: The allowance, within the endpoint's ``Limits``; None is all that they allow.
        """
        limits = self._options.limits
        given = Allowance.of(limits) if allowance is None else allowance.within(limits)
        first, self.stream.inbox.allowance = self.stream.inbox.allowance is None, given
        if first:
            self.stream.guard.post(lambda: self._admitted(self.stream))

    @property
    def allowance(self) -> Allowance | None:
        """What the peer may send; None before its admission."""
        return self.stream.inbox.allowance

    def send(
        self,
        tag: Tag,
        array: Array | Encoded,
        *,
        codec: str = "raw",
        on_sent: OnSent | None = None,
    ) -> None:
        """Sends a tensor; returns immediately.

        Args:
          tag: Fields of the tensor for the header.
          array: Any shape; must not change until ``on_sent``. An ``Encoded`` is sent unchanged.
          codec: Name of the codec, such as "raw" or "int8:128".
          on_sent: Called with (start_s, end_s, wire_bytes): the times at which the first and the
            last byte left this process, including the emulated link, and the bytes with headers.
            From this call on the link has no view of the array. Not called for unsent tensors of a
            lost link.

        Raises:
          PeerLost: If the link has ended.
          ChannelError: If the array or the tag cannot be sent.
        """
        sending = Sending(on_sent)
        message, job = pack_tensor(tag, array, codec, sending, self._options.limits)
        self._submit([message], [] if job is None else [job])

    def send_control(self, body: JsonBody) -> None:
        """Sends a control message, which overtakes waiting tensors between two chunks.

        Raises:
          PeerLost: If the link has ended.
          ChannelError: If the body cannot be represented in JSON or is too large.
        """
        message = pack_control(body, self._options.limits)
        self._submit([message], [], control=True)

    def send_bundle(
        self,
        name: str,
        tensors: Mapping[str, Array | Encoded],
        body: JsonBody,
        on_sent: OnSent | None = None,
        *,
        tag: Tag | None = None,
        codec: str = "raw",
    ) -> None:
        """Sends named weights as one message: a manifest, then a frame per tensor.

        Args:
          name: Name of the bundle.
          tensors: Arrays by name, or ``Encoded`` ones; none may change until ``on_sent``.
          body: Additional JSON values.
          on_sent: As in ``send``, for the whole bundle.
          tag: Fields for the headers; its role must be WEIGHT.
          codec: The codec for all tensors that it supports; others are sent raw.

        Raises:
          PeerLost: If the link has ended.
          ChannelError: If a tensor or the body cannot be sent.
        """
        tag = Tag(role=Role.WEIGHT) if tag is None else tag
        sending, limits = Sending(on_sent), self._options.limits
        self._submit(*pack_bundle(name, tensors, body, sending, limits, tag=tag, codec=codec))

    @property
    def available_bytes(self) -> int:
        """Credit for activations and cotangents, in bytes."""
        return max(0, self._queue.window_bytes - self._queue.used_bytes)

    def can_send(self, nbytes: float) -> bool:
        """Returns whether a tensor of ``nbytes`` (before the codec) has credit."""
        return self._queue.can_take(nbytes)

    def set_shape(self, shape: LinkShape) -> None:
        """Sets the emulated shape of this side's sending; a schedule starts now."""
        self._change_shape(lambda: self.stream.reshape(shape))

    def share_shape(self, other: Link) -> None:
        """Shares the emulated line of another link of this endpoint.

        Both then share one rate, as links over one radio do. Set the other's shape first.
        """
        self._change_shape(lambda: self.stream.share_shape(other.stream))

    def _change_shape(self, change: Callable[[], None]) -> None:
        """Holds messages until the change is applied, so that it affects all later ones."""
        self._queue.hold()

        def apply() -> None:
            self._queue.unhold()
            change()

        self.stream.guard.post(apply)

    @property
    def rtt_s(self) -> float | None:
        """Shortest recent round trip of a heartbeat, including the emulated delay."""
        return self.stream.clock.rtt_s

    @property
    def offset_s(self) -> float | None:
        """The peer's monotonic clock minus ours."""
        return self.stream.clock.offset_s

    @property
    def error(self) -> PeerLost | None:
        """The reason why the link has ended, or None."""
        return self._queue.error

    def stats(self) -> LinkStats:
        """Returns the current statistics of the link."""
        stream, queue = self.stream, self._queue
        out, inbox, arrivals = stream.outbox, stream.inbox, stream.arrivals
        return LinkStats(
            bytes_out=out.writer.bytes_out,
            bytes_in=inbox.bytes_in,
            payload_out_bytes=out.payload_out_bytes,
            payload_in_bytes=arrivals.payload_bytes,
            raw_out_bytes=out.raw_out_bytes,
            raw_in_bytes=arrivals.raw_bytes,
            messages_out=out.messages_out,
            messages_in=arrivals.messages,
            frames_out=out.writer.frames_out,
            frames_in=inbox.frames_in,
            queued_messages=len(queue.control) + len(queue.data),
            queued_bytes=queue.waiting_bytes,
            queued_peak_bytes=queue.peak_bytes,
            unacked_bytes=out.unacked_bytes,
            credit_used_bytes=queue.used_bytes,
            held_bytes=inbox.held_bytes,
            blocked_s=out.writer.blocked_s,
            credit_wait_s=out.credit_wait_s,
            queue_s=out.queue_s,
            encode_s=self._encode_s,
            reconnects=max(0, stream.connection.opened - 1),
            repeated_frames=out.repeated_frames,
            repeated_bytes=out.repeated_bytes,
            rtt_s=stream.clock.rtt_s,
            offset_s=stream.clock.offset_s,
            rate_out_mbps=to_mbps(out.pace.rate_bytes),
            rate_in_mbps=to_mbps(inbox.rate.bytes_per_s),
            timed_in_bytes=inbox.rate.timed_bytes,
            timed_in_s=inbox.rate.timed_s,
        )

    def begin_peak(self) -> None:
        """Begins a new ``queued_peak_bytes``, such as a round's, with what is queued now."""
        self._queue.begin_peak()

    def drain(self, timeout_s: float) -> None:
        """Waits until all messages have left (are acknowledged, if the stream can resume).

        Raises:
          PeerLost: If the link ends before they have left.
          ChannelError: If the time limit is exceeded.
        """
        if self.stream.guard.on_thread:
            raise ChannelError("drain() would block the I/O thread: call it from another thread")
        done = threading.Event()
        self.stream.guard.post(lambda: self.stream.drain(done))
        if not done.wait(timeout_s):
            raise ChannelError(
                f"{self.peer} did not accept all messages within {timeout_s:g} s: "
                f"{self._queue.waiting_bytes} bytes are waiting"
            )
        if (error := self._queue.error) is not None and self.stream.outbox.cut_off:
            raise error

    def close(self, reason: str = "the run on that side is over") -> None:
        """Closes the link; waiting messages are still sent, for at most a second.

        Args:
          reason: Sent to the peer, as the reason of its ``PeerClosed``.
        """
        self.stream.guard.post(lambda: self.stream.say_goodbye(reason))

    def refuse(self, reason: str) -> None:
        """Ends the link to an unwanted peer.

        Waiting messages except the reason are dropped, and no further message is delivered, except
        one that the I/O thread is delivering at this moment. As after ``close``, ``on_lost`` is not
        called on this side.

        Args:
          reason: Sent to the peer, as the reason of its ``PeerClosed``.
        """
        self.stream.guard.post(lambda: self.stream.say_goodbye(reason, refuse=True))

    def wait_closed(self, timeout_s: float) -> bool:
        """Waits until the link has ended and returns whether it has."""
        return self._queue.ended.wait(timeout_s)

    def _encode(self, job: Job) -> None:
        """Runs on the codec worker."""
        began_s = time.monotonic()
        try:
            set_payload(job.message, job.codec.encode(job.array, job.parameter))
        except Exception as error:
            failure = error
            self.stream.guard.post(lambda: self.stream.fail(failure))
            return
        self._encode_s += time.monotonic() - began_s
        self._queue.wake()

    def _submit(self, messages: list[Outgoing], jobs: list[Job], *, control: bool = False) -> None:
        self._queue.put(messages, control=control, closed=self.stream.closed_here)
        for job in jobs:
            self._encode_on_worker(functools.partial(self._encode, job))
        self._queue.wake()
