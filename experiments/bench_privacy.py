"""What differential privacy costs: accuracy, epochs behind slow links, and each mechanism per step.

VGG-5 with group normalisation, two devices, methods FL and PiPar with the cut after unit 1 and
after unit 2. Budgets are of a device, at delta = 1e-5, against the replacement of a record; labels
are unprotected. --part=accuracy: MNIST and CIFAR-10 in --data_dir=FOLDER, epsilon 8, 2 and none,
three seeds. --part=epochs: epochs behind 4G and WiFi with emulated slow devices, private and not:
whether PiPar keeps its speed-up over FL. --part=mechanisms: clipping, noise, DP-SGD and the ledger,
alone and without other processes. With --results=FOLDER runs are saved and not repeated.

python -m experiments.bench_privacy --data_dir=FOLDER --results=FOLDER
"""

import contextlib
import functools
import itertools
import statistics
import tempfile
from pathlib import Path

from absl import flags

from experiments.benchmarks import harness, privacy_trials
from experiments.benchmarks.privacy_trials import EPSILONS, VARIANTS, Setting, Variant
from pipar_jax.disk.files import make_folder
from pipar_jax.launch import plain_flags
from pipar_jax.privacy.ledger import PrivacyLedger

PARTS = ("accuracy", "epochs", "mechanisms")
PART = flags.DEFINE_multi_enum("part", PARTS, PARTS, "What to measure; may be repeated.")
DATA = flags.DEFINE_multi_enum(
    "data", tuple(privacy_trials.DATA), tuple(privacy_trials.DATA), "Accuracy: the data sets."
)
DATA_DIR = plain_flags.define_folder("data_dir", "Folder of public data sets.", exists=True)
RESULTS = plain_flags.define_folder(
    "results", "Folder in which measurements are saved and reused; empty: none."
)
SAMPLES = flags.DEFINE_integer("samples", 10_000, "Accuracy: training samples.", lower_bound=200)
EPOCHS = flags.DEFINE_integer("epochs", 10, "Accuracy: epochs.", lower_bound=1)
ONLY = flags.DEFINE_string("only", "", "Accuracy: only settings whose name contains this.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Accuracy: seeds.", lower_bound=1)
SLOWDOWN = plain_flags.define(
    "slowdown", 10.0, "Epochs: slowness of devices.", plain_flags.positive(float)
)
LINKS = ("4g", "wifi")
#: Samples and epochs behind links: what they learn does not matter.
LINK_SAMPLES, LINK_EPOCHS, LINK_EPSILON = 1000, 4, 8.0
BATCH, CUTS = 100, (1, 2)


def _budget(epsilon: float | None) -> str:
    return "not private" if epsilon is None else f"epsilon {epsilon:g}"


def _name_of(setting: tuple[str, Variant, float | None]) -> str:
    data, variant, epsilon = setting
    return f"{data}, {variant}, {_budget(epsilon)}"


def accuracy(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds accuracies and their standard errors over seeds.

    Raises:
      ConfigError: No setting has the name that is asked for.
    """
    if not DATA_DIR.value:
        run.missing("accuracy skipped: it needs MNIST and CIFAR-10, see --data_dir")
        return
    samples, epochs = run.reduced(SAMPLES, 200), run.reduced(EPOCHS, 1)
    seeds = range(run.reduced(SEEDS, 1))
    settings = itertools.product(dict.fromkeys(DATA.value), VARIANTS, EPSILONS)
    for data, variant, epsilon in harness.chosen(settings, ONLY.value, _name_of):
        name, percent = _name_of((data, variant, epsilon)), []
        for seed in seeds:
            run.progress(f"{name}, seed {seed}")
            one = Setting(data, variant, epsilon, seed, samples, epochs, DATA_DIR.value)
            train = functools.partial(privacy_trials.accuracy, one, folder)
            percent.append(100 * harness.kept(results, f"accuracy {one.name}", train))
        mean, error = privacy_trials.mean_and_error(percent)
        run.row(f"{name}: accuracy", mean, "%")
        if len(percent) > 1:
            run.row(f"{name}: standard error", error, "points")


def epochs(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds epochs behind links, private and not, and PiPar's speed-up over FL."""
    if not DATA_DIR.value:
        run.missing("epochs skipped: they need CIFAR-10, see --data_dir")
        return
    samples = 200 if run.quick else LINK_SAMPLES
    for link in LINKS[:1] if run.quick else LINKS:
        for epsilon in (None, LINK_EPSILON):
            base_s = 0.0
            for variant in VARIANTS[:2] if run.quick else VARIANTS:
                name = f"{link}, {variant}, {_budget(epsilon)}"
                run.progress(name)
                count = 2 if run.quick else LINK_EPOCHS
                one = Setting("cifar10", variant, epsilon, 0, samples, count, DATA_DIR.value)
                seconds = harness.kept(
                    results, f"epochs {link} {SLOWDOWN.value:g} {one.name}",
                    lambda one=one, link=link: privacy_trials.epochs_s(  # type: ignore[misc]
                        one, link, SLOWDOWN.value, folder
                    ),
                )  # fmt: skip
                middle_s = statistics.median(seconds)
                spread = (max(seconds) - min(seconds)) / middle_s
                run.row(f"{name}: epoch", middle_s, "s", spread=spread)
                base_s = base_s or middle_s  # the first is FL
                if variant != VARIANTS[0]:
                    run.row(f"{name}: faster than fl", base_s / middle_s, "x")


def mechanisms(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds what a mini-batch costs a device, mechanism by mechanism."""
    del results
    batch = 8 if run.quick else BATCH
    for cut in CUTS[:1] if run.quick else CUTS:
        with contextlib.closing(PrivacyLedger(folder / f"ledger{cut}")) as ledger:
            cases = privacy_trials.mechanisms(batch, cut, ledger)
            samples = run.compare(cases, repeats=9)
        for name in cases:
            run.row(f"cut {cut}: {name}", samples.median(name) * 1e3, "ms",
                    spread=samples.spread(name))  # fmt: skip
    run.note(f"mechanisms: {batch} samples in one micro-batch, alone in one process")


def measure(run: harness.Bench) -> None:
    """Measures the selected parts."""
    with tempfile.TemporaryDirectory(prefix="privacy-") as name:
        folder = Path(name)
        results = make_folder(RESULTS.value or name, "choose another folder with --results")
        for part, function in zip(PARTS, (accuracy, epochs, mechanisms), strict=True):
            if part in PART.value:
                function(run, folder, results)


if __name__ == "__main__":
    harness.run(measure)
