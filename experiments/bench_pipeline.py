"""One device's pipeline: epoch time against the link's limit, the recurrence and the authors' code.

VGG-5 on CIFAR-10, 2,000 samples, batch 100, 50/50 Mbit/s, the server on one core and the device
on another; cut after unit 1 and after unit 2; N = 1, 4, 10, 20. Epochs are timed after a warm-up
epoch, training steps and aggregation, no evaluation. The recurrence is that of the PiPar paper
(arXiv 2302.12803) with each micro-batch's own times, measured alone on a pinned core just before
and just after the run, and the update.

python -m experiments.bench_pipeline --data_dir=FOLDER
"""

import dataclasses
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from configs import cifar10_vgg5
from experiments.benchmarks import harness
from experiments.benchmarks.time_alone import Alone, time_alone
from pipar_jax import data
from pipar_jax.config import Config
from pipar_jax.launch import launcher, plain_flags
from pipar_jax.launch.pinning import first_cores
from pipar_jax.methods.registry import plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule import actions
from pipar_jax.schedule.plan import COORDINATOR, Plan
from pipar_jax.schedule.trace import Trace
from pipar_jax.tuner.recurrence import MicroTimes, measured_step_s

DATA_DIR = plain_flags.define_folder("data_dir", "Folder of public data sets.", exists=True)

SAMPLES, BATCH, RATE_MBPS = 2000, 100, 50.0
#: Seconds of the authors' public code by (cut, N), from docs/benchmarks/peers.md.
AUTHORS_S = {(1, 1): 24.3, (1, 4): 15.4, (1, 10): 14.2, (2, 4): 8.5}
TARGET = 1.05


@dataclasses.dataclass
class Measured:
    """Measurements of one setting.

    Attributes:
      epochs_s: Seconds of each epoch after the warm-up.
      link_s: Seconds of the busier direction of the link for the bytes of an epoch.
      in_run: Seconds of each action in the trace, by (host, kind, samples).
    """

    epochs_s: list[float]
    link_s: float
    in_run: dict[tuple[str, str, int], float]


def setting(cut: int, micro_batches: int, samples: int, folder: str) -> Config:
    """Returns the configuration of one setting."""
    config = cifar10_vgg5.get_config()
    config.name, config.epochs = f"cut{cut}_n{micro_batches}", 4
    config.data.data_dir, config.data.train_samples = DATA_DIR.value, samples
    config.data.test_samples, config.data.augment = BATCH, "none"
    config.pipeline.cut, config.pipeline.micro_batches = cut, micro_batches
    config.devices.count = 1
    config.devices.defaults.link = f"{RATE_MBPS:g}/{RATE_MBPS:g}"
    config.run.dir, config.run.evaluate_every = folder, 0
    cores = first_cores(2)
    if cores:  # this system may not pin
        config.server.cpus, config.devices.defaults.cpus = str(cores[0]), str(cores[-1])
    return resolve(config)


def measure_run(config: Config) -> Measured:
    """Trains in processes and reads the run."""
    rounds: list[dict[str, Any]] = []
    summary = launcher.launch(
        config, on_event=lambda e: rounds.append(e) if e["event"] == "round_finished" else None
    )
    trace = Trace.load(Path(summary["folder"]) / "trace.json.gz")
    start_s = trace.rounds[1].start_s
    durations: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for host, row in trace.rows():
        if row.start_s >= start_s:
            durations[host, row.action.kind, row.samples].append(row.end_s - row.start_s)
    busiest = max(max(e["bytes_up"], e["bytes_down"]) for e in rounds[1:])
    return Measured(
        [e["seconds"] for e in rounds[1:]],
        busiest * 8 / (RATE_MBPS * 1e6),
        {key: statistics.median(values) for key, values in durations.items()},
    )


def predict(sizes: tuple[int, ...], device: Alone, server: Alone, bytes_per_sample: int) -> float:
    """Returns the recurrence's prediction of a step from separately measured times."""
    by_kind = {(kind, n): s for found in (device, server) for (*_, kind, n), s in found.items()}
    updates = [found[key] for found in (device, server) for key in found if key[2] == "U"]
    transfer = [n * bytes_per_sample * 8 / (RATE_MBPS * 1e6) for n in sizes]
    return measured_step_s(
        MicroTimes(
            device_forward_s=[by_kind["F", n] for n in sizes],
            up_s=transfer,
            server_s=[by_kind["L", n] for n in sizes],
            down_s=transfer,
            device_backward_s=[by_kind["B", n] for n in sizes],
            device_update_s=updates[0],
            server_update_s=updates[1],
        )
    )


def predict_in_run(sizes: tuple[int, ...], found: Measured) -> float:
    """Returns the recurrence's prediction of a step from the times of actions in the run."""
    times = found.in_run

    def parts(host: str, kind: str) -> list[float]:
        return [times[host, kind, n] for n in sizes]

    return measured_step_s(
        MicroTimes(
            parts("d0", "F"), parts("d0", "SF"), parts(COORDINATOR, "L"),
            parts(COORDINATOR, "SB"), parts("d0", "B"), times["d0", "U", 0],
            times[COORDINATOR, "U", 0],
        )
    )  # fmt: skip


def alone(config: Config, plan: Plan, host: str, sizes: tuple[int, ...]) -> Alone:
    """Times the functions of a host separately, on its core in the run."""
    core = config.server.cpus if host == COORDINATOR else config.devices.defaults.cpus
    return time_alone(
        config, plan, host, sizes, input_shape=(32, 32, 3), classes=10,
        cores=[int(core)] if core else [],
    )  # fmt: skip


def report(run: harness.Bench, cut: int, micro_batches: int, samples: int, folder: str) -> None:
    """Measures one setting and adds its rows."""
    import stages  # here, so that --help and wrong flags do not load jax

    config = setting(cut, micro_batches, samples, folder)
    model = stages.build("vgg5", input_shape=(32, 32, 3), classes=10, norm=config.model.norm)
    plan = plan_for(config, model.unit_names)
    sizes = actions.micro_batch_sizes(BATCH, micro_batches)
    name = f"cut {cut}, N={micro_batches}"
    # Before and after the run, in case the machine's speed changes.
    before = [alone(config, plan, host, sizes) for host in ("d0", COORDINATOR)]
    found = measure_run(config)
    after = [alone(config, plan, host, sizes) for host in ("d0", COORDINATOR)]
    shape = model.shapes(1)[cut]
    nbytes = shape.size * shape.dtype.itemsize
    device, server = (
        {key: (one[key] + other[key]) / 2 for key in one}
        for one, other in zip(before, after, strict=True)
    )
    steps = samples // BATCH
    predicted = steps * predict(sizes, device, server, nbytes)
    in_run = steps * predict_in_run(sizes, found)
    epoch_s = statistics.median(found.epochs_s)
    target = AUTHORS_S.get((cut, micro_batches)) if samples == SAMPLES else None
    run.row(f"{name}: epoch", epoch_s, "s", target)
    run.row(f"{name}: link floor", found.link_s, "s")
    run.row(f"{name}: recurrence, times alone", predicted, "s")
    run.row(f"{name}: recurrence, times in run", in_run, "s")
    run.row(f"{name}: epoch / recurrence alone", epoch_s / predicted, "x", TARGET)


def measure(run: harness.Bench) -> None:
    """Measures every setting; ``--quick`` has one cut and fewer samples."""
    data.prepare(setting(1, 1, SAMPLES, "runs"))
    cuts, counts, samples = ((2,), (1, 4), 400) if run.quick else ((1, 2), (1, 4, 10, 20), SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        done = 0
        for cut in cuts:
            for micro_batches in counts:
                run.progress(f"cut {cut}, N={micro_batches}", done, len(cuts) * len(counts))
                report(run, cut, micro_batches, samples, folder)
                done += 1
    run.note(
        "epoch: the median of three after a warm-up epoch. Targets: the seconds of the authors' "
        "public code, which alternated with ours in another measurement (docs/benchmarks/peers.md)."
    )


if __name__ == "__main__":
    harness.run(measure)
