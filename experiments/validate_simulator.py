"""The simulator's error against real runs, over networks, links, N and numbers of devices.

Each setting trains PiPar in processes: the server on one core, the devices on another; four devices
have a slowdown of ten, so that two cores suffice. The prediction uses stage times measured
separately on those cores, before and after the settings of a network (for a slowed device, those
that it measured itself at its start and that its emulation multiplies), the sizes of tensors, and
the rates of links. Data are random images, since times do not depend on what is learned.
"""

import statistics
import tempfile
import time
from pathlib import Path

from absl import flags

from comms.emulation.shaping import parse_link
from experiments.benchmarks import harness, simulator_settings
from experiments.benchmarks.simulator_settings import Setting
from experiments.benchmarks.time_alone import Alone
from pipar_jax.launch import launcher
from pipar_jax.report import RecordedRun, read_run
from pipar_jax.schedule.actions import COMPUTE, Span
from pipar_jax.schedule.plan import COORDINATOR, DevicePlan, Plan
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.simulator import Costs, LinkModel, simulate

ONLY = flags.DEFINE_string("only", "", "Measure only settings whose name contains this.")


def judge(
    run: harness.Bench,
    setting: Setting,
    one: RecordedRun,
    alone: dict[str, Alone],
    errors: dict[str, list[float]],
) -> None:
    """Adds the rows of a setting, and its errors to the lists by kind of prediction."""
    rows = [row["seconds"] for row in one.of("round_finished")[1:]]
    real_s = statistics.median(rows)
    spread = (max(rows) - min(rows)) / real_s
    run.row(f"{setting.name}: round", real_s, "s", spread=spread)
    for kind, seconds in zip(errors, simulator_settings.predict(setting, one, alone), strict=True):
        signed = (seconds / real_s - 1.0) * 100
        errors[kind].append(abs(signed))
        run.row(f"{setting.name}: error {kind}", signed, "%")


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


def measure(run: harness.Bench) -> None:
    """Runs every setting and predicts it; with ``--quick`` one setting."""
    measure_speed(run)
    most = 0.0
    wanted = [one for one in simulator_settings.settings(run.quick) if ONLY.value in one.name]
    errors: dict[str, list[float]] = {"alone": [], "in run": []}
    with tempfile.TemporaryDirectory() as name:
        folder, done = Path(name), 0
        for network in simulator_settings.NETWORKS:
            some = [one for one in wanted if one.network == network]
            if not some:
                continue
            simulator_settings.write_data(folder, network.batch)
            run.progress(f"{network.name} alone", done, len(wanted))
            times = [simulator_settings.time_network(some, folder)]
            runs = []
            for setting in some:
                run.progress(setting.name, done, len(wanted))
                summary = launcher.launch(setting.config(folder))
                runs.append(read_run(Path(summary["folder"])))
                done += 1
            times.append(simulator_settings.time_network(some, folder))
            # Before and after, in case the machine's speed changes.
            alone = {
                host: {key: (s + times[1][host][key]) / 2 for key, s in found.items()}
                for host, found in times[0].items()
            }
            for setting, one in zip(some, runs, strict=True):
                most = max(most, demand(one))
                judge(run, setting, one, alone, errors)
    for kind, sizes in errors.items():
        if sizes:
            run.row(f"mean error of {len(sizes)} {kind}", statistics.fmean(sizes), "%", 3.0)
            run.row(f"worst error {kind}", max(sizes), "%", 8.0)
    if wanted:
        run.note(
            "alone: from separately measured stage times. in run: from the median times of the "
            "run itself, which isolates the simulator's part of the error."
        )
        run.note(f"Devices computed at most {most:.0%} of their core, all together.")


if __name__ == "__main__":
    harness.run(measure)
