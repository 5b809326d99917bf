"""First step: from the command to the end of the first step, with a cold and a warm compile cache.

Each preset is started as a user starts it, by ``pipar train``, with random data of its data set's
shape: a mini-batch for each device, so that the first round is one step. The time ends when that
round is over. Cold: the user's cache is empty. Warm: the same command once more. With
--results=FOLDER measurements are saved and not repeated.

  python -m experiments.bench_start [--presets=digits,cifar10_vgg5] [--results=FOLDER] [--quick]
"""

import functools
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

import configs
from experiments.benchmarks import harness
from pipar_jax.disk.event_log import read_events
from pipar_jax.disk.files import make_folder, replacing
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.flags import NoFlags, parse

FOLDER = Path(configs.__file__).parent
PRESETS = plain_flags.define(
    "presets",
    [
        "digits", "quickstart", "mnist_vgg5", "mnist_resnet18", "cifar10_vgg5",
        "cifar10_vgg5_central", "cifar10_resnet18", "cifar10_resnet18_mpsl",
        "cifar10_resnet18_accept", "cifar10_vgg5_paper", "cifar10_resnet18_paper",
    ],
    "Presets to start.",
    plain_flags.list_of(
        plain_flags.one_of(sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))), once=True
    ),
)  # fmt: skip
OVERRIDES = flags.DEFINE_multi_string(
    "override", [], "Further flag of every run, such as --override=--config.model.stem=imagenet."
)
RESULTS = plain_flags.define_folder(
    "results", "Folder in which measurements are saved and reused; empty: none."
)
#: Shape of a sample of each data set that a preset names.
SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
#: Flags that this benchmark sets itself and depends on.
OWN_FLAGS = ("config.name", "config.run.dir")
LIMIT_S = 1800.0
POLL_S = 0.02


def write_data(preset: str, folder: Path) -> Path:
    """Writes a mini-batch of random images with the shape of a preset's data set."""
    config = importlib.import_module(f"configs.{preset}").get_config()
    random = np.random.default_rng(0)
    shape = (config.data.batch_size, *SHAPES[config.data.source])
    images = random.normal(size=shape).astype(np.float32)
    labels = (np.arange(len(images)) % 10).astype(np.int32)
    path = folder / f"{preset}.npz"
    with replacing(path) as aside:
        np.savez(aside, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def first_step_s(preset: str, data: Path, cache: Path, folder: Path) -> tuple[float, float]:
    """Starts a preset and returns the seconds to the end of the first step, and of compiling.

    Args:
      preset: Its name.
      data: Its data; see ``write_data``.
      cache: The user's cache folder.
      folder: A new folder for the run.

    Raises:
      RunError: The run fails, or does not finish a step in time.
    """
    command = [
        sys.executable, "-m", "experiments.train", f"--config={preset}", "--config.name=start",
        f"--config.run.dir={folder}", f"--config.data.source=npz:{data}", "--config.epochs=1",
        *OVERRIDES.value,
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    metrics = folder / "start" / "metrics.jsonl"
    began_s = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            while not (seen := _events(metrics)).get("round_finished"):
                if process.poll() is not None or time.monotonic() - began_s > LIMIT_S:
                    break
                time.sleep(POLL_S)
            took_s = time.monotonic() - began_s
            said, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    if process.returncode or "round_finished" not in seen:
        raise RunError(f"{preset} did not finish its first step: {said.strip()[-300:]}")
    return took_s, seen["prepared"]


def _events(metrics: Path) -> dict[str, float]:
    """Returns the kinds of events so far, with the seconds of those that have them."""
    if not metrics.exists():
        return {}
    return {str(row["event"]): float(row.get("compile_s", 1.0)) for row in read_events(metrics)}


def start(preset: str, run: harness.Bench) -> dict[str, tuple[float, float]]:
    """Starts a preset with an empty cache and once more; returns ``first_step_s`` of both."""
    with tempfile.TemporaryDirectory() as folder:
        data, cache = write_data(preset, Path(folder)), Path(folder) / "cache"
        seconds = {}
        for state in ("cold", "warm"):
            run.progress(f"{preset}, {state}")
            seconds[state] = first_step_s(preset, data, cache, Path(folder) / state)
    return seconds


def measure(run: harness.Bench) -> None:
    """Starts every preset cold and warm; with --quick two of them.

    Raises:
      ConfigError: A flag of --override is wrong.
      RunError: A run fails.
    """
    presets = run.reduced(PRESETS, PRESETS.value[:2])
    for override in OVERRIDES.value:
        if (own := override.lstrip("-").partition("=")[0]) in OWN_FLAGS:
            raise ConfigError(
                f"--override={override}: --{own} is what this benchmark finds its runs by; leave "
                "it out"
            )
    for preset in presets:  # the overrides
        command = [f"--config={preset}", *OVERRIDES.value]
        parse(command, NoFlags, doc="", name="train", presets=FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        results = make_folder(RESULTS.value or folder, "choose another folder with --results")
        for preset in presets:
            name = " ".join(["start", preset, *OVERRIDES.value])
            seconds = harness.kept(results, name, functools.partial(start, preset, run))
            for state, (took_s, compile_s) in seconds.items():
                run.row(f"{preset}, {state}, command to first step", took_s, "s")
                run.row(f"{preset}, {state}, of which preparing the plan", compile_s, "s")


if __name__ == "__main__":
    harness.run(measure)
