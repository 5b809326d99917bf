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
    long work, such as compiling.

    Reports of work cost a host nothing, and it may keep a transfer going for ever. Both together
    count for ``working_s`` of waiting, however often they are repeated, until the host answers,
    completes an action or is asked for something else; after that the clock runs.

    Args:
      network: Its ``progress_s`` is the limit, unless it is 0; and its ``working_s``.
      clock: The monotonic clock.
    """

    def __init__(self, network: NetworkConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._network, self._clock = network, clock
        self._longest_s = 0.0
        self._last_s: dict[str, float] = {}
        self._began_s = self._shown_s = self._paused_s = clock()
        self._working: set[str] = set()
        #: Since when hosts show nothing but work and transfers; time in which nobody waits is left
        #: out, since an answer may be there that has not been read.
        self._since_s: dict[str, float] = {}
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
        self._skip()
        self._began_s = self._shown_s = self._paused_s

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
        self._skip()

    def _skip(self) -> None:
        """Leaves the time since the pause out of all that is measured."""
        now = self._clock()
        away_s, self._paused_s = now - self._paused_s, now
        self._shown_s = min(now, self._shown_s + away_s)
        for host, since_s in self._since_s.items():
            self._since_s[host] = min(now, since_s + away_s)

    def progress(self, host: str) -> None:
        """Records progress of a host: it has joined, answered, or completed an action."""
        self._since_s.pop(host, None)
        self._last_s[host] = self._shown_s = self._clock()

    def asked(self, host: str) -> None:
        """Records that a host has been asked for something, and has all of its time for it."""
        self._since_s.pop(host, None)

    def answered(self, host: str) -> None:
        """Records an answer of a host, which ends its reported work."""
        self._working.discard(host)
        self.progress(host)

    def pulse(self, host: str, actions: int) -> None:
        """Records how many actions are over on a host: progress if the number has grown."""
        if actions > self._actions.get(host, -1):
            self._actions[host] = actions
            if self._computing:
                self.progress(host)

    def working(self, host: str) -> None:
        """Records that a host is busy with long work until its next answer."""
        self._working.add(host)
        self.transfer(host)

    def transfer(self, host: str) -> None:
        """Records that a host's link carries more than heartbeats."""
        now = self._clock()
        if self._counts(host, now):
            self._last_s[host] = self._shown_s = now

    def _counts(self, host: str, now: float) -> bool:
        """Returns whether a host's reported work and transfers still are progress."""
        return now - self._since_s.setdefault(host, now) <= self._network.working_s

    def forget(self, host: str) -> None:
        """Forgets a host that is gone."""
        self._working.discard(host)
        self._last_s.pop(host, None)
        self._since_s.pop(host, None)
        self._actions.pop(host, None)

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
        if not late or any(name in self._working and self._counts(name, now) for name in late):
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
        spent = [name for name in late if name in self._since_s and not self._counts(name, now)]
        raise PeerError(
            f"no progress for {limit:g} s: {what!r} is missing from {', '.join(since)}, although "
            "the links are up: check what these hosts are doing, or raise network.progress_s"
            + self._why_spent(spent)
        )

    def _why_spent(self, hosts: list[str]) -> str:
        """Returns what is to be added of hosts whose work and transfers count no longer."""
        if not hosts:
            return ""
        return (
            f" or network.working_s: {', '.join(map(long_name, hosts))} reported work, or kept a "
            f"transfer going, for more than {self._network.working_s:g} s"
        )
