"""The simulator's error against real runs, over networks, links, N and numbers of devices.

Each setting trains PiPar in processes: the server on one core, the devices on another; four devices
have a slowdown of ten, so that two cores suffice. The prediction uses stage times measured
separately on those cores, before and after the settings of a network behind a link (for a slowed
device, those that it measured itself at its start and that its emulation multiplies), the sizes of
tensors, and the rates of links. ResNets have the papers' 7x7 stem. Data are random images, since
times do not depend on what is learned. With --results=FOLDER measurements are saved and not
repeated.

python -m experiments.validate_simulator --only=resnet101 --results=FOLDER
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from comms.emulation.shaping import parse_link
from experiments.benchmarks import harness, simulator_settings
from experiments.benchmarks.simulator_settings import Setting
from pipar_jax.disk.files import make_folder
from pipar_jax.launch import launcher, plain_flags
from pipar_jax.report import RecordedRun, read_run
from pipar_jax.schedule.actions import COMPUTE, Span
from pipar_jax.schedule.plan import COORDINATOR, DevicePlan, Plan
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.simulator import Costs, LinkModel, simulate

ONLY = flags.DEFINE_string(
    "only", "",
    "Measure only settings whose name contains this, and not the simulator itself.",
)  # fmt: skip
RESULTS = plain_flags.define_folder(
    "results", "Folder in which measurements are saved and reused; empty: none."
)
#: The kinds of predictions, as ``simulator_settings.predict`` returns them.
KINDS = ("alone", "in run")


def judge(
    run: harness.Bench, name: str, figures: dict[str, Any], errors: dict[str, list[float]]
) -> None:
    """Adds the rows of a setting, and its errors to the lists by kind of prediction."""
    rows = figures["seconds"]
    real_s = statistics.median(rows)
    spread = (max(rows) - min(rows)) / real_s
    run.row(f"{name}: round", real_s, "s", spread=spread)
    for kind in errors:
        signed = (figures[kind] / real_s - 1.0) * 100
        errors[kind].append(abs(signed))
        run.row(f"{name}: error {kind}", signed, "%")


def demand(run: RecordedRun) -> float:
    """Returns the sum of the shares of a core in which the devices compute."""
    assert run.trace is not None
    last = run.trace.rounds[-1]
    busy = sum(run.trace.busy_s(host, last) for host in run.devices) / last.seconds
    slowed = len(run.devices) > 1
    return busy / (simulator_settings.SLOWDOWN if slowed else 1.0)


def measure_speed(run: harness.Bench) -> None:
    """Measures the simulator itself: 1,000 devices, 10 steps of 8 micro-batches."""
    count = 100 if run.quick else 1000
    plan = Plan((DevicePlan((1,), ("device", COORDINATOR), 8),) * count)
    up, down = (LinkModel.of(shape) for shape in parse_link("wifi"))
    links = {(f"d{i}", COORDINATOR): up for i in range(count)}
    links |= {(COORDINATOR, f"d{i}"): down for i in range(count)}
    costs = Costs(
        lambda device, stage, kind, samples: 0.001 if kind in COMPUTE else 0.0,
        lambda device, stage, kind, samples: 1e4, links,
    )  # fmt: skip
    whole = RoundSchedule(plan, tuple(Span(d, 0, 10) for d in range(count)), (800,) * count, 80)
    # Processor time of one thread: the time on an otherwise idle machine.
    began_s = time.thread_time()
    found = simulate(whole, costs, collect=False)
    elapsed_s = time.thread_time() - began_s
    run.row(f"simulator: {count} devices x 10 steps x 8", elapsed_s, "s", 10.0)
    run.row("simulator: actions per second", found.actions / elapsed_s, "1/s", 1e5, "higher")


def train(group: Sequence[Setting], folder: Path) -> dict[str, dict[str, Any]]:
    """Trains and predicts settings that differ in N only; returns their figures by name.

    Figures are the seconds of rounds, each prediction in seconds, and the demand of the devices.

    Args:
      group: The settings.
      folder: Folder of runs and data.
    """
    simulator_settings.write_data(folder, group[0].network.batch)
    times = [simulator_settings.time_network(group, folder)]
    runs = [read_run(Path(launcher.launch(setting.config(folder))["folder"])) for setting in group]
    times.append(simulator_settings.time_network(group, folder))
    # Before and after, in case the machine's speed changes.
    alone = {
        host: {key: (s + times[1][host][key]) / 2 for key, s in known.items()}
        for host, known in times[0].items()
    }
    figures = {}
    for setting, run in zip(group, runs, strict=True):
        predicted = zip(KINDS, simulator_settings.predict(setting, run, alone), strict=True)
        seconds = [row["seconds"] for row in run.of("round_finished")[1:]]
        figures[setting.name] = {**dict(predicted), "seconds": seconds, "demand": demand(run)}
    return figures


def measure(run: harness.Bench) -> None:
    """Runs every setting and predicts it; with ``--quick`` one setting.

    Raises:
      ConfigError: No setting has the name that is asked for.
      RunError: A run fails.
    """
    settings = simulator_settings.settings(run.quick)
    settings = harness.chosen(settings, ONLY.value, lambda setting: setting.name)
    wanted = simulator_settings.grouped(settings)
    if not ONLY.value:
        measure_speed(run)
    most, errors = 0.0, {kind: list[float]() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        results = make_folder(RESULTS.value or folder, "choose another folder with --results")
        for done, (name, group) in enumerate(wanted.items()):
            run.progress(name, done, len(wanted))
            known = harness.kept(results, name, functools.partial(train, group, Path(folder)))
            for setting, figures in known.items():
                most = max(most, figures["demand"])
                judge(run, setting, figures, errors)
    for kind, sizes in errors.items():
        if sizes:
            run.row(f"mean error of {len(sizes)} {kind}", statistics.fmean(sizes), "%", 3.0)
            run.row(f"worst error {kind}", max(sizes), "%", 8.0)
    run.note(
        "alone: from separately measured stage times. in run: from the median times of the run "
        "itself, which isolates the simulator's part of the error."
    )
    run.note(f"Devices computed at most {most:.0%} of their core, all together.")


if __name__ == "__main__":
    harness.run(measure)
