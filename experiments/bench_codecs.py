"""What each codec does to a real training: accuracy, bytes and seconds beside sending raw.

  python -m experiments.bench_codecs [--quick] [--json=FILE]

PiPar trains the digits on two slow devices behind links of 10/25 Mbit/s, from the same initial
weights on the same shards; only the codecs differ. A pair names the codecs of activations and
cotangents, "weights" the codec of averaged weights. About five minutes, --quick under one.
"""

import dataclasses
import pathlib
import statistics
import tempfile
from typing import Any

from configs import quickstart
from pipar_jax import bench
from pipar_jax.config import Config
from pipar_jax.launcher import launch

CASES: dict[str, dict[str, str]] = {
    "raw": {},
    "bfloat16": {"activation": "bfloat16", "cotangent": "bfloat16"},
    "float16": {"activation": "float16", "cotangent": "float16"},
    "fp8": {"activation": "fp8", "cotangent": "fp8"},
    "int8": {"activation": "int8", "cotangent": "int8"},
    "int4 / int8": {"activation": "int4", "cotangent": "int8"},
    "int4": {"activation": "int4", "cotangent": "int4"},
    "int8, weights int8": {"activation": "int8", "cotangent": "int8", "weight": "int8"},
}
QUICK = ("raw", "int8")
# Losing more than this many points of accuracy against raw is not a codec's right.
POINTS = 1.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one training came to."""

    accuracy: float
    epoch_s: float
    link_bytes: int


def measure(run: bench.Bench) -> None:
    """Trains with each codec and adds the rows."""
    names = QUICK if run.quick else tuple(CASES)
    seeds = (0,) if run.quick else (0, 1)
    raw: Outcome | None = None
    for index, name in enumerate(names):
        run.progress(f"training with {name}", index, len(names))
        outcomes = [_train(CASES[name], seed, epochs=2 if run.quick else 6) for seed in seeds]
        outcome = Outcome(
            statistics.mean(one.accuracy for one in outcomes),
            statistics.median(one.epoch_s for one in outcomes),
            outcomes[0].link_bytes,
        )
        raw = raw or outcome
        run.row(f"{name}: seconds per epoch", outcome.epoch_s, "s")
        run.row(f"{name}: bytes, raw / coded", raw.link_bytes / outcome.link_bytes, "x")
        lost = 100 * (raw.accuracy - outcome.accuracy)
        run.row(f"{name}: test accuracy", 100 * outcome.accuracy, "%")
        if outcome is not raw:
            run.row(f"{name}: accuracy lost", lost, "points", None if run.quick else POINTS)
    run.note(f"Accuracy is the mean of {len(seeds)} seeds; bytes include weights and headers.")


def _train(codecs: dict[str, str], seed: int, epochs: int) -> Outcome:
    config = _config(codecs, seed, epochs)
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = str(pathlib.Path(folder) / "runs")
        summary: dict[str, Any] = launch(config)
    return Outcome(
        summary["accuracy"], summary["epoch_seconds"], summary["bytes_up"] + summary["bytes_down"]
    )


def _config(codecs: dict[str, str], seed: int, epochs: int) -> Config:
    config = quickstart.get_config()
    config.seed, config.epochs = seed, epochs
    config.devices.defaults.link = "4g"
    config.devices.defaults.slowdown = 10.0
    config.pipeline.activation_codec = codecs.get("activation", "raw")
    config.pipeline.cotangent_codec = codecs.get("cotangent", "raw")
    config.aggregation.codec = codecs.get("weight", "raw")
    return config


if __name__ == "__main__":
    bench.run(measure)
