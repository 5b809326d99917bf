"""The tuner's choices against real runs of other plans, and adaptation against fixed plans.

--part=choices: for each setting, every (cut, N) predicted within 1.5x of the best (twice) and five
random others (once) are trained for a round of three steps and an average, in one run whose plan
changes from round to round; then the tuner's plan alternates with the best of them. --part=adapt:
bandwidth falls from 50 to 10 Mbit/s and rises again. --part=unequal: devices with slowdowns of 1, 5
and 20, a plan for each against the best common plan. --part=search: the time of a search. With
--results=FOLDER measurements are saved and not repeated.

python -m experiments.bench_tuner --part=choices --only="vgg5 4g" --results=FOLDER
"""

import tempfile
import time
from pathlib import Path

from absl import flags

from experiments.benchmarks import adapting_trials, harness, tuner_trials
from pipar_jax.config import Config
from pipar_jax.disk.files import make_folder
from pipar_jax.launch import plain_flags
from pipar_jax.methods.resolution import resolve

PARTS = ("choices", "adapt", "unequal", "search")
PART = flags.DEFINE_multi_enum("part", PARTS, PARTS, "What to measure; may be repeated.")
ONLY = flags.DEFINE_string("only", "", "Choices: only settings whose name contains this.")
STEM = flags.DEFINE_multi_enum(
    "stem",
    list(tuner_trials.NETWORKS),
    list(tuner_trials.NETWORKS),
    "Choices: first layers of the networks; imagenet: ResNets with the papers'. May be repeated.",
)
RESULTS = plain_flags.define_folder(
    "results", "Folder in which measurements are saved and reused; empty: none."
)


def choices(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds a row for each setting: the tuner's plan relative to the best measured one.

    Raises:
      ConfigError: No setting has the name that is asked for.
    """
    settings = tuner_trials.settings(list(dict.fromkeys(STEM.value)), run.quick)
    settings = harness.chosen(settings, ONLY.value, lambda setting: setting.name)
    for done, setting in enumerate(settings):
        run.progress(setting.name, done, len(settings))
        found = tuner_trials.choice(setting, folder, results)
        target = 1.0 + max(0.03, found.spread)
        run.row(f"{setting.name}: tuner / best measured", found.ratio, "x", target)
        run.row(f"{setting.name}: paper / best measured", found.paper, "x")
        run.note(
            f"{setting.name}: tuner {found.tuner_plan} {found.tuner_s:.3f} s a round; best "
            f"{found.best_plan} {found.best_s:.3f} s; paper {found.paper_plan} {found.paper_s:.3f} "
            f"s; {found.plans} plans trained, spread {found.spread:.1%}, prediction off by "
            f"{found.error:.1%} (median)"
        )


def adapt(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds the rows of falling and rising bandwidth."""
    run.progress("adapt")
    found = adapting_trials.adapting(folder, results, run.quick)
    for name, seconds in found.seconds.items():
        run.row(f"50/10/50 Mbit/s: {name}", seconds, "s")
    run.row("50/10/50 Mbit/s: adapting / best per phase", found.to_oracle, "x", 1.10)
    run.row("50/10/50 Mbit/s: adapting / best fixed plan", found.to_fixed, "x", 1.0)
    for text in found.changes:
        run.note(text)


def unequal(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds the rows of devices that differ."""
    for name, links in tuner_trials.UNEQUAL_LINKS.items():
        run.progress(f"unequal devices, {name}")
        found = tuner_trials.unequal(folder, results, links, run.quick)
        title = f"devices 1x, 5x, 20x, {name}"
        run.row(f"{title}: own plans", found.own_s, "s")
        run.row(f"{title}: best common plan", found.common_s, "s")
        run.row(f"{title}: own / common", found.own_s / found.common_s, "x", 1.0)
        run.note(f"{title}: own {found.own_plan}; common {found.common_plan}")


def search(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds the time of a search for 20 devices and ResNet-101."""
    from pipar_jax.tuner.search import search as search_plans

    del folder, results  # takes seconds and writes nothing
    for name, differ in (("equal", False), ("unequal", True)):
        profile = tuner_trials.many_devices(unequal=differ)
        config = Config(method="auto")
        config.devices.count = len(profile.devices)
        for codecs in ("raw", "safe"):
            config.tuner.codecs = codecs
            # Processor time of one thread: the time on an otherwise idle machine.
            began_s = time.thread_time()
            found = search_plans(profile, resolve(config))
            spent_s = time.thread_time() - began_s
            run.row(f"search, 20 {name} devices, ResNet-101, codecs {codecs}", spent_s, "s", 2.0)
            run.note(
                f"search, {name}, {codecs}: {found.judged} of {found.candidates} candidates "
                f"simulated, within {found.gap:.1%} of the bound"
            )


def measure(run: harness.Bench) -> None:
    """Measures the selected parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = make_folder(RESULTS.value or name, "choose another folder with --results")
        for part, function in zip(PARTS, (choices, adapt, unequal, search), strict=True):
            if part in PART.value:
                function(run, folder, results)


if __name__ == "__main__":
    harness.run(measure)
