"""Folders of runs whose rounds are simulated ones, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

from pipar_jax.config import Config, to_json
from pipar_jax.cost_model.costs import links_of_plan
from pipar_jax.schedule.plan import DevicePlan, Plan, is_device, is_node
from pipar_jax.schedule.rounds import RoundSchedule, rounds
from pipar_jax.schedule.trace import Interval, Trace
from pipar_jax.simulator import Costs, LinkModel, simulate
from stages import make_task

SAMPLES, BATCH = 60, 16


def seconds_of(device: int, stage: int, kind: str, samples: int) -> float:
    return {"F": 0.001, "L": 0.002, "B": 0.002, "U": 0.004, "A": 0.01}[kind] * (samples or 1)


def bytes_of(device: int, stage: int, kind: str, samples: int) -> float:
    return 500.0 * samples if samples else 20_000.0


def link_row(source: str, target: str, nbytes: float) -> dict[str, object]:
    return {"source": source, "target": target, "bytes": nbytes, "raw_bytes": 2 * nbytes,
            "payload_bytes": nbytes, "messages": 10, "frames": 20, "queue_s": 0.5,
            "credit_wait_s": 0.25, "blocked_s": 0.0, "encode_s": 0.0, "repeated_frames": 2,
            "repeated_bytes": 300, "queued_peak_bytes": 7000, "reconnects": 1, "rtt_s": None,
            "rate_mbps": 17.5}  # fmt: skip


def write_run(folder: Path, method: str, plan: Plan, *, finish: bool = True) -> Path:
    """Write the folder of a run whose rounds are simulated ones."""
    folder.mkdir()
    config = Config(name=folder.name, method=method, epochs=3)
    config.data.batch_size = BATCH
    config.devices.count = len(plan.devices)
    config.devices.defaults.link = "20/40"
    config.network.token = "secret-token"
    up, down = LinkModel(20e6 / 8), LinkModel(40e6 / 8)
    count = len(plan.devices)
    between = LinkModel(3e6 / 8), LinkModel(3e6 / 8)
    config.nodes.count = sum(map(is_node, plan.hosts()))
    config.nodes.defaults.link = "3/3"
    (folder / "config.json").write_text(to_json(config))
    links = links_of_plan(plan, lambda host: between if is_node(host) else (up, down))
    events: list[dict[str, object]] = [
        {"event": "device_joined", "device": d, "samples": SAMPLES, "time_s": 0.1}
        for d in range(count)
    ]
    steps = -(-SAMPLES // BATCH)
    events.append({"event": "run_started", "method": method, "plan": str(plan), "devices": count,
                   "rounds": 3, "epochs": 3, "steps": [3 * steps] * count, "model": "mlp",
                   "parameters": 1234, "task": make_task().facts()})  # fmt: skip
    trace = Trace(meta={"method": method, "plan": plan.to_dict()})
    now_s = 0.0
    for index, spans in enumerate(rounds(plan, [steps] * count, 3)):
        found = simulate(
            RoundSchedule(plan, spans, (SAMPLES,) * count, BATCH),
            Costs(seconds_of, bytes_of, links),
        )
        for host, rows in found.trace.hosts.items():
            trace.add(host, rows, now_s)
        trace.rounds.append(Interval(now_s, now_s + found.seconds))
        now_s += found.seconds
        carried = found.carried_bytes
        events.append({
            "event": "round_finished", "round": index, "rounds": 3, "epoch": index + 1.0,
            "seconds": found.seconds, "loss": 2.0 / (index + 1), "metrics": {},
            "samples": SAMPLES * count, "devices": count, "committed": count, "busy": found.busy_s,
            "idle": {host: found.idle_share(host) for host in found.busy_s},
            "bytes_up": sum(n for (of, _), n in carried.items() if is_device(of)),
            "bytes_down": sum(n for (_, to), n in carried.items() if is_device(to)),
            "links": [link_row(source, target, n) for (source, target), n in carried.items()],
        })  # fmt: skip
        events.append({"event": "evaluated", "round": index, "epoch": index + 1.0,
                       "metrics": {"accuracy": 0.6 + index / 10}, "loss": 1.0,
                       "seconds": 0.1})  # fmt: skip
    if finish:
        events.append({"event": "run_finished", "seconds": now_s, "epoch_seconds": now_s / 3,
                       "metrics": {"accuracy": 0.8}, "loss": 1.0, "idle": {},
                       "bytes_up": 1, "bytes_down": 1,
                       "folder": str(folder)})  # fmt: skip
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(lines)
    trace.save(folder / "trace.json.gz")
    return folder


PIPAR = Plan((DevicePlan((1,), ("device", "server"), 4),) * 2)
FL = Plan((DevicePlan((), ("device",)),) * 2)
CHAIN = Plan(
    (DevicePlan((1, 2, 3), ("device", "n1", "n2", "device"), 2),) * 2, weights="shared", in_flight=2
)
SL = Plan((DevicePlan((1,), ("device", "server"), 1),) * 2, order="sequential", weights="shared")
