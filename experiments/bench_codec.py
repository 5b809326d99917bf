"""Codecs: speed, size and error on real tensors, accuracy and time of training.

  python -m experiments.bench_codec [--data_dir=FOLDER] [--part=PART] [--quick] [--json=FILE]

Tensors: activations and cotangents of three networks at two depths after 20 steps on CIFAR-10,
coded on one core, compared with bfloat16, int8, int4, zstandard, blosc2 (extra ``peers``) and
memcpy. Training: PiPar, and MP-SL over a node with labels at home, on two devices behind 4G (10
Mbit/s up, 25 down), from the same initial weights on the same shards; only the codecs differ. A
pair names the codecs of activations and cotangents, "weights" that of averaged weights. With
CIFAR-10 in --data_dir=FOLDER, VGG-5 trains on 4,000 images for about 15 minutes; without it, both
parts use scikit-learn's digits. --part=accuracy: what codecs cost at the end of training, on all of
MNIST and CIFAR-10 from three paired seeds, which takes hours and needs --data_dir; with
--results=FOLDER each run is saved and not repeated.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from configs import cifar10_vgg5, quickstart
from experiments.benchmarks import codec_accuracy, codec_peers, harness
from experiments.benchmarks.privacy_trials import mean_and_error
from pipar_jax.config import Config, DataConfig
from pipar_jax.data.public import load_public
from pipar_jax.disk.files import make_folder
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.launcher import launch
from pipar_jax.launch.pinning import first_cores, pinned

DATA_DIR = plain_flags.define_folder("data_dir", "Folder with CIFAR-10.", exists=True)
PART = flags.DEFINE_enum(
    "part", "both", ["both", "tensors", "training", "accuracy"],
    "What to measure; both: tensors and training.",
)  # fmt: skip
DATA = flags.DEFINE_multi_enum(
    "data", tuple(codec_accuracy.DATA), tuple(codec_accuracy.DATA), "Accuracy: the data sets."
)
CODECS = flags.DEFINE_multi_enum(
    "codecs",
    list(codec_accuracy.CASES)[1:],
    list(codec_accuracy.CASES)[1:],
    "Accuracy: the codecs.",
)
RESULTS = plain_flags.define_folder(
    "results", "Accuracy: folder in which runs are saved and reused; empty: none."
)
METHOD = flags.DEFINE_enum("method", "both", ["both", "pipar", "mpsl"], "Methods to train by.")
NETWORKS = {"vgg5": (1, 2), "resnet18": (2, 6), "mobilenetv3_small": (2, 6)}
CODERS = ("bfloat16", "int8", "int4", "bits:3", "bits:5", "bits:7", "bits:7s", "bits:11",
          "bits:rel1e-3", "bits:lossless")  # fmt: skip
# Activations, cotangents and averaged weights.
CASES = {
    "raw": ("raw", "raw", "raw"),
    "bfloat16": ("bfloat16", "bfloat16", "raw"),
    "int8": ("int8", "int8", "raw"),
    "int4 / int8": ("int4", "int8", "raw"),
    "bits:7": ("bits:7", "bits:7", "raw"),
    "bits:3 / bits:7": ("bits:3", "bits:7", "raw"),
    "bits:3s / bits:7s": ("bits:3s", "bits:7s", "raw"),
    "bits:3 / bits:7, weights bits:11": ("bits:3", "bits:7", "bits:11"),
}
QUICK = ("raw", "bits:3 / bits:7")
#: The codecs that each method is trained with: all, or the most informative ones.
METHODS = {"pipar": tuple(CASES), "mpsl": QUICK}
# Tolerated loss of accuracy against raw, in percentage points.
POINTS = 1.0


def _encode(coder: Any, tensors: Iterable[Any]) -> list[Any]:
    return [coder.encode(tensor) for tensor in tensors]


def _decode(coder: Any, coded: Iterable[Any], tensors: Iterable[Any]) -> list[Any]:
    return [coder.decode(data, tensor) for data, tensor in zip(coded, tensors, strict=True)]


def tensors(run: harness.Bench) -> None:
    """Codes real tensors: size and error of each, speed over all."""
    data = DataConfig(source="cifar10" if DATA_DIR.value else "digits", data_dir=DATA_DIR.value)
    split = load_public(data.source, data).train
    batch, steps = 100, 3 if run.quick else 20
    images = split.x[: batch * steps].astype(np.float32) / 255 - 0.5
    found: dict[str, Any] = {}
    for network in list(NETWORKS)[:1] if run.quick else NETWORKS:
        run.progress(f"training {network}")
        labels = split.labels[: batch * steps]
        made = codec_peers.tensors_of(network, images, labels, NETWORKS[network], batch)
        found |= {f"{network} {what}": tensor for what, tensor in made.items()}
    total = sum(tensor.nbytes for tensor in found.values())
    coders = codec_peers.coders(CODERS, run.missing)
    encoded = {name: _encode(coder, found.values()) for name, coder in coders.items()}
    cases: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: [tensor.copy() for tensor in found.values()]
    }
    for name, coder in coders.items():
        cases[f"{name}: encode"] = functools.partial(_encode, coder, found.values())
        cases[f"{name}: decode"] = functools.partial(_decode, coder, encoded[name], found.values())
    with pinned(first_cores(1)):
        samples = run.compare(cases, repeats=7)
    for case in cases:
        speed = total / samples.median(case) / 1e9
        run.row(case, speed, "GB/s", spread=samples.spread(case))
    for what, name in ((what, name) for what in found for name in coders):
        data = encoded[name][list(found).index(what)]
        run.row(f"{what}, {name}: ratio", found[what].nbytes / codec_peers.nbytes(data), "x")
        if coders[name].lossy:
            error = np.abs(coders[name].decode(data, found[what]) - found[what])
            scale = np.sqrt(np.mean(np.square(found[what])))
            rms = np.sqrt(np.mean(np.square(error))) / scale
            run.row(f"{what}, {name}: rms error / rms", 100 * rms, "%")
            run.row(f"{what}, {name}: largest error / rms", 100 * error.max() / scale, "%")


def training(run: harness.Bench) -> None:
    """Trains by each method with each codec."""
    for method, names in METHODS.items():
        if METHOD.value in (method, "both"):
            train(run, method, QUICK if run.quick else names)


def train(run: harness.Bench, method: str, names: Sequence[str]) -> None:
    """Trains by a method with some codecs, raw first."""
    # Training that takes minutes uses one seed; on the digits there is time for two.
    seeds = (0,) if run.quick or DATA_DIR.value else (0, 1)
    raw: tuple[float, float] | None = None
    for index, name in enumerate(names):
        title = f"{method}, {name}"
        run.progress(f"training {title}", index, len(names))
        with tempfile.TemporaryDirectory() as folder:
            told = [launch(_config(method, name, seed, run.quick, folder)) for seed in seeds]
        accuracy = 100 * statistics.mean(one["metrics"]["accuracy"] for one in told)
        wire = told[0]["bytes_up"] + told[0]["bytes_down"]
        run.row(f"{title}: seconds per epoch", min(one["epoch_seconds"] for one in told), "s")
        run.row(f"{title}: test accuracy", accuracy, "%")
        if raw is not None:
            run.row(f"{title}: bytes, raw / coded", raw[1] / wire, "x")
            goal = None if run.quick else POINTS
            run.row(f"{title}: accuracy lost", raw[0] - accuracy, "points", goal)
        raw = raw or (accuracy, wire)
    run.note(f"Accuracy is the mean of {len(seeds)} seed(s); bytes include weights and headers.")


def _config(method: str, case: str, seed: int, quick: bool, folder: str) -> Config:
    config = cifar10_vgg5.get_config() if DATA_DIR.value else quickstart.get_config()
    config.seed, config.epochs, config.run.dir = seed, 2 if quick else 5, folder
    config.method, config.devices.defaults.link = method, "4g"
    config.devices.defaults.slowdown = 1.0
    if DATA_DIR.value:
        config.data.data_dir, config.data.train_samples = DATA_DIR.value, 4000
        config.data.augment, config.pipeline.cut = "none", 2
    if quick:
        config.data.train_samples = 400
    pipeline = config.pipeline
    if method == "mpsl":
        config.nodes.count, pipeline.cuts = 1, f"{pipeline.cut},4"  # the head is at home
    pipeline.activation_codec, pipeline.cotangent_codec, config.aggregation.codec = CASES[case]
    return config


def accuracy(run: harness.Bench) -> None:
    """Trains to the end with each codec and without, and adds what the codec has lost.

    Raises:
      ConfigError: There is no folder of data sets.
    """
    if not DATA_DIR.value:
        raise ConfigError("--part=accuracy needs MNIST and CIFAR-10: add --data_dir=FOLDER")
    seeds = codec_accuracy.SEEDS[:1] if run.quick else codec_accuracy.SEEDS
    with tempfile.TemporaryDirectory() as folder:
        results = make_folder(RESULTS.value or folder, "choose another folder with --results")

        def percent(data: str, case: str) -> list[float]:
            scores = []
            for seed in seeds:
                setting = codec_accuracy.Setting(data, case, seed, DATA_DIR.value, run.quick)
                run.progress(setting.name)
                train = functools.partial(codec_accuracy.accuracy, setting, Path(folder))
                scores.append(float(harness.kept(results, setting.name, train)))
            return scores

        for data in dict.fromkeys(DATA.value):
            raw = percent(data, "raw")
            run.row(f"{data}, raw: test accuracy", statistics.fmean(raw), "%")
            for case in dict.fromkeys(CODECS.value):
                coded = percent(data, case)
                lost = [before - after for before, after in zip(raw, coded, strict=True)]
                mean, error = mean_and_error(lost)
                run.row(f"{data}, {case}: test accuracy", statistics.fmean(coded), "%")
                goal = None if run.quick else POINTS
                run.row(f"{data}, {case}: accuracy lost", mean, "points", goal)
                if len(lost) > 1:
                    run.row(f"{data}, {case}: standard error of it", error, "points")
                run.note(f"{data}, {case}: pairs lost {', '.join(f'{x:+.2f}' for x in lost)}")


def measure(run: harness.Bench) -> None:
    """Measures the selected parts."""
    if PART.value == "accuracy":
        accuracy(run)
    for name, part in (("tensors", tensors), ("training", training)):
        if PART.value in (name, "both"):
            part(run)


if __name__ == "__main__":
    harness.run(measure)
