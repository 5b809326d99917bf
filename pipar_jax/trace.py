"""Timed actions: what a real run records and what the simulator predicts, as one type."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipar_jax.errors import RunError
from pipar_jax.files import replacing
from pipar_jax.schedule import (
    COMPUTE,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    parse,
)

COMPUTE_TRACK = "compute"


class Timed(NamedTuple):
    """One action with its time on its host's clock, or on the coordinator's once aligned.

    Attributes:
      action: What was done.
      start_s: When it began, in seconds.
      end_s: When it was over.
      nbytes: Bytes on the wire, for sends and receives.
      samples: Samples in the micro-batch, where it has one.
    """

    action: Action
    start_s: float
    end_s: float
    nbytes: int = 0
    samples: int = 0


class Interval(NamedTuple):
    """A stretch of time; for a round, from the release to the last weights stored."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


def union_s(intervals: Iterable[tuple[float, float]], within: Interval | None = None) -> float:
    """Returns the seconds that intervals cover together, each moment counted once.

    Args:
      intervals: Pairs of start and end, in any order, overlapping or not.
      within: Counts only what lies in this interval.
    """
    covered = 0.0
    reached = float("-inf") if within is None else within.start_s
    for start, end in sorted(intervals):
        if within is not None:
            end = min(end, within.end_s)
        start = max(start, reached)
        if end > start:
            covered += end - start
            reached = end
    return covered


@dataclasses.dataclass
class Trace:
    """The timed actions of a run or of a prediction.

    Attributes:
      hosts: For each host, its timed actions; times are on one clock for all.
      rounds: The interval of each round, on the same clock.
      meta: Anything else worth keeping: the plan, the method, who made it.
    """

    hosts: dict[str, list[Timed]] = dataclasses.field(default_factory=dict)
    rounds: list[Interval] = dataclasses.field(default_factory=list)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, host: str, rows: Iterable[Timed], offset_s: float = 0.0) -> None:
        """Adds a host's actions.

        Args:
          host: The host's name.
          rows: Its timed actions, on its own clock.
          offset_s: Added to its times to bring them to the trace's clock.
        """
        self.hosts.setdefault(host, []).extend(
            row._replace(start_s=row.start_s + offset_s, end_s=row.end_s + offset_s) for row in rows
        )

    def busy_s(self, host: str, interval: Interval) -> float:
        """Returns the seconds a host computed within an interval (F, B, L, U and A)."""
        return union_s(
            ((r.start_s, r.end_s) for r in self.hosts.get(host, ()) if r.action.kind in COMPUTE),
            interval,
        )

    def idle_share(self, host: str, interval: Interval) -> float:
        """Returns the share of an interval in which a host did not compute, in [0, 1]."""
        return 1.0 - self.busy_s(host, interval) / interval.seconds

    def rows(self) -> Iterator[tuple[str, Timed]]:
        """Yields every timed action with its host."""
        for host, rows in self.hosts.items():
            for row in rows:
                yield host, row

    def save(self, path: Path) -> None:
        """Writes the trace in the Chrome trace format, gzipped; Perfetto opens it.

        Hosts are processes; computing, and sending and receiving for each device, are tracks.
        """
        events: list[dict[str, Any]] = []
        for pid, host in enumerate(self.hosts):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": host}})
            tracks = self._tracks(host)
            for track, tid in tracks.items():
                label = {"name": track}
                events.append(
                    {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": label}
                )
            for row in self.hosts[host]:
                events.append(
                    {
                        "ph": "X",
                        "name": str(row.action),
                        "cat": row.action.kind,
                        "pid": pid,
                        "tid": tracks[_track(row.action)],
                        "ts": round(row.start_s * 1e6, 3),
                        "dur": round((row.end_s - row.start_s) * 1e6, 3),
                        "args": {"bytes": row.nbytes, "samples": row.samples},
                    }
                )
        events.extend(self._arrows())
        other = {"rounds": [list(r) for r in self.rounds], "meta": self.meta}
        with replacing(path) as aside, gzip.open(aside, "wt", compresslevel=4) as file:
            json.dump({"traceEvents": events, "otherData": other}, file)

    def _tracks(self, host: str) -> dict[str, int]:
        """Returns the numbers of a host's tracks by name, in the order in which they are shown."""
        links = {(row.action.device, _track(row.action)) for row in self.hosts[host]}
        names = [COMPUTE_TRACK, *(track for _, track in sorted(links) if track != COMPUTE_TRACK)]
        return {name: number for number, name in enumerate(names)}

    def _arrows(self) -> Iterator[dict[str, Any]]:
        """Yields the events that draw an arrow from each send to its receive."""
        sent: dict[Action, dict[str, Any]] = {}
        tracks = {host: self._tracks(host) for host in self.hosts}
        for pid, host in enumerate(self.hosts):
            for row in self.hosts[host]:
                arrives = _arrival(row.action)
                if arrives is not None:
                    tid = tracks[host][_track(row.action)]
                    sent[arrives] = {"pid": pid, "tid": tid, "ts": round(row.start_s * 1e6, 3)}
        number = 0
        for pid, host in enumerate(self.hosts):
            for row in self.hosts[host]:
                if row.action not in sent:
                    continue
                number += 1
                name = {"name": "transfer", "cat": "transfer", "id": number}
                tid = tracks[host][_track(row.action)]
                yield {**name, "ph": "s", **sent[row.action]}
                yield {**name, "ph": "f", "bp": "e", "pid": pid, "tid": tid,
                       "ts": round(row.end_s * 1e6, 3)}  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Reads a trace that ``save`` wrote.

        Raises:
          RunError: The file is missing or is not such a trace.
        """
        try:
            with gzip.open(path, "rt") as file:
                data = json.load(file)
            return cls._from_events(data["traceEvents"], data["otherData"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a trace of pipar_jax: {error}") from error

    @classmethod
    def _from_events(cls, events: Sequence[dict[str, Any]], other: dict[str, Any]) -> Trace:
        """Builds a trace from the Chrome events of ``save``."""
        names: dict[int, str] = {}
        trace = cls(rounds=[Interval(*r) for r in other["rounds"]], meta=other["meta"])
        for event in events:
            if event["ph"] == "M" and event["name"] == "process_name":
                names[event["pid"]] = event["args"]["name"]
                trace.hosts[event["args"]["name"]] = []
            elif event["ph"] == "X":
                start = event["ts"] / 1e6
                args = event["args"]
                trace.hosts[names[event["pid"]]].append(
                    Timed(parse(event["name"]), start, start + event["dur"] / 1e6,
                          args["bytes"], args["samples"])
                )  # fmt: skip
        return trace


def _arrival(action: Action) -> Action | None:
    """Returns the receive that a send ends in, or None for any other action."""
    if action.kind == SEND_FORWARD:
        return action._replace(kind=RECEIVE_FORWARD, stage=action.stage + 1)
    if action.kind == SEND_BACKWARD:
        return action._replace(kind=RECEIVE_BACKWARD, stage=action.stage - 1)
    return None


def _track(action: Action) -> str:
    """Returns the name of the track that an action is drawn on."""
    if action.kind in COMPUTE:
        return COMPUTE_TRACK
    return f"{'receive' if action.kind.startswith('R') else 'send'} d{action.device}"
