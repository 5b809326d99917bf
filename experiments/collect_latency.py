"""Times layers in the variants of a device that this machine supports, for the latency predictor.

  python -m experiments.collect_latency --out=timings.npz [--variants=core,cores]

Each variant is a process with its own cores and compiler options, timed under several conditions
(stopped for part of the time, moved to a single core). Run it first with --compile, which fills the
compilation cache and may run on a busy machine, then without it on an idle one. Existing data in
--out are kept, so that variants and networks can be collected one by one.
"""

from __future__ import annotations

import os
import pathlib
import time
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from pipar_jax.disk import files
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.binary import wrong_use
from pipar_jax.launch.pinning import run_pinned

if TYPE_CHECKING:
    from experiments.latency_data.collect import Layer
    from experiments.latency_data.timings import TimedLayer, Timings

_OUT = plain_flags.define_path("out", None, "File for the times (.npz).", required=True)
_VARIANTS = flags.DEFINE_list(
    "variants", [], "Variants to time; empty: all that this machine supports."
)
_NETWORKS = flags.DEFINE_list("networks", [], "Networks whose layers are timed; empty: all.")
_COMPILE = flags.DEFINE_boolean("compile", False, "Only compile; write nothing.")
_QUICK = flags.DEFINE_boolean("quick", False, "Only a few layers.")
_GPU = flags.DEFINE_boolean("gpu", False, "Time the GPU that jax finds here as well.")


def main(_: list[str]) -> None:
    """Collects and writes the times.

    Raises:
      PiparError: As ``gather_all``.
    """
    gather_all(_OUT.value)


def gather_all(path: pathlib.Path) -> None:
    """Times the selected variants and adds them to a file.

    Raises:
      ConfigError: A variant or network is unknown here, or the file has something else in it or
        cannot be written.
      DiskError: Writing the file failed.
      RunError: A process failed.
    """
    from experiments.latency_data import collect
    from experiments.latency_data.timings import TimedDevice, Timings

    files.check_target(path, f"--out={path}")
    _kept(path)
    known = {variant.name: variant for variant in collect.variants(_GPU.value)}
    names = _VARIANTS.value or list(known)
    if wrong := [name for name in names if name not in known]:
        raise ConfigError(f"--variants={wrong[0]}: this machine supports {', '.join(known)}")
    wanted, timed_layers = run_pinned(_layers, _QUICK.value, variables={"JAX_PLATFORMS": "cpu"})
    networks = list(dict.fromkeys(one.network for one in wanted))
    if wrong := [name for name in _NETWORKS.value if name not in networks]:
        raise ConfigError(f"--networks={wrong[0]} is not among {', '.join(networks)}")
    chosen = [i for i, one in enumerate(wanted) if one.network in (_NETWORKS.value or networks)]
    wanted = [wanted[i] for i in chosen]
    timed_layers = tuple(timed_layers[i] for i in chosen)
    for name in names:
        began_s = time.monotonic()

        def tell(done: int, total: int, name: str = name, began_s: float = began_s) -> None:
            if done % 20 == 0 or done == total:
                print(f"{name}: {done}/{total} layers, {time.monotonic() - began_s:.0f} s")

        found = collect.gather(known[name], wanted, compile_only=_COMPILE.value, tell=tell)
        if _COMPILE.value:
            continue
        devices = tuple(TimedDevice(*one) for one in found.devices)
        made = Timings(devices, timed_layers, found.forward_s, found.backward_s)
        if (kept := _kept(path)) is not None:
            made = kept.join(made)
        made.save(path)
        seconds = np.nansum(found.forward_s + found.backward_s, axis=1)
        for device, total_s in zip(devices, seconds, strict=True):
            print(f"{device.name} ({device.family}): {total_s:.2f} s for all layers once")


def _kept(path: pathlib.Path) -> Timings | None:
    """Returns the times that a file has already; None: there is no file.

    Raises:
      ConfigError: It has something else, or cannot be read.
    """
    from experiments.latency_data.timings import Timings

    if not os.path.isfile(path):
        return None
    with wrong_use():
        return Timings.load(path)


def _layers(quick: bool) -> tuple[list[Layer], tuple[TimedLayer, ...]]:
    """Returns what is to be timed, and what it does; in a process that may load jax."""
    from experiments.latency_data import collect
    from experiments.latency_data.timings import layer
    from pipar_jax.profiling.predictor.operators import TRACED, model_operators

    wanted = collect.layers(quick)
    known = {
        name: model_operators(collect.build(name), None, TRACED)
        for name in {one.network for one in wanted}
    }
    described = tuple(
        layer(*one, [each.at(one.batch) for each in known[one.network][one.unit]]) for one in wanted
    )
    return wanted, described


if __name__ == "__main__":
    plain_flags.run(main)
