"""AccEPT on chains of unequal devices: balanced cuts and the codec, separately and combined.

--part=time: ResNet-18 on chains of 2, 3 and 4 devices with slowdowns of 1, 2, 4 and 8 and links of
10, 50 and 200 Mbit/s, for even and balanced cuts, raw float32 and coded. All plans of a setting are
trained alternately in one run. --part=learning: a chain of four starts from predicted times,
adapts, and is compared with the best partition. Both train on CIFAR-10 in --data_dir=FOLDER, as
published or prepared, or on random images. --part=accuracy: VGG-5 for 10 epochs on a chain of two,
raw and coded from the same seeds; it needs --data_dir. With --results=FOLDER measurements are saved
and not repeated.

python -m experiments.bench_accept --part=time --only="2 devices" --results=FOLDER
"""

import statistics
import tempfile
from pathlib import Path

from absl import flags

from configs import cifar10_vgg5_central
from experiments.benchmarks import accept_trials, harness
from pipar_jax.config import Config
from pipar_jax.disk.files import make_folder
from pipar_jax.launch import plain_flags

PARTS = ("time", "accuracy", "learning")
PART = flags.DEFINE_multi_enum("part", PARTS, PARTS, "What to measure; may be repeated.")
ONLY = flags.DEFINE_string("only", "", "Time: only settings whose name contains this.")
DATA_DIR = plain_flags.define_folder("data_dir", "Folder with CIFAR-10.", exists=True)
RESULTS = plain_flags.define_folder(
    "results", "Folder in which measurements are saved and reused; empty: none."
)
SEEDS = (0, 1, 2)
#: Below this rate the link limits even cuts of raw tensors; the paper's factor.
SLOW_MBPS, FACTOR = 10, 3.0
#: Tolerated loss of accuracy due to the codec, in percentage points.
POINTS = 0.5


def times(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds the epoch of each setting and its reduction by each part and by both.

    Raises:
      ConfigError: No setting has the name that is asked for.
    """
    first, balanced, coded, both = accept_trials.VARIANTS
    settings = accept_trials.settings(run.quick, DATA_DIR.value)
    settings = harness.chosen(settings, ONLY.value, lambda setting: setting.name)
    for done, setting in enumerate(settings):
        run.progress(setting.name, done, len(settings))
        found = accept_trials.compare(setting, folder, results, run.quick)
        for name, seconds in found.seconds.items():
            middle_s = statistics.median(seconds)
            spread = (max(seconds) - min(seconds)) / middle_s
            run.row(f"{setting.name}: {name}", middle_s, "s", spread=spread)
            error = found.predicted_s[name] / middle_s - 1.0
            run.note(f"{setting.name}: {name}: {found.plans[name]}, predicted {error:+.1%}")
        goal = FACTOR if setting.mbps == SLOW_MBPS else None
        run.row(f"{setting.name}: shorter by balance", found.ratio(first, balanced), "x")
        run.row(f"{setting.name}: shorter by the codec", found.ratio(first, coded), "x")
        run.row(f"{setting.name}: shorter by both", found.ratio(first, both), "x", goal, "higher")


def accuracy(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds the accuracies of raw and coded trainings from the same seeds."""
    if not DATA_DIR.value:
        run.missing("accuracy skipped: it needs CIFAR-10, see --data_dir")
        return
    seeds = SEEDS[:1] if run.quick else SEEDS
    differences = []
    for done, seed in enumerate(seeds):
        run.progress(f"accuracy, seed {seed}", done, len(seeds))
        raw, coded = (
            100 * accept_trials.accuracy(_config(seed, folder), with_codec, results, run.quick)
            for with_codec in (False, True)
        )
        run.row(f"VGG-5, seed {seed}: raw", raw, "%")
        run.row(f"VGG-5, seed {seed}: coded", coded, "%")
        differences.append(raw - coded)
    goal = None if run.quick else POINTS
    run.row("VGG-5: accuracy lost, mean", statistics.fmean(differences), "points", goal)
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        run.row("VGG-5: its standard error", error, "points")


def _config(seed: int, folder: Path) -> Config:
    """Returns the preset of VGG-5 that reaches the paper's accuracy, with another seed."""
    config = cifar10_vgg5_central.get_config()
    config.seed, config.data.data_dir, config.run.dir = seed, DATA_DIR.value, str(folder)
    return config


def learning(run: harness.Bench, folder: Path, results: Path) -> None:
    """Adds the partition to which a chain without a profile adapts."""
    setting = accept_trials.Setting(max(accept_trials.LENGTHS), 50, DATA_DIR.value)
    run.progress(f"learning, {setting.name}")
    found = accept_trials.learn(setting, folder, results, run.quick)
    run.row("from predicted times: first partition", found.start_s, "s")
    run.row("from predicted times: last partition", found.end_s, "s")
    run.row("best partition", found.best_s, "s")
    run.row("last / best", found.ratio, "x", 1.03)
    words = zip(("first", "last", "best"), found.plans, strict=True)
    run.note("; ".join(f"{name} {plan}" for name, plan in words))
    run.note(f"{found.changes} changes; best of {found.tried} trained partitions")


def measure(run: harness.Bench) -> None:
    """Measures the selected parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = make_folder(RESULTS.value or name, "choose another folder with --results")
        for part, function in zip(PARTS, (times, accuracy, learning), strict=True):
            if part in PART.value:
                function(run, folder, results)


if __name__ == "__main__":
    harness.run(measure)
