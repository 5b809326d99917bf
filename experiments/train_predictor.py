"""Trains the latency predictor on collected times and writes the network of the package.

  python -m experiments.train_predictor --timings=timings.npz --tables=FOLDER --out=FILE

Times are those of experiments.collect_latency (by default those in experiments/latency_data);
tables are published profile tables of other devices (experiments/latency_data/published_tables.py),
by default none. Training takes 8 s on a core (see docs/predictor.md) and is deterministic.
"""

import time

from absl import flags

from pipar_jax.disk import files
from pipar_jax.launch import plain_flags
from pipar_jax.launch.binary import wrong_use

_TIMINGS = plain_flags.define_path(
    "timings", None, "Times to train on; by default those in the package."
)
_TABLES = plain_flags.define_path("tables", None, "Folder of profile tables; by default none.")
_OUT = plain_flags.define_path("out", None, "File for the network (.safetensors).", required=True)
_STEPS = flags.DEFINE_integer("steps", 0, "Number of updates; 0: the default.", lower_bound=0)


def main(_: list[str]) -> None:
    """Trains and writes.

    Raises:
      ConfigError: The times cannot be read, or the network cannot be written.
      DiskError: Writing the network failed.
    """
    files.check_target(_OUT.value, f"--out={_OUT.value}")
    from experiments.latency_data import training
    from experiments.latency_data.published_tables import read_timings

    began_s = time.monotonic()
    with wrong_use():
        timings = read_timings(_TIMINGS.value, _TABLES.value)
    families = sorted({device.family for device in timings.devices})
    about = (
        f"{len(timings.layers)} layers on {len(timings.devices)} devices "
        f"({', '.join(families)}), {_STEPS.value or training.STEPS} updates"
    )
    weights = training.train(timings, steps=_STEPS.value or training.STEPS, about=about)
    weights.save(_OUT.value)
    size = _OUT.value.stat().st_size
    print(f"{about}; {size / 1e3:.1f} kB in {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    plain_flags.run(main)
