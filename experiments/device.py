r"""Runs one device of an experiment by hand, on the machine that has its data.

Start it with the same preset and overrides as the server, and its own index from 0:

  pipar device --config=cifar10_vgg5 --server=192.0.2.7:7000 --index=0 \
      --config.network.token=env:PIPAR_SECRET

The server may start later: a device tries for network.join_timeout_s seconds.
"""

import dataclasses
import pathlib

import configs
from pipar_jax.config import Config
from pipar_jax.config.schema import option
from pipar_jax.errors import ConfigError
from pipar_jax.launch import flags, machine, process
from pipar_jax.report import logs
from pipar_jax.schedule.plan import device_name


@dataclasses.dataclass
class DeviceFlags:
    """The flags of this binary."""

    server: str = option("", "address of the server, HOST:PORT")
    index: int = option(-1, "which device this is, counted from 0", at_least=0)


def main(config: Config, given: DeviceFlags) -> None:
    """Runs a device's role in this process.

    Raises:
      PiparError: The flags do not fit the configuration, or the run failed.
    """
    address = flags.parse_address(given.server, "server")
    if not 0 <= given.index < config.devices.count:
        raise ConfigError(
            f"--index={given.index} does not fit: devices.count={config.devices.count}, so a "
            f"device's index is 0 to {config.devices.count - 1}"
        )
    logs.begin()
    name = device_name(given.index)
    machine.check(config, [name])
    process.set_environment(config, name)
    process.claim_platform(config, name)
    from pipar_jax.roles.worker import run_device  # loads jax, whose environment is set now

    print(f"device {given.index} of {config.devices.count} joins {given.server}", flush=True)
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
