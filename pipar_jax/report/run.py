"""A run as read from its folder: configuration, events and trace."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

from comms.emulation.shaping import parse_link
from pipar_jax.config.membership_script import FILE as SCRIPT
from pipar_jax.config.membership_script import Attempt, read_attempts
from pipar_jax.cost_model.costs import FREE_LINK
from pipar_jax.cost_model.from_trace import links_from_shapes
from pipar_jax.disk.event_log import read_events
from pipar_jax.disk.files import describe_reading
from pipar_jax.disk.json_text import JsonMapping
from pipar_jax.errors import RunError
from pipar_jax.methods.registry import title
from pipar_jax.report.digest import Digest, digest
from pipar_jax.report.scores import UNKNOWN
from pipar_jax.schedule.plan import COORDINATOR, Plan, device_name, host_index
from pipar_jax.schedule.rounds import RoundSchedule, rounds
from pipar_jax.schedule.trace import Trace
from pipar_jax.simulator import LinkModel, Prediction, simulate

#: Maximum number of devices that are drawn.
MOST_DEVICES = 8
_DEVICE = re.compile(r"d\d+")
#: Figures of a link that are states, not sums over rounds.
_GAUGES = ("queued_peak_bytes", "reconnects", "rtt_s", "rate_mbps")


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A run with a folder.

    Attributes:
      name: Name of the folder.
      config: The resolved configuration, decoded from JSON.
      events: Rows of metrics.jsonl, in order.
      trace_path: The file with timed actions; None if the run has no trace.
      attempts: The attempts at its rounds, in order: who took part and who was out.
    """

    name: str
    config: JsonMapping
    events: tuple[JsonMapping, ...]
    trace_path: Path | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def title(self) -> str:
        """The name of the method as it is written in the literature."""
        return title(str(self.config.get("method", self.name)))

    @property
    def finished(self) -> bool:
        """Whether the run finished."""
        return bool(self.of("run_finished"))

    @property
    def task(self) -> JsonMapping:
        """What the run's task measures, as the event ``run_started`` says."""
        task: JsonMapping = self.last("run_started").get("task", UNKNOWN)
        return task

    def of(self, event: str) -> list[JsonMapping]:
        """Returns the rows of one kind of event."""
        return [row for row in self.events if row["event"] == event]

    def last(self, event: str) -> JsonMapping:
        """Returns the last row of one kind of event, or an empty one."""
        return (self.of(event) or [{}])[-1]

    @functools.cached_property
    def trace(self) -> Trace | None:
        """All timed actions, which may be many; None if the run has no trace."""
        return None if self.trace_path is None else Trace.load(self.trace_path)

    @functools.cached_property
    def digest(self) -> Digest:
        """Sums over the timed actions; empty if the run has no trace."""
        return Digest() if self.trace_path is None else digest(self.trace_path)

    @functools.cached_property
    def plan(self) -> Plan | None:
        """The plan that the run executed, if it has a trace."""
        if "plan" not in self.digest.meta:
            return None
        return Plan.from_dict(self.digest.meta["plan"])

    @property
    def plan_text(self) -> str:
        """The plan's chain in one short line."""
        chain, _, rest = str(self.last("run_started").get("plan", "")).partition(";")
        chain = re.sub(r"^\d+ of ", "", chain)
        return chain + (", in turn" if "sequential" in rest else "")

    @property
    def epoch_s(self) -> float:
        """Median seconds of an epoch; the mean so far if the run did not finish."""
        summary = self.last("run_finished")
        if summary:
            return float(summary["epoch_seconds"])
        done = self.of("round_finished")
        return sum(row["seconds"] for row in done) / max(done[-1]["epoch"], 1) if done else 0.0

    @functools.cached_property
    def elapsed(self) -> dict[int, float]:
        """Training seconds until the end of each round, without evaluation."""
        done = self.of("round_finished")
        sums = itertools.accumulate(row["seconds"] for row in done)
        return {row["round"]: total for row, total in zip(done, sums, strict=True)}

    def idle_share(self, host: str) -> float | None:
        """Returns the share of all rounds in which a host computed nothing."""
        rows = self.of("round_finished")
        total = sum(row["seconds"] for row in rows)
        if not rows or host not in rows[0]["busy"]:
            return None
        return 1.0 - float(sum(row["busy"].get(host, 0.0) for row in rows)) / float(total)

    @property
    def devices(self) -> list[str]:
        """Names of the devices in the last round."""
        busy = self.last("round_finished").get("busy", {})
        return sorted((h for h in busy if _DEVICE.fullmatch(h)), key=host_index)

    @property
    def causes(self) -> dict[str, dict[str, float]]:
        """Idle seconds of all traced rounds by host and cause; empty without a trace."""
        return self.digest.causes

    @functools.cached_property
    def carried(self) -> dict[tuple[str, str], dict[str, float]]:
        """Bytes of activations and cotangents by direction of a link; empty without a trace.

        If only some rounds are traced, the result is scaled to all rounds.
        """
        links: dict[tuple[str, str], dict[str, float]] = {}
        if self.plan is None or not self.digest.rounds:
            return links
        share = len(self.of("round_finished")) / self.digest.rounds
        for (host, device, stage), nbytes in self.digest.carried.items():
            ends = host, self.plan.host(device, stage)
            sums = links.setdefault(ends, {"activations": 0.0, "cotangents": 0.0})
            for kind, value in nbytes.items():
                sums[kind] += value * share
        return links

    @functools.cached_property
    def traffic(self) -> dict[tuple[str, str], dict[str, float]]:
        """Traffic and waiting times of each direction of a link in all rounds.

        The names are those of ``pipar_jax.roles.link_stats``; figures that are not sums are those
        of the last round, and missing if they were never measured.
        """
        links: dict[tuple[str, str], dict[str, float]] = {}
        for event in self.of("round_finished"):
            for row in event.get("links", ()):
                sums = links.setdefault((row["source"], row["target"]), {})
                for key, value in row.items():
                    if key in _GAUGES and value is not None:
                        sums[key] = value
                    elif key not in (*_GAUGES, "source", "target"):
                        sums[key] = sums.get(key, 0.0) + value
        return links

    @functools.cached_property
    def weight_bytes(self) -> float:
        """Mean size of a message with a device's weights: all bytes but activations and cotangents.

        Labels and small messages are included.
        """
        done = self.of("round_finished")
        rest = sum(row["bytes_up"] for row in done)
        rest -= sum(
            sum(sums.values()) for ends, sums in self.carried.items() if ends[1] == COORDINATOR
        )
        return max(float(rest), 0.0) / max(len(done) * len(self.devices), 1)

    def predict(self) -> Prediction | None:
        """Predicts a full round from the median times and bytes of the run's own trace.

        Returns:
          The prediction; None if the run left no trace or no full round.

        Raises:
          PlanError: The trace does not fit the plan.
        """
        schedule = self.schedule()
        if schedule is None:
            return None
        costs = self.digest.observed.costs(
            self.links,
            dict.fromkeys(range(len(schedule.plan.devices)), self.weight_bytes),
            float(self.config["pipeline"]["window_mb"]) * 1e6,
        )
        return simulate(schedule, costs)

    @functools.cached_property
    def links(self) -> dict[tuple[str, str], LinkModel]:
        """The emulated link of each direction; empty without a plan."""
        if self.plan is None:
            return {}
        shapes = {}
        for index in range(len(self.plan.devices)):
            up, down = parse_link(self._device(index, "link"))
            shapes[index] = LinkModel.of(up), LinkModel.of(down)
        return links_from_shapes(shapes, self.plan)

    def link_of(self, ends: tuple[str, str]) -> LinkModel:
        """Returns the emulated link of one direction."""
        return self.links.get(ends, FREE_LINK)

    def schedule(self) -> RoundSchedule | None:
        """Returns the schedule of the first round, if known; only the last round may differ."""
        started, joined = self.last("run_started"), self.of("device_joined")
        if self.plan is None or not started or len(joined) != len(self.plan.devices):
            return None
        samples = tuple(row["samples"] for row in sorted(joined, key=lambda row: row["device"]))
        epochs = int(self.config["epochs"])
        steps = [total // epochs for total in started["steps"]]
        spans = rounds(self.plan, steps, epochs)[0]
        return RoundSchedule(self.plan, spans, samples, int(self.config["data"]["batch_size"]))

    def samples_per_epoch(self) -> int:
        """Returns the samples that all devices train on in an epoch."""
        return sum(row["samples"] for row in self.of("device_joined"))

    def _device(self, index: int, field: str) -> Any:
        """Returns a field of one device's configuration."""
        devices = self.config["devices"]
        overrides = devices.get("overrides", {})
        own = overrides.get(str(index), overrides.get(index, {}))
        return own.get(field, devices["defaults"][field])


def read_run(folder: Path) -> RecordedRun:
    """Reads a run's folder.

    Raises:
      RunError: The folder is missing, or a file in it is missing or cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        events = read_events(folder / "metrics.jsonl")
        script = folder / SCRIPT
        attempts = read_attempts(script) if script.exists() else ()
    except (OSError, ValueError, RunError) as error:
        raise RunError(
            f"{folder} is not the folder of a run: {describe_reading(error)}; name a "
            "folder below runs/ with config.json and metrics.jsonl in it"
        ) from error
    trace = folder / "trace.json.gz"
    return RecordedRun(folder.name, config, events, trace if trace.exists() else None, attempts)


def hosts_of(run: RecordedRun) -> list[str]:
    """Returns the hosts of a run in the order in which they are drawn: the server last."""
    count = len(run.plan.devices) if run.plan else len(run.devices)
    devices = [device_name(index) for index in range(count)]
    others = [host for host in run.digest.hosts if host not in devices]
    nodes = [host for host in others if host != COORDINATOR]
    return [*devices, *nodes, COORDINATOR]


def links_of(run: RecordedRun) -> list[tuple[str, str]]:
    """Returns the directions of links that are shown, those of the first devices, in order."""
    hosts = hosts_of(run)
    shown = [host for host in hosts if not _DEVICE.fullmatch(host)]
    shown += [host for host in hosts if _DEVICE.fullmatch(host)][:MOST_DEVICES]
    ways = [ends for ends in run.traffic if set(ends) <= set(shown)]
    return sorted(ways, key=lambda ends: (hosts.index(ends[0]), hosts.index(ends[1])))
