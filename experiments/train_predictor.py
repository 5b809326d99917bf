"""Trains the latency predictor on gathered times and writes the network that is shipped.

  python -m experiments.train_predictor --timings=timings.npz --tables=FOLDER --out=FILE

Times are those of experiments.collect_latency (the ones in the package unless given); tables are
published profile tables of other devices (pipar_jax/predictor/tables.py), left out if not given.
Takes about half a minute on a core and is the same on every run.
"""

import pathlib
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from pipar_jax.errors import PiparError

_TIMINGS = flags.DEFINE_string("timings", "", "Times to train on; empty: those in the package.")
_TABLES = flags.DEFINE_string("tables", "", "Folder of profile tables; empty: none.")
_OUT = flags.DEFINE_string("out", None, "File for the network (.safetensors).", required=True)
_STEPS = flags.DEFINE_integer("steps", 0, "Updates; 0: as many as usual.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    """Trains and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; all options start with --")
    from pipar_jax.predictor import read_timings, training

    began_s = time.monotonic()
    try:
        timings = read_timings(
            pathlib.Path(_TIMINGS.value) if _TIMINGS.value else None,
            pathlib.Path(_TABLES.value) if _TABLES.value else None,
        )
        families = sorted({one.family for one in timings.devices})
        about = (
            f"{len(timings.layers)} layers on {len(timings.devices)} devices "
            f"({', '.join(families)}), {_STEPS.value or training.STEPS} updates"
        )
        weights = training.train(timings, steps=_STEPS.value or training.STEPS, about=about)
        weights.save(pathlib.Path(_OUT.value))
    except PiparError as error:
        sys.exit(f"error: {error}")
    size = pathlib.Path(_OUT.value).stat().st_size
    print(f"{about}; {size / 1e3:.1f} kB in {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    app.run(main)
