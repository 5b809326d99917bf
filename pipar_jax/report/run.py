"""A run as read from its folder: configuration, events and trace."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from comms.emulation.shaping import parse_link
from comms.errors import ChannelError
from pipar_jax.config.membership_script import FILE as SCRIPT
from pipar_jax.config.membership_script import Attempt, read_attempts
from pipar_jax.cost_model.costs import FREE_LINK, links_of_plan
from pipar_jax.disk.event_log import read_events
from pipar_jax.disk.files import describe_reading
from pipar_jax.disk.json_text import JsonMapping
from pipar_jax.errors import PlanError, RunError
from pipar_jax.methods.registry import title
from pipar_jax.report.digest import Digest, digest
from pipar_jax.report.scores import UNKNOWN
from pipar_jax.schedule.plan import (
    COORDINATOR,
    Plan,
    device_name,
    host_index,
    is_device,
    is_node,
    long_name,
)
from pipar_jax.schedule.rounds import RoundSchedule, rounds
from pipar_jax.schedule.trace import Trace
from pipar_jax.simulator import LinkModel, Prediction, simulate

#: Maximum number of devices that are drawn.
MOST_DEVICES = 8
#: Fields of a configuration without which there is no report.
_NEEDED = ("method", "model.name", "data.source", "data.batch_size", "devices.count",
           "devices.defaults.link", "nodes.defaults.link", "pipeline.window_mb")  # fmt: skip
#: Figures of a link that are states, not sums over rounds.
_GAUGES = ("reconnects", "rtt_s", "rate_mbps")
#: Figures of a link that are the most of a round.
_PEAKS = ("queued_peak_bytes",)


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A run with a folder.

    Attributes:
      name: Name of the folder.
      config: The resolved configuration, decoded from JSON.
      events: Rows of metrics.jsonl, in order.
      trace_path: The file with timed actions; None if the run has no trace.
      attempts: The attempts at its rounds, in order: who took part and who was out.
      parent: Name of the folder that it lies in.
    """

    name: str
    config: JsonMapping
    events: tuple[JsonMapping, ...]
    trace_path: Path | None = None
    attempts: tuple[Attempt, ...] = ()
    parent: str = ""

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
        """The plan that the run began with, if it has a trace."""
        if "plan" not in self.digest.meta:
            return None
        return Plan.from_dict(self.digest.meta["plan"])

    @property
    def plan_text(self) -> str:
        """The plan's chain in one short line; of a run that changed it the first and the last."""
        changes = self.of("replanned")
        texts = [_chain(str(row.get("plan", ""))) for row in (self.last("run_started"), *changes)]
        between = f", {len(texts) - 2} more" if len(texts) > 2 else ""
        return texts[0] if len(texts) == 1 else f"{texts[0]}{between}, then {texts[-1]}"

    @functools.cached_property
    def keeps_chains(self) -> bool:
        """Whether each stage is on the same host in all of the run's plans."""
        later = [Plan.from_dict(row["to"]) for row in self.of("replanned")]
        return self.plan is None or all(plan.chains == self.plan.chains for plan in later)

    @property
    def epoch_s(self) -> float:
        """Median seconds of an epoch; the mean so far if the run did not finish."""
        summary = self.last("run_finished")
        if summary:
            return float(summary["epoch_seconds"])
        done = self.of("round_finished")
        epochs = max((row["epoch"] for row in done if row["committed"]), default=0.0)
        return float(sum(row["seconds"] for row in done) / epochs) if epochs else 0.0

    @functools.cached_property
    def elapsed(self) -> dict[int, float]:
        """Training seconds until the end of each round: without evaluation, with changes of plan.

        They are what ``run_finished`` counts as the seconds of a run.
        """
        found, total = dict[int, float](), 0.0
        for row in self.events:
            if row["event"] in ("round_finished", "replanned"):
                total += row["seconds"]
            if row["event"] == "round_finished":
                found[row["round"]] = total
        return found

    def idle_share(self, host: str) -> float | None:
        """Returns the share of the rounds in which a host took part that it computed nothing."""
        rows = [row for row in self.of("round_finished") if host in row["busy"]]
        total = sum(row["seconds"] for row in rows)
        return 1.0 - float(sum(row["busy"][host] for row in rows)) / float(total) if total else None

    @property
    def devices(self) -> list[str]:
        """Names of the devices that took part in a round."""
        busy = {host for row in self.of("round_finished") for host in row["busy"]}
        return sorted(filter(is_device, busy), key=host_index)

    @property
    def causes(self) -> dict[str, dict[str, float]]:
        """Idle seconds of all traced rounds by host and cause; empty without a trace.

        A device's are those of its place: who had it may differ from round to round.
        """
        return self.digest.causes

    @functools.cached_property
    def keeps_places(self) -> bool:
        """Whether each device has the place of its own number in all rounds.

        Otherwise what a trace says of a place is of all devices that had it.
        """
        if not self.attempts:
            return not self.config.get("cohort", {}).get("size")
        cohorts = {attempt.cohort for attempt in self.attempts}
        return all(cohort == tuple(range(len(cohort))) for cohort in cohorts)

    @property
    def knows_carriers(self) -> bool:
        """Whether the trace says which links carried its messages."""
        return self.keeps_chains and self.keeps_places

    @functools.cached_property
    def carried(self) -> dict[tuple[str, str], dict[str, float]]:
        """Bytes of activations and cotangents by direction of a link; empty without a trace.

        If only some rounds are traced, the result is scaled to all rounds. It is empty, too, where
        stages moved to other hosts, since a trace does not say under which plan a message was sent,
        and where devices changed places.
        """
        links: dict[tuple[str, str], dict[str, float]] = {}
        if self.plan is None or not self.digest.rounds or not self.knows_carriers:
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

        The names are those of ``pipar_jax.roles.link_stats``; of figures that are no sums the most
        of any round or the last one counts, and they are missing if they were never measured.
        """
        links: dict[tuple[str, str], dict[str, float]] = {}
        for event in self.of("round_finished"):
            for row in event.get("links", ()):
                sums = links.setdefault((row["source"], row["target"]), {})
                for key, value in row.items():
                    if key in _GAUGES and value is not None:
                        sums[key] = value
                    elif key in _PEAKS:
                        sums[key] = max(sums.get(key, 0.0), value)
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
        rest -= sum(sum(sums.values()) for ends, sums in self.carried.items() if is_device(ends[0]))
        messages = sum(int(row["devices"]) for row in done)
        return max(float(rest), 0.0) / max(messages, 1)

    def predict(self) -> Prediction | None:
        """Predicts a full round from the median times and bytes of the run's own trace.

        Returns:
          The prediction; None if the run left no trace or no full round.

        Raises:
          PlanError: The trace does not fit the plan, the plan changed, or an emulated link is not
            known here.
        """
        schedule = self.schedule()
        if schedule is None:
            return None
        if self.of("replanned"):
            raise PlanError("the plan changed in the run, and its times are of several plans")
        costs = self.digest.observed.costs(
            self.links,
            dict.fromkeys(range(len(schedule.plan.devices)), self.weight_bytes),
            float(self.config["pipeline"]["window_mb"]) * 1e6,
        )
        return simulate(schedule, costs)

    @functools.cached_property
    def links(self) -> dict[tuple[str, str], LinkModel]:
        """The emulated link of each direction; empty without a plan.

        Raises:
          PlanError: The file of a recorded link is not there, or not what it was.
        """
        return {} if self.plan is None else links_of_plan(self.plan, self._ends)

    def _ends(self, host: str) -> tuple[LinkModel, LinkModel]:
        """Returns the emulated link of a device or node, away from it and towards it."""
        try:
            up, down = parse_link(self.setting(host, "link"))
        except ChannelError as error:
            raise PlanError(f"the link of {long_name(host)}: {error}") from error
        return LinkModel.of(up), LinkModel.of(down)

    def link_of(self, ends: tuple[str, str]) -> LinkModel:
        """Returns the emulated link of one direction."""
        return self.links.get(ends, FREE_LINK)

    def schedule(self) -> RoundSchedule | None:
        """Returns the schedule of the first round, if known; only the last round may differ."""
        started, joined = self.last("run_started"), self.of("device_joined")
        if self.plan is None or not started or len(joined) != len(self.plan.devices):
            return None
        samples = tuple(row["samples"] for row in sorted(joined, key=lambda row: row["device"]))
        steps = [round(total / started["epochs"]) for total in started["steps"]]
        spans = rounds(self.plan, steps, math.ceil(started["epochs"]))[0]
        return RoundSchedule(self.plan, spans, samples, int(self.config["data"]["batch_size"]))

    def samples_per_epoch(self) -> int:
        """Returns the samples that all devices train on in an epoch."""
        # Of a run that was resumed each device has joined more than once.
        return sum({row["device"]: row["samples"] for row in self.of("device_joined")}.values())

    def setting(self, host: str, field: str) -> Any:
        """Returns a field of one device's or node's configuration; None: there is none."""
        hosts = self.config["nodes" if is_node(host) else "devices"]
        own = hosts.get("overrides", {}).get(str(host_index(host)), {})
        return own.get(field, hosts["defaults"].get(field))


def _chain(plan: str) -> str:
    """Returns the chain of a plan given as text."""
    chain, _, rest = plan.partition(";")
    return re.sub(r"^\d+ of ", "", chain) + (", in turn" if "sequential" in rest else "")


def read_run(folder: Path) -> RecordedRun:
    """Reads a run's folder.

    Raises:
      RunError: The folder is missing, or a file in it is missing or cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_fields(config)
        events = read_events(folder / "metrics.jsonl")
        script = folder / SCRIPT
        attempts = read_attempts(script) if script.exists() else ()
    except (OSError, ValueError, RunError) as error:
        raise RunError(
            f"{folder} is not the folder of a run: {describe_reading(error)}; name a "
            "folder below runs/ with config.json and metrics.jsonl in it"
        ) from error
    trace = folder / "trace.json.gz"
    return RecordedRun(
        folder.name, config, events, trace if trace.exists() else None, attempts,
        folder.absolute().parent.name,
    )  # fmt: skip


def _check_fields(config: Any) -> None:
    """Checks that a configuration has what the report reads of it.

    Raises:
      ValueError: It has not.
    """
    for field in _NEEDED:
        value = config
        for part in field.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"config.json has no field {field}")
            value = value[part]


def hosts_of(run: RecordedRun) -> list[str]:
    """Returns the hosts of a run in the order in which they are drawn: the server last."""
    busy = {host for row in run.of("round_finished") for host in row["busy"]}
    seen = sorted((busy | set(run.digest.hosts)) - {COORDINATOR}, key=host_index)
    devices = list(filter(is_device, seen))
    if run.plan is not None:
        devices = [device_name(index) for index in range(len(run.plan.devices))]
    return [*devices, *filter(is_node, seen), COORDINATOR]


def links_of(run: RecordedRun) -> list[tuple[str, str]]:
    """Returns the directions of links that are shown, those of the first devices, in order."""
    seen = {host for ends in run.traffic for host in ends}
    # All that had traffic: a plan has only as many devices as there are places.
    devices = sorted(filter(is_device, seen), key=host_index)[:MOST_DEVICES]
    hosts = [*devices, *(host for host in hosts_of(run) if not is_device(host))]
    ways = [ends for ends in run.traffic if set(ends) <= set(hosts)]
    return sorted(ways, key=lambda ends: (hosts.index(ends[0]), hosts.index(ends[1])))
