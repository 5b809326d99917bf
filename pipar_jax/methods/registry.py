"""Every method as a value: its name, its plan, and all else that is asked of it.

The engine never sees a method, only the plan that it makes. A new method is a function from
configuration to plan in ``plans`` and an entry here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pipar_jax.config import AUTO, Config, Hosts, PipelineConfig
from pipar_jax.errors import ConfigError
from pipar_jax.methods import plans
from pipar_jax.schedule.plan import Order, Plan


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
      name: Its name in configurations.
      title: Its name in the literature.
      plan: From a resolved configuration and the names of the model's units to the plan.
      cuts: Whether it cuts the model.
      order: Whether devices train in parallel or one after another.
      pipelined: Whether it cuts mini-batches into micro-batches.
      uses_nodes: Whether stages run on compute nodes: all devices then share one chain of them.
      one_device: Whether it trains on the data of one device, which is a host like the nodes.
      labels_home: Whether the last stage, and so the labels, may stay on the device.
    """

    name: str
    title: str
    plan: Callable[[Config, Sequence[str]], Plan]
    cuts: bool = True
    order: Order = Order.PARALLEL
    pipelined: bool = False
    uses_nodes: bool = False
    one_device: bool = False
    labels_home: bool = False

    def makes(self, *, order: Order, cuts: bool, micro_batches: int) -> bool:
        """Returns whether such plans between devices and server are this method's.

        Args:
          order: The plan's order.
          cuts: Whether the model is cut.
          micro_batches: Micro-batches in a mini-batch.
        """
        pipelined = cuts and micro_batches > 1
        traits = (self.order, self.cuts, self.pipelined, self.uses_nodes)
        return traits == (order, cuts, pipelined, False)

    def keeps_labels(self, pipeline: PipelineConfig) -> bool:
        """Returns whether the last stage stays on the device."""
        return self.labels_home and pipeline.labels == "home"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("fl", "FL", plans.federated, cuts=False),
        Method("sl", "SL", plans.split_learning_plan, order=Order.SEQUENTIAL),
        Method("sfl", "SFL", plans.split_federated),
        Method("pipar", "PiPar", plans.pipar, pipelined=True),
        Method("mpsl", "MP-SL", plans.mpsl_plan, pipelined=True, uses_nodes=True, labels_home=True),
        Method(
            "accept", "AccEPT", plans.accept_plan, pipelined=True, uses_nodes=True, one_device=True
        ),
    )
}


def server_methods() -> tuple[str, ...]:
    """Returns the names of the methods that need no more hosts than devices and a server."""
    return tuple(name for name, method in METHODS.items() if not method.uses_nodes)


def in_turns() -> tuple[str, ...]:
    """Returns the names of the methods whose devices train one after another: none averages."""
    return tuple(name for name, method in METHODS.items() if method.order == Order.SEQUENTIAL)


def node_methods() -> tuple[str, ...]:
    """Returns the names of the methods whose stages run on compute nodes."""
    return tuple(name for name, method in METHODS.items() if method.uses_nodes)


def title(name: str) -> str:
    """Returns what the literature calls a method; of an unknown one its name."""
    return METHODS[name].title if name in METHODS else name


def uses_nodes(method: str) -> bool:
    """Returns whether compute nodes take part; with method=auto none do."""
    return method in METHODS and METHODS[method].uses_nodes


def hosts_of(config: Config) -> Hosts:
    """Returns the hosts that take part in a run."""
    return Hosts(config, nodes=config.nodes.count if uses_nodes(config.method) else 0)


def is_planned(method: str, pipeline: PipelineConfig) -> bool:
    """Returns whether the plan is the tuner's or the chain planner's to find."""
    return method == AUTO or (uses_nodes(method) and not pipeline.cuts)


def plan_for(config: Config, units: Sequence[str]) -> Plan:
    """Returns the plan of the configured method.

    Args:
      config: A resolved configuration.
      units: Names of the model's units, in order.

    Raises:
      ConfigError: A cut is not a position in this model, or the tuner has to choose the plan.
    """
    if config.method == AUTO:
        raise ConfigError(
            "method=auto has no plan before its hosts are measured: use the tuner, or choose one "
            f"of {', '.join(METHODS)}"
        )
    return METHODS[config.method].plan(config, units)
