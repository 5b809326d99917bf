r"""Runs one compute node of a chain on this machine, for runs over several machines.

Start it with the same preset and overrides as the server, its own index, counted from 1, and the
address at which its neighbours in the chain reach it:

  pipar node --config=cifar10_resnet18_mpsl --server=192.0.2.7:7000 --index=1 \
      --config.nodes.1.host=192.0.2.21 --config.network.token=env:TOKEN

The server may start later: the node retries for network.join_timeout_s seconds.
"""

import dataclasses
import pathlib

import configs
from pipar_jax.config import Config
from pipar_jax.config.schema import option
from pipar_jax.errors import ConfigError
from pipar_jax.launch import flags, take_part
from pipar_jax.report import logs
from pipar_jax.schedule.plan import node_name


@dataclasses.dataclass
class NodeFlags:
    """Flags of this binary."""

    server: str = option("", "address of the server, HOST:PORT")
    index: int = option(0, "index of the node, counted from 1", at_least=0)


def main(config: Config, given: NodeFlags) -> None:
    """Runs a compute node in this process.

    Raises:
      PiparError: The flags are not valid for the configuration, or the run failed.
    """
    address = flags.parse_address(given.server, "--server")
    if not config.nodes.count:
        raise ConfigError(
            f"--index={given.index} is not valid: this configuration has no compute nodes "
            "(nodes.count=0); name one that has, such as --config=cifar10_resnet18_mpsl"
        )
    if not 1 <= given.index <= config.nodes.count:
        raise ConfigError(
            f"--index={given.index} is not valid: nodes.count={config.nodes.count}, so the index "
            f"must be 1 to {config.nodes.count}"
        )
    logs.begin()
    take_part.prepare(config, node_name(given.index))
    from pipar_jax.roles.participants import run_node  # loads jax, whose environment is now set

    print(f"node {given.index} of {config.nodes.count} joins {given.server}", flush=True)
    run_node(config, given.index, address)
    print("done", flush=True)


if __name__ == "__main__":
    flags.run(
        main,
        NodeFlags,
        doc=__doc__,
        name="node",
        presets=pathlib.Path(configs.__file__).parent,
    )
