r"""Runs one compute node of a chain by hand, on the machine that lends its processor.

Start it with the same preset and overrides as the server, its own index from 1, and the address at
which its neighbours in the chain reach it:

  pipar node --config=cifar10_resnet18_mpsl --server=192.0.2.7:7000 --index=1 \
      --config.nodes.1.host=192.0.2.21 --config.network.token=env:PIPAR_SECRET

The server may start later: a node tries for network.join_timeout_s seconds.
"""

import dataclasses
import pathlib

import configs
from pipar_jax.config import Config
from pipar_jax.config.schema import option
from pipar_jax.errors import ConfigError
from pipar_jax.launch import flags, machine, process
from pipar_jax.report import logs
from pipar_jax.schedule.plan import node_name


@dataclasses.dataclass
class NodeFlags:
    """The flags of this binary."""

    server: str = option("", "address of the server, HOST:PORT")
    index: int = option(0, "which node this is, counted from 1", at_least=0)


def main(config: Config, given: NodeFlags) -> None:
    """Runs a compute node's role in this process.

    Raises:
      PiparError: The flags do not fit the configuration, or the run failed.
    """
    address = flags.parse_address(given.server, "server")
    if not config.nodes.count:
        raise ConfigError(
            f"--index={given.index} does not fit: this configuration has no compute nodes "
            "(nodes.count=0); name one that has, such as --config=cifar10_resnet18_mpsl"
        )
    if not 1 <= given.index <= config.nodes.count:
        raise ConfigError(
            f"--index={given.index} does not fit: nodes.count={config.nodes.count}, so a node's "
            f"index is 1 to {config.nodes.count}"
        )
    logs.begin()
    name = node_name(given.index)
    machine.check(config, [name])
    process.set_environment(config, name)
    process.claim_platform(config, name)
    from pipar_jax.roles.worker import run_node  # loads jax, whose environment is set now

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
