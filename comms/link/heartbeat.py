"""Heartbeats of a link: pings, comparison of clocks, and detection of lost peers."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from comms.errors import FrameError
from comms.link.inbox import Inbox
from comms.link.meter import ClockMeter
from comms.link.outbox import Outbox
from comms.options import ChannelOptions
from comms.wire.event_loop import Guard, Timer
from comms.wire.frame import MAX_CLOCK_S, PING, PONG, Header, Kind

_FIRST_PINGS = 6
_FIRST_PING_S = 0.02


class Heartbeat:
    """Sends heartbeats while there is a connection; used by the I/O thread.

    Args:
      inbox: The receiving half, whose silence is monitored.
      outbox: The sending half, for pings and answers.
      clock: How the peer's clock differs from ours.
      loop: The I/O thread.
      options: Interval and deadline.
      paused: Returns whether reading is paused, so that silence has no meaning.
      flush: Writes pending frames.
      on_silence: Called with the reason when the connection is dead.
    """

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        clock: ClockMeter,
        loop: Guard,
        options: ChannelOptions,
        *,
        paused: Callable[[], bool],
        flush: Callable[[], None],
        on_silence: Callable[[str], None],
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._clock = clock
        self._loop = loop
        self._options = options
        self._paused = paused
        self._flush = flush
        self._on_silence = on_silence
        self._timer: Timer | None = None
        self._pings_sent = 0
        self._tick_s = 0.0

    def start(self) -> None:
        """Begins with a new connection."""
        self._tick_s = time.monotonic()
        self._pings_sent = 0
        self._beat()

    def stop(self) -> None:
        """Ends with a connection."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _beat(self) -> None:
        """Sends a ping and a status, or gives up a dead connection."""
        now = time.monotonic()
        self._pings_sent += 1
        pause_s = self._options.heartbeat_s
        # If this thread did not run (a suspended process), silence has no meaning yet.
        slept, self._tick_s = now - self._tick_s > 2 * pause_s + 0.5, now
        if self._pings_sent <= _FIRST_PINGS:
            pause_s = min(_FIRST_PING_S, pause_s)
        stalled_since_s = self._outbox.stalled_since_s
        silent_s = 0.0 if self._paused() else now - self._inbox.last_read_s
        stalled_s = 0.0 if stalled_since_s is None else now - stalled_since_s
        if max(silent_s, stalled_s) > self._options.silence_s and not slept:
            what = (
                f"has sent nothing for {silent_s:.1f} s"
                if silent_s > stalled_s
                else f"has accepted no bytes for {stalled_s:.1f} s"
            )
            limits = f"{self._options.deadline_s:g} s, which allows {self._options.silence_s:g} s"
            self._on_silence(f"{what}: the deadline is {limits}")
            return
        self._outbox.ask_for_heartbeat()
        self._timer = self._loop.at(now + pause_s, self._beat)
        self._flush()

    def take(self, header: Header, payload: bytes) -> bool:
        """Handles a ping or its answer; returns whether the frame is one.

        Raises:
          FrameError: If its times are not valid.
        """
        if header.kind == Kind.PING and len(payload) == PING.size:
            self._outbox.pongs.append((_clocks(PING, payload)[0], self._inbox.last_read_s))
        elif header.kind == Kind.PONG and len(payload) == PONG.size:
            asked_s, arrived_s, left_s = _clocks(PONG, payload)
            self._clock.add(asked_s, arrived_s, left_s, self._inbox.last_read_s)
        else:
            return False
        return True


def _clocks(form: struct.Struct, payload: bytes) -> tuple[float, ...]:
    times: tuple[float, ...] = form.unpack(payload)
    if not all(abs(time_s) <= MAX_CLOCK_S for time_s in times):
        raise FrameError(f"a heartbeat with the times {times}")
    return times
