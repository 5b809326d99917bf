"""What runs do when hosts are killed, stopped or cut off, and what many devices and rounds take.

Runs in processes lose a process at a seeded moment, and go on or are resumed; runs whose weights
must be those of the undisturbed run are compared bit for bit; a run with checkpoints alternates
with one without; and a server trains with light fakes: many registered devices, many rounds.
Linux only.

python -m experiments.bench_faults --only=kills --tries=28
"""

import pathlib
import random
import tempfile
from collections.abc import Callable

from absl import flags

from experiments.benchmarks import fault_trials, harness, population_trials
from experiments.benchmarks.equal_bits import Bits
from experiments.benchmarks.fault_trials import DEADLINE_S, EVERY, LAUNCHER, Outcome
from experiments.benchmarks.population_trials import Crowd, Held
from pipar_jax.config import Config
from pipar_jax.errors import RunError
from pipar_jax.methods.registry import server_methods
from pipar_jax.schedule.plan import COORDINATOR, is_device, is_node

PARTS = ("kills", "server", "launcher", "cuts", "stops", "checkpoints", "population", "rounds")
ONLY = flags.DEFINE_multi_enum("only", [], PARTS, "Measure only this; may be repeated.")
TRIES = flags.DEFINE_integer(
    "tries", 0, "Kills, runs or cuts of each part; 0: as many as the part is meant for.",
    lower_bound=0,
)  # fmt: skip
SEED = flags.DEFINE_integer("seed", 0, "Seed of what is killed when.")
METHOD = flags.DEFINE_enum(
    "method", "pipar", server_methods(), "Method of the runs that must have equal weights."
)

#: Seconds within which a run goes on, beyond its deadline.
GOES_ON_S = 5.0
MB = 1e6


def _tries(run: harness.Bench, whole: int, quick: int) -> int:
    """Returns how often something is tried."""
    return TRIES.value or (quick if run.quick else whole)


def measure_kills(run: harness.Bench, folder: pathlib.Path) -> None:
    """Adds what became of runs that lost a process."""
    kills = fault_trials.draw_kills(_tries(run, 120, 4), SEED.value)
    outcomes: list[Outcome] = []
    for done, kill in enumerate(kills):
        run.progress(str(kill), done, len(kills))
        outcome = fault_trials.try_kill(folder, kill, done)
        if not outcome.good:
            run.note(f"{kill}: neither went on nor was resumed: {outcome.reason}")
        outcomes.append(outcome)
    there = [one for one in outcomes if one.happened]
    if not there:
        run.missing("no kill came to pass: the runs were over, or had failed, before their moments")
        return
    run.row("kills", len(there), "")
    run.row("kills: went on or were resumed", sum(one.good for one in there), "", len(there),
            "higher")  # fmt: skip
    kinds: dict[str, Callable[[str], bool]] = {
        "device": is_device, "node": is_node, "server": lambda name: name == COORDINATOR,
        "launcher": lambda name: name == LAUNCHER,
    }  # fmt: skip
    for name, fits in kinds.items():
        some = [one for one in there if fits(one.kill.victim)]
        if some:
            run.row(f"kills of a {name}", len(some), "")
            run.row(f"kills of a {name}: went on", sum(one.went_on for one in some), "")
    run.row("kills: rounds lost, at most", max((one.lost for one in there), default=0), "", EVERY)
    run.row("kills: orphans", sum(one.orphans for one in outcomes), "", 0)
    waits = [one.on_s for one in there if one.on_s is not None]
    if waits:
        run.row("kills: going on took, at most", max(waits), "s", DEADLINE_S + GOES_ON_S)


def measure_equal(run: harness.Bench, folder: pathlib.Path, part: str) -> None:
    """Adds how many of the disturbed runs of a part had the weights of the undisturbed one."""
    bits, rng = Bits(folder, METHOD.value), random.Random(SEED.value)
    count = _tries(run, 20, 1)
    trial = bits.server_killed if part == "server" else bits.launcher_killed
    equal = 0
    for done in range(count):
        run.progress(f"{part} killed", done, count)
        equal += trial(rng)
    run.row(f"{part} killed: weights equal, of {count}", equal, "", count, "higher")


def measure_cuts(run: harness.Bench, folder: pathlib.Path) -> None:
    """Adds how many links were cut in runs, and whether weights were equal.

    Raises:
      RunError: A run ended before a link of it was cut.
    """
    bits, rng = Bits(folder, METHOD.value), random.Random(SEED.value)
    wanted, cuts, runs, equal = _tries(run, 300, 10), 0, 0, 0
    while cuts < wanted:
        run.progress("links cut", cuts, wanted)
        some, same = bits.links_cut(rng, wanted - cuts)
        if not some:  # nor would any of the next
            raise RunError("a run ended before a link of it was cut: it failed, or is too short")
        cuts, runs, equal = cuts + some, runs + 1, equal + same
    run.row("links cut", cuts, "")
    run.row(f"links cut: weights equal, of {runs} runs", equal, "", runs, "higher")


def measure_stops(run: harness.Bench, folder: pathlib.Path) -> None:
    """Adds whether weights were equal after a device was stopped."""
    bits, rng = Bits(folder, METHOD.value), random.Random(SEED.value)
    seconds, count = 3.0 if run.quick else 30.0, _tries(run, 3, 1)
    equal = 0
    for done in range(count):
        run.progress("device stopped", done, count)
        equal += bits.device_stopped(rng, seconds)
    run.row(f"device stopped for {seconds:g} s: weights equal, of {count}", equal, "", count,
            "higher")  # fmt: skip


def measure_checkpoints(run: harness.Bench, folder: pathlib.Path) -> None:
    """Adds what checkpoints cost a run."""
    settings = {"digits": fault_trials.digits(folder, 11 if run.quick else 61)}
    if not run.quick:
        settings["VGG-16, 50 Mbit/s"] = fault_trials.vgg16(folder, 61)
    for name, config in settings.items():

        def trained(every: int, config: Config = config) -> harness.Seconds:
            config.checkpoint.every_rounds = every
            return harness.Seconds(fault_trials.rounds_s(config))

        cases = {"with": lambda: trained(10), "without": lambda: trained(0)}
        samples = run.compare(cases, repeats=TRIES.value or 5, warm_up=0)
        run.row(
            f"{name}: rounds with a checkpoint each 10 / without",
            samples.ratio("with", "without"),
            "x",
            1.02,
            spread=samples.spread("without"),
        )


def measure_population(run: harness.Bench, folder: pathlib.Path) -> None:
    """Adds the server's memory with many registered devices beside that of a cohort of them."""
    rounds, many, cohort = (20, 500, 10) if run.quick else (200, 10_000, 50)
    found: dict[int, list[Held]] = {}
    for registered in (cohort, many):
        crowd = Crowd(registered, min(registered, 4 * cohort), cohort, rounds)
        run.progress(f"{registered} registered")
        found[registered] = population_trials.train(folder, crowd)
        _add_held(run, f"{registered} registered, {cohort} in a round", found[registered])
    most = {count: max(one.usage.resident_bytes for one in held) for count, held in found.items()}
    run.row(f"memory: {many} registered / {cohort}", most[many] / most[cohort], "x", 1.2)


def measure_rounds(run: harness.Bench, folder: pathlib.Path) -> None:
    """Adds what the server holds in the course of many rounds."""
    rounds = 300 if run.quick else 5000
    held = population_trials.train(folder, Crowd(2, 2, 0, rounds))
    _add_held(run, f"{rounds} rounds", held)


def _add_held(run: harness.Bench, name: str, held: list[Held]) -> None:
    """Adds how a server's memory, descriptors and threads grew between early and late rounds."""
    early, late = held[len(held) // 4], held[-1]
    run.row(f"{name}: server's memory", late.usage.resident_bytes / MB, "MB")
    run.row(f"{name}: memory at the end / after a quarter",
            late.usage.resident_bytes / early.usage.resident_bytes, "x", 1.05)  # fmt: skip
    run.row(f"{name}: more descriptors", late.usage.descriptors - early.usage.descriptors, "", 2)
    run.row(f"{name}: more threads", late.usage.threads - early.usage.threads, "", 0)
    run.row(f"{name}: a round", (late.time_s - early.time_s) / (late.round - early.round), "s")


def measure(run: harness.Bench) -> None:
    """Measures all parts, or those of ``--only``."""
    parts: dict[str, Callable[[harness.Bench, pathlib.Path], None]] = {
        "kills": measure_kills,
        "server": lambda run, folder: measure_equal(run, folder, "server"),
        "launcher": lambda run, folder: measure_equal(run, folder, "launcher"),
        "cuts": measure_cuts,
        "stops": measure_stops,
        "checkpoints": measure_checkpoints,
        "population": measure_population,
        "rounds": measure_rounds,
    }
    assert tuple(parts) == PARTS
    for name in dict.fromkeys(ONLY.value or PARTS):
        with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as folder:
            parts[name](run, pathlib.Path(folder))


if __name__ == "__main__":
    harness.run(measure)
