"""What a run's rounds come to: events, metrics, idle shares, bytes and the trace."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipar_jax.config import Config
from pipar_jax.config.membership_script import Attempt
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.json_text import JsonMapping, JsonObject
from pipar_jax.errors import DiskError
from pipar_jax.protocol.values import LinkRow, Memory, Waits
from pipar_jax.roles.evaluation import Score
from pipar_jax.roles.federated_evaluation import LocalScores
from pipar_jax.roles.link_stats import Traffic
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.node_copies import Salvaged
from pipar_jax.roles.run_folder import TRACE, Record, RunFolder
from pipar_jax.roles.timetable import Timetable
from pipar_jax.roles.trace_log import TraceLog
from pipar_jax.runtime.metrics import Totals
from pipar_jax.schedule.plan import Plan, is_device
from pipar_jax.schedule.trace import Interval, Timed
from pipar_jax.tuner.replanning import Offer
from stages.tasks.task import Task


class FetchStats(NamedTuple):
    """What the parts of a model that live on compute nodes took to be fetched for evaluation.

    Attributes:
      nbytes: Bytes on the wire.
      seconds: From the question to the last answer.
    """

    nbytes: int
    seconds: float


class Round(NamedTuple):
    """What a round came to.

    Attributes:
      number: Which.
      interval: From the release to the last weights stored.
      totals: Sums of loss and metrics over its samples.
      busy: For each host the seconds it computed.
      overruns: Computations that lasted longer than the slowness emulated for their host.
      told: For each device what its sending waited for.
      traced: For each device the bytes of the trace that it sent after the round.
      direct: What neighbours sent each other, rows of ``traffic.DirectTraffic``.
      memory: For each host what it held at most.
      taking: How many devices began it.
      committed: How many of them count; 0 if it was undone.
      private: What a private run has come to: see ``PrivateRounds.figures``.
    """

    number: int
    interval: Interval
    totals: Totals
    busy: Mapping[str, float]
    overruns: int
    told: Mapping[str, Waits]
    traced: Mapping[str, int]
    direct: Sequence[LinkRow]
    memory: Mapping[str, Memory]
    taking: int
    committed: int
    private: JsonMapping


class RunLog:
    """Turns what hosts report into events, rows of metrics.jsonl and the run's summary.

    Args:
      config: Resolved configuration.
      members: Whose links count.
      folder: Where the trace goes.
      record: Learns of it if the trace cannot be kept.
      tell: Takes events.
      parameters: How many parameters the model has.
      task: What the model is trained for.
      rows: The events so far of a run that is resumed.
    """

    def __init__(
        self,
        config: Config,
        members: Membership,
        folder: RunFolder,
        record: Record,
        tell: OnEvent,
        parameters: int,
        task: Task,
        rows: Sequence[JsonMapping] = (),
    ) -> None:
        self._config, self._folder, self._tell = config, folder, tell
        self._record = record
        self._parameters, self._task = parameters, task
        self._traffic = Traffic(members)
        self._members, self._population = members, members.population
        self._trace = TraceLog(folder.path / TRACE, config.run.trace, self._lose_trace)
        self._table: Timetable | None = None
        self._undone = self._copied_bytes = 0
        self._losses: list[JsonObject] = []
        self._totals = (0, 0)
        self._seconds: dict[int, float] = collections.defaultdict(float)
        self._moved_s: dict[int, float] = {}
        self._busy: dict[str, float] = {}
        self._there_s: dict[str, float] = {}  # of the rounds that a host took part in
        self._score: JsonObject = {}
        self._undefined: set[str] | None = None  # metrics that no evaluation has given a value
        self._origin_s = time.monotonic()
        for row in rows:
            self._add_past(row)

    def _add_past(self, row: JsonMapping) -> None:
        """Counts what was told of a run before it was resumed."""
        if row["event"] == "round_finished":
            up, down = self._totals
            self._totals = (up + row["bytes_up"], down + row["bytes_down"])
            self._seconds[row["round"]] += row["seconds"]
            self._add_busy(row["busy"], row["seconds"])
        elif row["event"] == "replanned":
            self._moved_s[row["round"]] = row["seconds"]
        elif row["event"] == "evaluated":
            self._score = {"loss": row["loss"], "metrics": row["metrics"]}

    def _add_busy(self, busy: Mapping[str, float], seconds: float) -> None:
        """Counts what the hosts of a round computed, and how long it lasted for them."""
        for host, computed_s in busy.items():
            self._busy[host] = self._busy.get(host, 0.0) + computed_s
            self._there_s[host] = self._there_s.get(host, 0.0) + seconds

    def prepared(
        self, compile_s: float, calibration_s: float, memory_bytes: Mapping[str, int]
    ) -> None:
        """Tells how long compiling and timing alone took; neither is part of any round.

        Args:
          compile_s: Seconds until all hosts had compiled.
          calibration_s: Seconds for which slow hosts timed themselves.
          memory_bytes: For each host what it is predicted to hold at most.
        """
        self._tell(
            {
                "event": "prepared",
                "compile_s": compile_s,
                "calibration_s": calibration_s,
                "memory_bytes": dict(memory_bytes),
            }
        )

    def begin(self, plan: Plan, table: Timetable, steps: Sequence[int], first: int = 0) -> None:
        """Tells that training begins.

        Args:
          plan: The plan in force.
          table: The rounds.
          steps: Steps in each place, if its device takes part in all of them.
          first: The first round that is trained; not 0 if the run is resumed.
        """
        self._table, rounds = table, table.rounds
        self._origin_s = time.monotonic()
        meta = {"method": self._config.method, "plan": plan.to_dict()}
        self._trace.begin(meta, rounds, self._origin_s, first)
        self._folder.save_plan(plan.to_dict())
        self._tell(
            {
                "event": "run_started",
                "method": self._config.method,
                "plan": str(plan),
                "devices": len(plan.devices),
                "rounds": rounds,
                "resumed": first,
                "epochs": table.epochs(rounds),
                "steps": list(steps),
                "model": self._config.model.name,
                "parameters": self._parameters,
                "task": self._task.facts(),
                "folder": str(self._folder.path),
            }
        )

    def add_attempt(self, attempt: Attempt) -> None:
        """Adds an attempt at a round to the script that another run can replay."""
        self._losses += [
            {"device": attempt.cohort[out.place], "round": attempt.round, "step": out.step,
             "why": out.why}
            for out in attempt.out
            if out.why != "undone"
        ]  # fmt: skip
        self._undone += not attempt.commit
        try:
            self._folder.add_attempt(attempt.to_dict())
        except DiskError as error:
            self._lose_trace(error)

    def start_round(self) -> None:
        """Records the links' counters before a round; from now on older weights are stale."""
        self._folder.put_weights_away()
        self._traffic.start()

    def add_trace(self, host: str, rows: Sequence[Timed], offset_s: float) -> None:
        """Adds a host's timed actions, on the coordinator's clock once the offset is added."""
        self._trace.add(host, rows, offset_s)

    def end_round(self, one: Round) -> None:
        """Reports a completed round."""
        rows = (*self._traffic.rows(one.told, one.traced), *one.direct)
        links = [dataclasses.asdict(row) for row in rows]
        up = sum(row["bytes"] for row in links if is_device(row["source"]))
        down = sum(row["bytes"] for row in links if is_device(row["target"]))
        self._totals = (self._totals[0] + up, self._totals[1] + down)
        self._seconds[one.number] += one.interval.seconds  # a round may take several attempts
        self._add_busy(one.busy, one.interval.seconds)
        self._trace.end_round(one.interval)
        self._tell(
            {
                "event": "round_finished",
                "round": one.number,
                "rounds": self._timetable.rounds,
                "epoch": self._epoch(one.number),
                "seconds": one.interval.seconds,
                # Private devices keep the figures of their samples.
                "loss": one.totals.loss / one.totals.samples if one.totals.samples else None,
                "metrics": self._task.finish(one.totals.metrics) if one.totals.samples else {},
                "samples": one.totals.samples,
                "devices": one.taking,
                "committed": one.committed,
                "busy": dict(one.busy),
                "idle": {host: 1.0 - s / one.interval.seconds for host, s in one.busy.items()},
                "bytes_up": up,
                "bytes_down": down,
                "overruns": one.overruns,
                "links": links,
                "memory": {host: dataclasses.asdict(used) for host, used in one.memory.items()},
                **one.private,
            }
        )

    def replanned(
        self, index: int, plan: Plan, seconds: float, offers: tuple[Offer, Offer] | None
    ) -> None:
        """Tells of a change of plan.

        Args:
          index: The first round under the new plan.
          plan: The new plan.
          seconds: How long all hosts waited for it; they count as seconds of the run.
          offers: What the old and the new plan were predicted to take.
        """
        self._moved_s[index] = seconds
        predicted = {}
        if offers is not None:
            predicted = {"from_epoch_s": offers[0].epoch_s, "to_epoch_s": offers[1].epoch_s}
        self._tell(
            {"event": "replanned", "round": index, "plan": str(plan), "to": plan.to_dict(),
             "seconds": seconds, **predicted}
        )  # fmt: skip

    def nodes_copied(self, index: int, fetched: FetchStats) -> None:
        """Reports that what compute nodes alone have was copied after a round."""
        self._copied_bytes += fetched.nbytes
        self._tell({"event": "nodes_copied", "round": index, "bytes": fetched.nbytes,
                    "seconds": fetched.seconds})  # fmt: skip

    def nodes_replaced(self, index: int, lost: Sequence[str], salvaged: Sequence[Salvaged]) -> None:
        """Reports which units of lost compute nodes go on with which state.

        Args:
          index: The first round, or rest of one, without the nodes.
          lost: The nodes.
          salvaged: What is left of their units.
        """
        units = [one._asdict() for one in salvaged]
        self._tell({"event": "nodes_replaced", "round": index, "nodes": list(lost), "units": units})

    def evaluated(
        self,
        index: int,
        score: Score,
        seconds: float,
        fetched: FetchStats,
        local: LocalScores | None = None,
    ) -> None:
        """Reports an evaluation of the global weights after a round.

        Args:
          index: The round.
          score: The score that counts.
          seconds: How long it took.
          fetched: What was fetched for it.
          local: The devices' scores on their own test data, if they were asked.
        """
        of_devices: JsonObject = {}
        if local is not None:
            of_devices["devices"] = {
                str(device): {"samples": local.samples[device], "loss": one.loss,
                              "metrics": one.metrics}
                for device, one in local.by_device.items()
            }  # fmt: skip
            overall = local.overall
            of_devices["on_devices"] = {"loss": overall.loss, "metrics": overall.metrics}
        self._score = {"loss": score.loss, "metrics": score.metrics}
        undefined = {name for name, value in score.metrics.items() if math.isnan(value)}
        self._undefined = undefined & (undefined if self._undefined is None else self._undefined)
        self._tell(
            {
                "event": "evaluated",
                "round": index,
                "epoch": self._epoch(index),
                **self._score,
                **({"tables": score.tables} if score.tables else {}),
                **of_devices,
                "seconds": seconds,
                "fetched_bytes": fetched.nbytes,
                "fetch_s": fetched.seconds,
            }
        )

    def finish(self) -> JsonObject:
        """Ends the trace, tells that the run is over, and returns that event."""
        self._trace.close()
        if self._undefined:
            self._tell({"event": "metrics_undefined", "names": sorted(self._undefined)})
        epochs: dict[int, tuple[float, float]] = {}  # seconds, and the share of an epoch they took
        for index, seconds in self._seconds.items():
            began, ended = self._timetable.epochs(index), self._epoch(index)
            spent_s, share = epochs.get(int(began), (0.0, 0.0))
            spent_s += seconds + self._moved_s.get(index, 0.0)
            epochs[int(began)] = spent_s, share + ended - began
        whole = sum(self._seconds.values()) + sum(self._moved_s.values())
        summary = {
            "event": "run_finished",
            "seconds": whole,
            "epoch_seconds": statistics.median(s / share for s, share in epochs.values()),
            **self._score,
            "task": self._task.facts(),
            "idle": {host: 1.0 - s / self._there_s[host] for host, s in self._busy.items()},
            "bytes_up": self._totals[0],
            "bytes_down": self._totals[1],
            "losses": self._losses,
            "undone": self._undone,
            "lost_hosts": list(self._members.lost_hosts),
            "copied_bytes": self._copied_bytes,
            "returns": [one.index for one in self._population for _ in range(one.returns)],
            "folder": str(self._folder.path),
        }
        self._tell(summary)
        return summary

    def close(self) -> None:
        """Ends the trace, however the run ended."""
        self._trace.close()

    def _lose_trace(self, error: DiskError) -> None:
        """Reports that the trace ends here."""
        if (told := self._record.note(error)) is not None:
            self._tell(told)

    @property
    def _timetable(self) -> Timetable:
        """The rounds, once training has begun."""
        assert self._table is not None
        return self._table

    def _epoch(self, index: int) -> float:
        """Returns how many epochs are over after a round."""
        return self._timetable.epochs(index + 1)
