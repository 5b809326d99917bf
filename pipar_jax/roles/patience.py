"""The progress deadline: how long a run waits for hosts that answer pings but do not progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from comms import Link
from pipar_jax.config import NetworkConfig
from pipar_jax.errors import PeerError
from pipar_jax.schedule.plan import long_name

#: Time without progress that is always allowed: in seconds, and in lengths of an action.
LEAST_S, ACTIONS = 300.0, 20
#: Seconds between two pulses, at most, and their number within a deadline, at least.
PULSE_S, PULSES = 5.0, 5
#: Bytes and bytes a second by which a transfer under way differs from heartbeats.
_BYTES, _BYTES_S = 64 << 10, 1 << 10


def limit_s(network: NetworkConfig, longest_s: float) -> float:
    """Returns the seconds without progress after which a wait ends.

    Args:
      network: Its ``progress_s`` is the limit, unless it is 0.
      longest_s: The longest action seen so far.
    """
    return network.progress_s or max(LEAST_S, ACTIONS * longest_s)


def pulse_s(network: NetworkConfig) -> float:
    """Returns the seconds between two pulses of a host that goes on."""
    return min(PULSE_S, limit_s(network, 0.0) / PULSES)


class Moving:
    """Whether a link carries more than heartbeats.

    Args:
      link: The link.
      clock: The monotonic clock.
    """

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._clock = link, clock
        self._mark = clock(), self._carried()

    def look(self) -> bool:
        """Returns whether it has carried more than heartbeats since the last call."""
        now_s, carried = self._clock(), self._carried()
        since_s, before = self._mark
        if carried - before < _BYTES + _BYTES_S * (now_s - since_s):
            return False
        self._mark = now_s, carried
        return True

    def _carried(self) -> int:
        stats = self._link.stats()
        return stats.bytes_in + stats.bytes_out


class Patience:
    """Ends a wait in which no host makes progress.

    Progress is an answer, a transfer under way and, where hosts compute, a pulse: a host's periodic
    report of how many actions are over. The clock is one for all hosts, since most of them wait for
    each other; it stops while nobody is waited for, and while a host that is waited for reports
    that it compiles or times itself.

    Args:
      network: Its ``progress_s`` is the limit, unless it is 0.
      clock: The monotonic clock.
    """

    def __init__(self, network: NetworkConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._network, self._clock = network, clock
        self._longest_s = 0.0
        self._last_s: dict[str, float] = {}
        self._began_s = self._shown_s = self._paused_s = clock()
        self._working: dict[str, str] = {}
        self._actions: dict[str, int] = {}
        self._computing, self._waiter = True, object()

    def action(self, seconds: float) -> None:
        """Records the duration of an action."""
        self._longest_s = max(self._longest_s, seconds)

    def begin(self, *, computing: bool = True, waiter: object = None) -> None:
        """Begins a wait.

        Args:
          computing: Whether hosts compute meanwhile. Otherwise no action is over because of what is
            waited for, and whoever reports that some are might withhold its answer for ever.
          waiter: Who waits.
        """
        self._computing, self._waiter = computing, waiter
        self._began_s = self._shown_s = self._paused_s = self._clock()

    def pause(self) -> None:
        """Notes that whoever waits does something else for a while."""
        self._paused_s = self._clock()

    def resume(self, *, computing: bool, waiter: object) -> None:
        """Goes on with a wait: what was done since the pause is no host's delay.

        Args:
          computing: See ``begin``.
          waiter: Who waits; if another one has waited meanwhile, the wait begins anew.
        """
        if waiter is not self._waiter:
            self.begin(computing=computing, waiter=waiter)
            return
        now = self._clock()
        self._shown_s = min(now, self._shown_s + now - self._paused_s)
        self._paused_s = now

    def progress(self, host: str) -> None:
        """Records progress of a host."""
        self._last_s[host] = self._shown_s = self._clock()

    def answered(self, host: str) -> None:
        """Records an answer of a host, which ends its reported work."""
        self._working.pop(host, None)
        self.progress(host)

    def pulse(self, host: str, actions: int) -> None:
        """Records how many actions are over on a host: progress if the number has grown."""
        if actions > self._actions.get(host, -1):
            self._actions[host] = actions
            if self._computing:
                self.progress(host)

    def working(self, host: str, what: str) -> None:
        """Records that a host compiles or times itself until its next answer."""
        self._working[host] = what
        self.progress(host)

    def forget(self, host: str) -> None:
        """Forgets a host that is gone."""
        for noted in (self._last_s, self._working, self._actions):
            noted.pop(host, None)  # type: ignore[attr-defined]

    def check(self, missing: Iterable[str], what: str) -> None:
        """Ends the wait if no host has made progress within the limit.

        Args:
          missing: The hosts that are waited for.
          what: The kind of message that is expected of them.

        Raises:
          PeerError: No host has.
        """
        now = self._clock()
        late = list(missing)
        if not late or any(name in self._working for name in late):
            self._shown_s = now
            return
        limit = limit_s(self._network, self._longest_s)
        if now - self._shown_s <= limit:
            return
        late.sort(key=lambda name: self._last_s.get(name, 0.0))
        since = (
            f"{long_name(name)} for {now - self._last_s.get(name, self._began_s):.0f} s"
            for name in late
        )
        raise PeerError(
            f"no progress for {limit:g} s: {what!r} is missing from {', '.join(since)}, although "
            "the links are up: check what these hosts are doing, or raise network.progress_s"
        )
