r"""Runs one device of a run on this machine, for runs over several machines.

Start it on the machine with the device's data, with the same preset and overrides as the server and
its own index, counted from 0:

  pipar device --config=cifar10_vgg5 --server=192.0.2.7:7000 --index=0 \
      --config.network.token=env:TOKEN

The server may start later: the device retries for network.join_timeout_s seconds.
"""

import dataclasses
import pathlib

import configs
from pipar_jax.config import Config
from pipar_jax.config.schema import option
from pipar_jax.launch import flags, take_part
from pipar_jax.report import logs
from pipar_jax.schedule.plan import device_name


@dataclasses.dataclass
class DeviceFlags:
    """Flags of this binary."""

    server: str = option("", "address of the server, HOST:PORT")
    index: int = option(-1, "index of the device, counted from 0", at_least=0)


def main(config: Config, given: DeviceFlags) -> None:
    """Runs a device in this process.

    Raises:
      PiparError: The flags are not valid for the configuration, or the run failed.
    """
    address = flags.parse_address(given.server, "--server")
    take_part.check_device(config, given.index, "--index")
    logs.begin()
    take_part.prepare(config, device_name(given.index))
    from pipar_jax.roles.participants import run_device  # loads jax, whose environment is now set

    print(f"device {given.index} of {config.devices.total} joins {given.server}", flush=True)
    run_device(config, given.index, address)
    print("done", flush=True)


if __name__ == "__main__":
    flags.run(
        main,
        DeviceFlags,
        doc=__doc__,
        name="device",
        presets=pathlib.Path(configs.__file__).parent,
    )
