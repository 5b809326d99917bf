"""The demo: trains scikit-learn's digits by FL, SL, SFL and PiPar and compares them in a table.

One server process and two device processes on this machine talk over TCP. Devices are slowed down
and links shaped, so that the setting resembles edge devices behind 4G+; all methods see the same
data and start from the same weights. Without flags it runs the preset quickstart, in less than
three minutes on two cores; every field of it is a flag.
"""

import dataclasses
import pathlib
import sys
import time

from rich.console import Console

import configs
from comms.emulation.shaping import parse_link
from pipar_jax.config import SERVER_METHODS, Config
from pipar_jax.config.paths import shown
from pipar_jax.config.schema import option
from pipar_jax.launch import flags, launcher, machine
from pipar_jax.launch.pinning import first_cores
from pipar_jax.report import comparison, write_report
from pipar_jax.report.comparison import Outcome
from pipar_jax.report.progress import Progress

PLAIN_WIDTH = 100


@dataclasses.dataclass
class Extra:
    """The demo's own flags."""

    methods: str = option(",".join(SERVER_METHODS), "methods to compare, in this order")


def describe(config: Config) -> str:
    """Returns what is real and what is emulated in this setting, in plain words."""
    device = config.devices.defaults
    up, down = parse_link(device.link)
    rates = " and ".join(
        f"{shape.rate_mbps:g} Mbit/s {way}" if shape.rate_mbps else f"no limit {way}"
        for shape, way in ((up, "up"), (down, "down"))
    )
    return (
        f"Real: {config.data.source} images, the network {config.model.name}, training, and "
        f"{config.devices.count + 1} processes that talk over TCP.\n"
        f"Emulated, to resemble edge devices: each device computes {device.slowdown:g} times slower"
        f" than a core of this machine, and its link is {device.link} ({rates})."
    )


def place(config: Config) -> None:
    """Gives the server one core and the devices, which mostly wait, another, if nobody chose."""
    cores = first_cores(2)
    if len(cores) == 2 and not config.server.cpus and not config.devices.defaults.cpus:
        config.server.cpus, config.devices.defaults.cpus = map(str, cores)


def main(config: Config, extra: Extra) -> None:
    """Trains by each method and prints the table.

    Raises:
      PiparError: A run failed.
    """
    methods = comparison.parse_methods(extra.methods)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    machine.check(config, machine.all_hosts(config))
    place(config)
    console.print(f"{describe(config)}\n")
    began_s = time.monotonic()
    outcomes: list[Outcome] = []
    for number, method in enumerate(methods, start=1):
        head = f"{number}/{len(methods)} {comparison.title(method)}"
        with Progress(head) as progress:
            outcome = comparison.run_method(config, method, launcher.launch, progress)
        outcomes.append(outcome)
        console.print(
            f"{head}: {outcome.epoch_s:.2f} s per epoch, test accuracy {outcome.accuracy:.1%}"
        )
    console.print()
    console.print(comparison.make_table(outcomes))
    console.print(comparison.conclude(outcomes))
    report = pathlib.Path(config.run.dir) / f"{config.name}.html"
    write_report([pathlib.Path(outcome.folder) for outcome in outcomes], report)
    console.print(
        f"Took {time.monotonic() - began_s:.0f} s. Look at {shown(report)} in a browser; the runs "
        f"are in {', '.join(shown(outcome.folder) for outcome in outcomes)}."
    )


if __name__ == "__main__":
    flags.run(
        main,
        Extra,
        doc=__doc__,
        name="quickstart",
        presets=pathlib.Path(configs.__file__).parent,
        preset="quickstart",
    )
