"""Predicts how long layers take on a device from a few seconds of measuring it.

A reconstruction of AccEPT's latency predictor (Chen et al., arXiv 2311.05827, of which only the
abstract is public): ``operators`` reads what a unit computes from its shapes, ``network`` is the
small MLP that all devices share, ``device`` learns one device from its reference layers
(``reference``), ``online`` goes on learning from the stage times of a training, ``hosts`` makes
the profile that the tuner takes. ``collect``, ``timings``, ``tables`` and ``training`` made the
network that is shipped; ``baselines`` and ``evaluation`` judge it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.latency_data.timings import Timings

#: The times that the shipped network was trained on, tables left out.
SHIPPED_TIMINGS = Path(__file__).with_name("timings.npz")


def read_timings(path: Path | None = None, tables: Path | None = None) -> Timings:
    """Returns gathered times, with those of profile tables beside them.

    Args:
      path: What ``experiments.collect_latency`` wrote; None is what is in the package.
      tables: A folder of profile tables; None is none.

    Raises:
      DataError: A file cannot be read, or there is no table in the folder.
    """
    from experiments.latency_data.published_tables import TABLES, read_tables
    from experiments.latency_data.timings import Timings
    from pipar_jax.errors import DataError

    timings = Timings.load(path or SHIPPED_TIMINGS)
    if tables is None:
        return timings
    found = read_tables(tables)
    if found is None:
        raise DataError(f"{tables} holds none of {', '.join(TABLES)}")
    return timings.join(found)
