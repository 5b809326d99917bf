"""The demo: trains scikit-learn's digits by FL, SL, SFL and PiPar and compares them in a table.

One server process and two device processes on this machine communicate over TCP. Devices are slowed
down and links shaped to resemble edge devices behind 4G+; all methods use the same data and start
from the same weights. Without flags the preset quickstart runs, in less than three minutes on two
cores; each of its fields is a flag. To compare methods on another preset: pipar compare.
"""

import dataclasses
import pathlib

import configs
from comms.emulation.shaping import parse_link
from pipar_jax.config import Config, DeviceConfig, DevicesConfig, ServerConfig
from pipar_jax.config.schema import option
from pipar_jax.launch import compare, flags
from pipar_jax.launch.pinning import first_cores
from pipar_jax.methods.registry import server_methods
from pipar_jax.report import comparison
from pipar_jax.report.console import make_console


@dataclasses.dataclass
class Extra:
    """Flags of this binary."""

    methods: str = option(
        ",".join(server_methods()), "methods to compare, in this order, separated by commas"
    )


def describe(source: str, model: str, devices: DevicesConfig) -> str:
    """Returns a text that states what is real and what is emulated in this setting."""
    device = devices.defaults
    up, down = parse_link(device.link)
    rates = " and ".join(
        f"{shape.rate_mbps:g} Mbit/s {way}" if shape.rate_mbps else f"no limit {way}"
        for shape, way in ((up, "up"), (down, "down"))
    )
    return (
        f"Real: {source} images, the network {model}, training, and "
        f"{devices.count + 1} processes that communicate over TCP.\n"
        "Emulated, to resemble edge devices: the compute time of each device is that of a core of "
        f"this machine multiplied by {device.slowdown:g}, and its link is {device.link} ({rates})."
    )


def place(server: ServerConfig, device: DeviceConfig) -> None:
    """Pins the server to one core and the devices, which mostly wait, to another, by default."""
    cores = first_cores(2)
    if len(cores) == 2 and not server.cpus and not device.cpus:
        server.cpus, device.cpus = map(str, cores)


def main(config: Config, extra: Extra) -> None:
    """Trains by each method, prints the table and writes the report.

    Raises:
      PiparError: A method does not fit the setting, or a run failed.
    """
    methods = comparison.choose_methods(config, extra.methods)
    place(config.server, config.devices.defaults)
    compare.check(config, methods)
    console = make_console(compare.PLAIN_WIDTH)
    about = describe(config.data.source, config.model.name, config.devices)
    console.print(f"{about}\n")
    compare.compare(config, methods, console)


if __name__ == "__main__":
    flags.run(
        main,
        Extra,
        doc=__doc__,
        name="quickstart",
        presets=pathlib.Path(configs.__file__).parent,
        preset="quickstart",
    )
