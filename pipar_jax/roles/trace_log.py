"""The growing trace of a run: the wanted rounds are written round by round."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipar_jax.disk.files import replacing
from pipar_jax.disk.json_text import JsonMapping
from pipar_jax.errors import DiskError, RunError
from pipar_jax.schedule.trace import Interval, Timed, TraceWriter, read_rounds

#: Number of rounds that ``run.trace=ends`` keeps at each end.
ENDS = 3


class TraceLog:
    """Writes hosts' reports to a file; the run goes on without it if the disk fails.

    Args:
      path: The file.
      wanted: ``run.trace``: which rounds are kept.
      lost: Receives the error that ended the file, once.
    """

    def __init__(self, path: Path, wanted: str, lost: Callable[[DiskError], None]) -> None:
        self._path, self._wanted, self._lost = path, wanted, lost
        self._file: TraceWriter | None = None
        self._round, self._rounds, self._origin_s = 0, 0, 0.0

    def begin(self, meta: JsonMapping, rounds: int, origin_s: float, first: int = 0) -> None:
        """Begins the file, if any round is wanted.

        Args:
          meta: Description of the run.
          rounds: Number of rounds.
          origin_s: The coordinator's time that is zero in the trace.
          first: The first round; the file has those before it already, if the run is resumed.
        """
        self._rounds, self._origin_s = rounds, origin_s
        if self._wanted == "none":
            self._round = first
            return
        with self._giving_up():
            if not (first and self._path.exists()):
                self._round = first
                self._file = TraceWriter(self._path, meta)
                return
            with replacing(self._path) as aside:
                self._file = TraceWriter(aside, meta, self._path)
                self._copy(first)

    def _copy(self, first: int) -> None:
        """Writes the rounds before the first one again, and lets time go on after them."""
        assert self._file is not None
        parts, ended_s = read_rounds(self._path), 0.0
        while self._round < first:
            if self._kept:
                try:
                    part = next(parts, None)
                except RunError:  # it was cut short, and the rest of it is lost
                    part = None
                if part is None or not part.rounds:
                    self._round = first
                    break
                for host, rows in part.hosts.items():
                    self._file.add(host, rows)
                (interval,) = part.rounds
                self._file.end_round(interval)
                ended_s = interval.end_s
            self._round += 1
        self._origin_s -= ended_s

    def add(self, host: str, rows: Sequence[Timed], offset_s: float) -> None:
        """Adds a host's actions of this round, on the coordinator's clock with the offset."""
        if self._file is None or not self._kept:
            return
        shift_s = offset_s - self._origin_s
        with self._giving_up():
            self._file.add(
                host,
                [
                    row._replace(start_s=row.start_s + shift_s, end_s=row.end_s + shift_s)
                    for row in rows
                ],
            )

    def end_round(self, interval: Interval) -> None:
        """Ends this round, given on the coordinator's clock; writes its actions to disk."""
        if self._file is not None and self._kept:
            with self._giving_up():
                self._file.end_round(Interval(*(moment - self._origin_s for moment in interval)))
        self._round += 1

    def close(self) -> None:
        """Ends the file, however the run ended."""
        if self._file is not None:
            with self._giving_up():
                self._file.close()
            self._file = None

    @property
    def _kept(self) -> bool:
        """Whether this round is wanted; actions after the last round belong to it."""
        near = min(self._round, max(self._rounds - 1 - self._round, 0)) < ENDS
        return self._wanted == "all" or near

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except DiskError as error:
            file, self._file = self._file, None
            if file is not None:
                file.give_up()
            self._lost(error)
