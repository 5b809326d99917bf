"""How long a run waits for hosts that answer pings but do nothing: the progress deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from comms import Link
from pipar_jax.config import Config
from pipar_jax.errors import PeerError
from pipar_jax.schedule.plan import long_name

#: Seconds without progress that are always allowed, and actions' lengths that are.
LEAST_S, ACTIONS = 300.0, 20
#: Seconds between two pulses, at most, and their number within a deadline, at least.
PULSE_S, PULSES = 5.0, 5
#: Bytes and bytes a second by which a transfer under way differs from heartbeats.
_BYTES, _BYTES_S = 64 << 10, 1 << 10


def limit_s(config: Config, longest_s: float) -> float:
    """Returns the seconds without progress after which a wait ends.

    Args:
      config: ``network.progress_s``, where it is not 0.
      longest_s: The longest action seen so far.
    """
    return config.network.progress_s or max(LEAST_S, ACTIONS * longest_s)


def pulse_s(config: Config) -> float:
    """Returns the seconds between two pulses of a host that goes on."""
    return min(PULSE_S, limit_s(config, 0.0) / PULSES)


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
        """Says whether it has carried something since it last did."""
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
    """Ends a wait in which nobody shows progress.

    Progress is an answer, a pulse (a host tells now and then how many actions are over on it), and
    a transfer under way. The clock is one for all hosts, since most of them wait for each other; it
    stands while a host that is waited for says that it compiles or times itself.

    Args:
      config: Resolved configuration.
      clock: The monotonic clock.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._longest_s = 0.0
        self._last_s: dict[str, float] = {}
        self._began_s = self._shown_s = clock()
        self._working: dict[str, str] = {}
        self._actions: dict[str, int] = {}

    def action(self, seconds: float) -> None:
        """Takes note of how long an action took."""
        self._longest_s = max(self._longest_s, seconds)

    def begin(self) -> None:
        """Begins a wait."""
        self._began_s = self._shown_s = self._clock()

    def progress(self, host: str) -> None:
        """Takes note of progress of a host."""
        self._last_s[host] = self._shown_s = self._clock()

    def answered(self, host: str) -> None:
        """Takes note of an answer of a host, which ends what it worked at."""
        self._working.pop(host, None)
        self.progress(host)

    def pulse(self, host: str, actions: int) -> None:
        """Takes note of how many actions are over on a host; of no progress if none was."""
        if actions > self._actions.get(host, -1):
            self._actions[host] = actions
            self.progress(host)

    def working(self, host: str, what: str) -> None:
        """Takes note that a host compiles or times itself until its next answer."""
        self._working[host] = what
        self.progress(host)

    def forget(self, host: str) -> None:
        """Forgets a host that is gone."""
        for noted in (self._last_s, self._working, self._actions):
            noted.pop(host, None)  # type: ignore[attr-defined]

    def check(self, missing: Iterable[str], what: str) -> None:
        """Ends the wait if nobody has shown progress for too long.

        Args:
          missing: The hosts that are waited for.
          what: What they are to say.

        Raises:
          PeerError: Nobody has.
        """
        now = self._clock()
        late = list(missing)
        if any(name in self._working for name in late):
            self._shown_s = now
            return
        limit = limit_s(self._config, self._longest_s)
        if now - self._shown_s <= limit or not late:
            return
        late.sort(key=lambda name: self._last_s.get(name, 0.0))
        since = (
            f"{long_name(name)} for {now - self._last_s.get(name, self._began_s):.0f} s"
            for name in late
        )
        raise PeerError(
            f"no progress for {limit:g} s: {what!r} is missing from {', '.join(since)}, though "
            "the links are up: look at what these hosts do, or raise network.progress_s"
        )
