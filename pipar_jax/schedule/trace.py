"""Traces: timed actions, recorded by runs and predicted by the simulator."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipar_jax.disk.files import describe_reading, refused, replacing
from pipar_jax.disk.json_text import JsonMapping, JsonObject, dumps
from pipar_jax.errors import PlanError, RunError
from pipar_jax.schedule.actions import (
    COMPUTE,
    KIND_NAMES,
    KINDS,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    ActionKind,
)

COMPUTE_TRACK = "compute"
#: Compression level; files are a tenth smaller at level 4.
LEVEL = 1
#: Names of the process that shows the rounds, and of its slices.
ROUNDS, ROUND = "rounds", "round"
_ROUNDS_PID = 0
_CARRIED = (SEND_FORWARD, SEND_BACKWARD, RECEIVE_FORWARD, RECEIVE_BACKWARD)


class Timed(NamedTuple):
    """One action with its time on the host's clock, or on the coordinator's after alignment.

    Attributes:
      action: The action.
      start_s: Start in seconds.
      end_s: End in seconds.
      nbytes: Bytes on the wire, for sends and receives.
      samples: Samples in the micro-batch, for actions with one.
    """

    action: Action
    start_s: float
    end_s: float
    nbytes: int = 0
    samples: int = 0


class Interval(NamedTuple):
    """A time interval; for a round, from its release until the last weights are stored."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """Length of the interval."""
        return self.end_s - self.start_s


def union_s(intervals: Iterable[tuple[float, float]], within: Interval | None = None) -> float:
    """Returns the length of the union of intervals.

    Args:
      intervals: Pairs of start and end, in any order, overlapping or not.
      within: Restricts the union to this interval.
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
    """The timed actions of a run or a prediction.

    Attributes:
      hosts: Timed actions by host, all on one clock.
      rounds: The interval of each round, on the same clock.
      meta: Further facts, such as the plan and the method.
    """

    hosts: dict[str, list[Timed]] = dataclasses.field(default_factory=dict)
    rounds: list[Interval] = dataclasses.field(default_factory=list)
    meta: JsonObject = dataclasses.field(default_factory=dict)

    def add(self, host: str, rows: Iterable[Timed], offset_s: float = 0.0) -> None:
        """Adds actions of a host.

        Args:
          host: The host's name.
          rows: Its timed actions, on its own clock.
          offset_s: Added to the times to convert them to the trace's clock.
        """
        self.hosts.setdefault(host, []).extend(
            row._replace(start_s=row.start_s + offset_s, end_s=row.end_s + offset_s) for row in rows
        )

    def busy_s(self, host: str, interval: Interval) -> float:
        """Returns the seconds in which a host computed within an interval (F, B, L, U and A)."""
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
        """Writes the trace atomically, in the format of ``TraceWriter``.

        Raises:
          DiskError: The file cannot be written.
        """
        ends = [interval.end_s for interval in self.rounds]
        parts: list[dict[str, list[Timed]]] = [
            {host: [] for host in self.hosts} for _ in range(len(ends) + 1)
        ]
        for host, row in self.rows():
            parts[bisect.bisect_right(ends, row.start_s)][host].append(row)
        with replacing(path) as aside, TraceWriter(aside, self.meta, path) as file:
            for part, interval in zip(parts, [*self.rounds, None], strict=True):
                for host, rows in part.items():
                    file.add(host, rows)
                if interval is not None:
                    file.end_round(interval)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Reads a whole trace; of a truncated one, the complete rounds.

        Raises:
          RunError: The file is missing or not a trace.
        """
        whole = cls()
        for part in read_rounds(path):
            whole.meta = part.meta
            whole.rounds.extend(part.rounds)
            for host, rows in part.hosts.items():
                whole.hosts.setdefault(host, []).extend(rows)
        return whole


class TraceWriter:
    """Writes a trace round by round, as gzipped Chrome trace, which Perfetto opens.

    Each host is a process with one track for computations and, for each device, one for sends and
    one for receives; the rounds are a process of their own. A slice is named by its kind, such as
    ``forward``, so that viewers group slices of a kind; its arguments hold the rest: device,
    stage, step, micro-batch, bytes and samples. Each event is a line, and the last event of a round
    marks it as complete: a truncated file is read up to the last complete round. Only the ends of
    arrows between sends and receives are kept in memory, for at most two rounds.

    Args:
      path: The file.
      meta: Further facts, such as the plan and the method.
      known_as: Path in error messages, if the file is written under a temporary name.

    Raises:
      DiskError: The file cannot be written; raised by the methods as well.
    """

    def __init__(self, path: Path, meta: JsonMapping, known_as: Path | None = None) -> None:
        """Creates the file."""
        self._path = known_as or path
        self._pids: dict[str, int] = {}
        self._tracks: dict[tuple[int, int | None, bool], int] = {}
        self._open: list[dict[Action, tuple[int, int, float]]] = [{}, {}]
        self._arrows = 0
        self._pack = zlib.compressobj(LEVEL, wbits=31)  # gzip format, without name and time
        with refused(self._path):
            self._file = open(path, "wb")  # noqa: SIM115 - close and give_up end it
        head = dumps({"meta": meta})
        self._write([f'{{"otherData":{head},"traceEvents":['], "")
        self._write([_named("process_name", _ROUNDS_PID, 0, ROUNDS)], "")
        self._bring_out()

    def add(self, host: str, rows: Iterable[Timed]) -> None:
        """Writes timed actions of a host, with times on the trace's clock."""
        lines: list[str] = []
        if host not in self._pids:
            self._pids[host] = _ROUNDS_PID + 1 + len(self._pids)
            lines.append(_named("process_name", self._pids[host], 0, host))
        pid = self._pids[host]
        for row in rows:
            action = row.action
            tid = self._track(pid, action, lines)
            lines.append(
                f'{{"ph":"X","name":"{KIND_NAMES[action.kind]}","cat":"{action.kind}","pid":{pid},'
                f'"tid":{tid},"ts":{row.start_s * 1e6:.3f},'
                f'"dur":{(row.end_s - row.start_s) * 1e6:.3f},"args":{{'
                f'"device":{action.device},"stage":{action.stage},"step":{action.step},'
                f'"micro_batch":{action.micro_batch},'
                f'"bytes":{row.nbytes},"samples":{row.samples}}}}}'
            )
            if action.kind in _CARRIED:
                self._link(row, pid, tid, lines)
        self._write(lines)

    def end_round(self, interval: Interval) -> None:
        """Marks a round as complete and flushes it to disk."""
        start, seconds = interval.start_s * 1e6, interval.seconds * 1e6
        self._write(
            [f'{{"ph":"X","name":"{ROUND}","cat":"{ROUND}","pid":{_ROUNDS_PID},"tid":0,'
             f'"ts":{start:.3f},"dur":{seconds:.3f},"args":{dumps(list(interval))}}}']
        )  # fmt: skip
        self._bring_out()
        self._open = [self._open[1], {}]

    @property
    def unmatched(self) -> int:
        """Number of sends and receives whose other end is still awaited."""
        return sum(map(len, self._open))

    def close(self) -> None:
        """Completes the file, including actions after the last round."""
        if not self._file.closed:
            with refused(self._path), self._file:
                self._file.write(self._pack.compress(b"]}\n") + self._pack.flush())

    def give_up(self) -> None:
        """Abandons the file; the rounds on disk remain readable."""
        with contextlib.suppress(OSError):  # from flushing the buffer on close
            self._file.close()

    def __enter__(self) -> TraceWriter:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Completes the file, or abandons it after an error."""
        if error is None:
            self.close()
        else:
            self.give_up()

    def _write(self, lines: Sequence[str], before: str = ",") -> None:
        if lines:
            text = before + f"\n{before}".join(lines) + "\n"
            packed = self._pack.compress(text.encode())
            with refused(self._path):
                self._file.write(packed)

    def _bring_out(self) -> None:
        """Flushes to the operating system, so that the file can be read up to here."""
        with refused(self._path):
            self._file.write(self._pack.flush(zlib.Z_SYNC_FLUSH))
            self._file.flush()

    def _track(self, pid: int, action: Action, lines: list[str]) -> int:
        """Returns the number of an action's track and names a new track."""
        compute = action.kind in COMPUTE
        receives = action.kind.startswith("R")
        key = (pid, None, False) if compute else (pid, action.device, receives)
        tid = self._tracks.get(key)
        if tid is None:
            # The compute track comes first, then receives and sends of each device.
            tid = 0 if compute else 2 * (action.device + 1) + 1 + (not receives)
            self._tracks[key] = tid
            lines.append(_named("thread_name", pid, tid, _track_name(action)))
        return tid

    def _link(self, row: Timed, pid: int, tid: int, lines: list[str]) -> None:
        """Writes the arrow from a send to its receive, once both are known."""
        arrives = _arrival(row.action)
        key = row.action if arrives is None else arrives
        here = pid, tid, (row.end_s if arrives is None else row.start_s) * 1e6
        other = self._open[0].pop(key, None) or self._open[1].pop(key, None)
        if other is None:
            self._open[1][key] = here
            return
        self._arrows += 1
        ends = (other, here) if arrives is None else (here, other)
        for phase, (one_pid, one_tid, moment) in zip(('s"', 'f","bp":"e"'), ends, strict=True):
            lines.append(
                f'{{"name":"transfer","cat":"transfer","id":{self._arrows},"ph":"{phase},'
                f'"pid":{one_pid},"tid":{one_tid},"ts":{moment:.3f}}}'
            )


def read_rounds(path: Path) -> Iterator[Trace]:
    """Yields the rounds of a file one by one, each as a trace.

    Actions after the last round of a complete file come last, as a trace without a round. In a
    truncated file, everything after the last complete round is skipped.

    Args:
      path: File written by ``TraceWriter``.

    Raises:
      RunError: The file is missing or not a trace.
    """
    names: dict[int, str] = {}
    meta: JsonObject = {}
    part = Trace()
    first, ended, whole = True, False, 0
    try:
        for line in _lines(path):
            if first:
                first = False
                meta = json.loads(line + "]}")["otherData"]["meta"]
                part = Trace(meta=meta)
            elif line == "]}":
                ended = True
            elif _take(json.loads(line.removeprefix(",")), names, part):
                whole += 1
                yield part
                part = Trace({host: [] for host in names.values()}, meta=meta)
    except (OSError, zlib.error, ValueError, KeyError, TypeError, PlanError) as error:
        raise RunError(f"{path} is not a trace of pipar_jax: {describe_reading(error)}") from error
    if first:
        raise RunError(f"{path} is not a trace of pipar_jax: it is empty")
    if ended and any(part.hosts.values()):
        yield part
    elif not whole:
        yield Trace(meta=meta)


def _take(event: JsonObject, names: dict[int, str], part: Trace) -> bool:
    """Adds an event of a file to a trace; returns whether it ends a round."""
    if event["ph"] == "M":
        if event["name"] == "process_name" and event["pid"] != _ROUNDS_PID:
            names[event["pid"]] = event["args"]["name"]
            part.hosts[event["args"]["name"]] = []
    elif event["ph"] == "X" and event["cat"] == ROUND:
        part.rounds.append(Interval(*event["args"]))
        return True
    elif event["ph"] == "X":
        start, args = event["ts"] / 1e6, event["args"]
        part.hosts[names[event["pid"]]].append(
            Timed(_action(event["cat"], args), start, start + event["dur"] / 1e6,
                  args["bytes"], args["samples"])
        )  # fmt: skip
    return False


def _action(kind: str, args: Mapping[str, int]) -> Action:
    """Returns the action of a slice."""
    if kind not in KINDS:
        raise PlanError(f"{kind!r} is not a kind of action")
    return Action(
        args["stage"], ActionKind(kind), args["device"], args["step"], args["micro_batch"]
    )


def _lines(path: Path) -> Iterator[str]:
    """Yields the complete lines of a gzipped file."""
    unpack = zlib.decompressobj(wbits=31)
    torn = b""
    with path.open("rb") as file:
        while not unpack.eof and (some := file.read(1 << 16)):
            *lines, torn = (torn + unpack.decompress(some)).split(b"\n")
            for line in lines:
                yield line.decode()


def _named(what: str, pid: int, tid: int, name: str) -> str:
    """Returns an event that names a process or a track."""
    return dumps({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}})


def _arrival(action: Action) -> Action | None:
    """Returns the receive of a send, or None for other actions."""
    if action.kind == SEND_FORWARD:
        return action._replace(kind=RECEIVE_FORWARD, stage=action.stage + 1)
    if action.kind == SEND_BACKWARD:
        return action._replace(kind=RECEIVE_BACKWARD, stage=action.stage - 1)
    return None


def _track_name(action: Action) -> str:
    """Returns the name of an action's track."""
    if action.kind in COMPUTE:
        return COMPUTE_TRACK
    return f"{'receive' if action.kind.startswith('R') else 'send'} d{action.device}"
