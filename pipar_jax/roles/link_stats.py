"""Traffic and waiting times of a run's links in a round, from their counters.

Traffic is counted where it arrives or leaves, at the coordinator; waiting times of sending are
known to the sender alone, so devices report theirs at the end of a round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from comms import Link, LinkStats
from pipar_jax.protocol.values import LinkRow, Waits
from pipar_jax.roles.membership import Membership
from pipar_jax.runtime.link_table import LinkTable
from pipar_jax.schedule.plan import COORDINATOR, Boundary

#: Counters that only the sending side of a link knows.
_COUNTERS = ("queue_s", "credit_wait_s", "blocked_s", "encode_s", "repeated_frames",
             "repeated_bytes")  # fmt: skip


def _read(link: Link) -> LinkStats:
    """Returns a link's counters; its ``queued_peak_bytes`` are those since the last call."""
    stats = link.stats()
    link.begin_peak()
    return stats


def difference(now: LinkStats, before: LinkStats) -> Waits:
    """Returns the waiting times of sending between two readings of a link's counters."""
    found = {name: getattr(now, name) - getattr(before, name) for name in _COUNTERS}
    return Waits(**found, queued_peak_bytes=now.queued_peak_bytes)


class OwnWaits:
    """Waiting times of a device's sending, from one round's end to the next.

    A message that is sent after a device's report of a round counts in the next round.

    Args:
      link: The device's link to the coordinator.
    """

    def __init__(self, link: Link) -> None:
        """Begins to count."""
        self._link, self._before = link, _read(link)

    def take(self) -> Waits:
        """Returns the waiting times since the last call, as ``Traffic.rows`` expects them."""
        now, before = _read(self._link), self._before
        self._before = now
        return difference(now, before)


class DirectTraffic:
    """Traffic from a host to its neighbours over direct links, from one round's end to the next.

    Args:
      name: The host's name.
      link_table: Its links.
    """

    def __init__(self, name: str, link_table: LinkTable) -> None:
        """Begins to count."""
        self._name, self._links = name, link_table.direct()
        self._before = [_read(link) for _, link in self._links]

    def take(self) -> tuple[LinkRow, ...]:
        """Returns a row per link since the last call, as ``Traffic.rows`` makes them."""
        stats = [_read(link) for _, link in self._links]
        found = tuple(
            _sent(self._name, boundary.peer(self._name), now, before)
            for (boundary, _), now, before in zip(self._links, stats, self._before, strict=True)
        )
        self._before = stats
        return found


def odd_rows(rows: Sequence[LinkRow], name: str, met: Iterable[Boundary]) -> str | None:
    """Returns a reported row that is not of the host's links or is repeated, or None.

    Args:
      rows: The traffic that it reports to its neighbours.
      name: The host.
      met: All boundaries that have a link of their own.
    """
    peers = [one.peer(name) for one in met if name in one[:2]]
    for row in rows:
        if row.source != name or row.target not in peers:
            return f"'stored' with what {row.source} sent {row.target}"
        peers.remove(row.target)
    return None


class Traffic:
    """Turns counters of the devices' links into one row for each direction and round.

    Args:
      members: Whose links.
    """

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._before: dict[str, LinkStats] = {}

    def start(self) -> None:
        """Records the counters before a round."""
        self._before = self._stats()

    def rows(self, told: Mapping[str, Waits], traced: Mapping[str, int]) -> list[LinkRow]:
        """Returns a round's rows, the way up before the way down of each link.

        Args:
          told: For each device the waiting times of sending over its link.
          traced: For each device the bytes of its trace, which are excluded.

        Returns:
          Rows with ``source`` and ``target``; ``bytes`` on the wire with headers and heartbeats;
          ``raw_bytes`` and ``payload_bytes`` of messages before and after the codec; ``messages``
          and ``frames``; the seconds ``queue_s``, ``credit_wait_s``, ``blocked_s`` and ``encode_s``
          of sending; ``repeated_frames`` and ``repeated_bytes`` after cut connections;
          ``queued_peak_bytes``, the maximum in the round; ``reconnects``, ``rtt_s`` and
          ``rate_mbps`` of the run so far. ``comms.LinkStats`` defines each of them.
        """
        found = []
        for name, now in self._stats().items():
            if name not in self._before or name not in told:
                continue  # it joined or left during the round
            before, trace = self._before[name], traced.get(name, 0)
            found.append(
                LinkRow(
                    source=name,
                    target=COORDINATOR,
                    bytes=now.bytes_in - before.bytes_in - trace,
                    raw_bytes=now.raw_in_bytes - before.raw_in_bytes - trace,
                    payload_bytes=now.payload_in_bytes - before.payload_in_bytes - trace,
                    messages=now.messages_in - before.messages_in - (trace > 0),
                    frames=now.frames_in - before.frames_in,
                    **dataclasses.asdict(told[name]),
                    reconnects=now.reconnects,
                    rtt_s=now.rtt_s,
                    rate_mbps=now.rate_in_mbps,
                )
            )
            found.append(_sent(COORDINATOR, name, now, before))
        return found

    def _stats(self) -> dict[str, LinkStats]:
        return {name: _read(member.link) for name, member in self._members.by_name.items()}


def _sent(source: str, target: str, now: LinkStats, before: LinkStats) -> LinkRow:
    """Returns the row of a direction, from its sender's counters."""
    return LinkRow(
        source=source,
        target=target,
        bytes=now.bytes_out - before.bytes_out,
        raw_bytes=now.raw_out_bytes - before.raw_out_bytes,
        payload_bytes=now.payload_out_bytes - before.payload_out_bytes,
        messages=now.messages_out - before.messages_out,
        frames=now.frames_out - before.frames_out,
        **dataclasses.asdict(difference(now, before)),
        reconnects=now.reconnects,
        rtt_s=now.rtt_s,
        rate_mbps=now.rate_out_mbps,
    )
