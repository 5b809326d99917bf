r"""Plans a chain of compute nodes from a profile table: the order of the nodes and the cuts.

  pipar plan_chain --profile=CSV --device=VM --layers=2:36 --speeds=1,2,2 \
      --objective=mpsl

Layers are counted from 0. --layers=FIRST:STOP leaves the layers before FIRST and from STOP on the
devices that own the data; a cut c separates layers < c from the rest. Objectives: mpsl, the
published one (longest forward plus longest backward of any node, without links); steady, the time
per batch of a full pipeline (node, link, or owner's cycle); accept, the longest stage or transfer;
step, the time per batch of a step of --micro_batches that starts and ends with an empty pipeline.
"""

import math
import sys
from collections.abc import Sequence
from typing import cast, get_args

from absl import flags
from rich.console import Console
from rich.table import Table

from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.tuner.chain_search import (
    ChainPlan,
    ChainProblem,
    Coding,
    DataOwner,
    Layer,
    Node,
    Objective,
    plan_chain,
    read_profile,
)

_PROFILE = plain_flags.define_path("profile", None, "Profile table (CSV).", required=True)
_DEVICE = flags.DEFINE_string("device", "VM", "Device in the table whose times the nodes have.")
_LAYERS = flags.DEFINE_string("layers", None, "FIRST:STOP, the layers on nodes.", required=True)
_SPEEDS = flags.DEFINE_list("speeds", ["1"], "Speed of each node; 2 halves the table's times.")
_MEMORY = flags.DEFINE_list("memory_mb", [], "Memory of each node in MB; empty: no limit.")
_OBJECTIVE = flags.DEFINE_enum("objective", "steady", get_args(Objective), "Objective to minimise.")
_OWNERS = flags.DEFINE_integer("owners", 1, "Devices that share the chain.", lower_bound=1)
_MICRO = flags.DEFINE_integer("micro_batches", 1, "step: micro-batches per batch.", lower_bound=1)
_OWNER = flags.DEFINE_string(
    "owner", None, "Device in the table whose times the owners have; none: no cycle."
)
_OWNER_LINK = flags.DEFINE_string("owner_link", None, "An owner's link, UP/DOWN in Mbit/s.")
_NODE_LINK = flags.DEFINE_float(
    "node_mbps", None, "Rate between nodes in Mbit/s; none: no transfer time."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "copy", ["copy", "shared"], "Weights of a node: a copy per owner, or shared."
)
_IN_FLIGHT = flags.DEFINE_integer("in_flight", 0, "shared: batches in flight; 0: one per owner.")
_RATIO = flags.DEFINE_float("codec_ratio", 1.0, "Bytes on the wire per byte of a tensor.")
_ANY_ORDER = flags.DEFINE_boolean("any_order", True, "Whether the order of the nodes may change.")


def main(_: list[str]) -> None:
    """Prints the cheapest chain.

    Raises:
      PiparError: The flags or the table are not valid, or there is no feasible chain.
    """
    layers = read_profile(_PROFILE.value, _DEVICE.value)
    problem = _problem(layers)
    plan = plan_chain(problem, cast(Objective, _OBJECTIVE.value))
    _print(plan, problem)


def _problem(layers: tuple[Layer, ...]) -> ChainProblem:
    """Reads the problem from the flags."""
    first, stop = _numbers("layers", _LAYERS.value.split(":"), 2)
    speeds = _numbers("speeds", _SPEEDS.value)
    memory = _numbers("memory_mb", _MEMORY.value, len(speeds)) if _MEMORY.value else []
    link = LinkModel(_NODE_LINK.value * 1e6 / 8) if _NODE_LINK.value else LinkModel()
    owner = None
    if _OWNER.value:
        rates = _numbers("owner_link", _OWNER_LINK.value.split("/"), 2) if _OWNER_LINK.value else []
        up, down = [LinkModel(rate * 1e6 / 8) for rate in rates] or [LinkModel(), LinkModel()]
        owner = DataOwner(read_profile(_PROFILE.value, _OWNER.value), up, down)
    elif _OWNER_LINK.value:
        raise ConfigError("--owner_link has no effect without --owner")
    if _IN_FLIGHT.value and _WEIGHTS.value == "copy":
        raise ConfigError(
            "--in_flight needs --weights=shared: with copies each owner has one batch in flight"
        )
    if _MICRO.value > 1 and _OBJECTIVE.value != "step":
        raise ConfigError("--micro_batches is only for --objective=step")
    coding = Coding(f"ratio {_RATIO.value:g}", _RATIO.value)
    return ChainProblem(
        nodes=tuple(
            Node(f"node{i + 1}", layers, speed, memory[i] * 1e6 if memory else math.inf, link, link)
            for i, speed in enumerate(speeds)
        ),
        first=int(first),
        stop=int(stop),
        owners=_OWNERS.value,
        owner=owner,
        micro_batches=_MICRO.value,
        shared=_WEIGHTS.value == "shared",
        in_flight=_IN_FLIGHT.value,
        activation_codings=(coding,),
        cotangent_codings=(coding,),
        any_order=_ANY_ORDER.value,
    )


def _numbers(flag: str, texts: Sequence[str], count: int | None = None) -> list[float]:
    """Reads a flag's numbers.

    Raises:
      ConfigError: A part is not a number, or their count is not as needed.
    """
    try:
        numbers = [float(text) for text in texts]
    except ValueError as error:
        raise ConfigError(f"--{flag}: {error}") from error
    if count is not None and len(numbers) != count:
        raise ConfigError(f"--{flag} needs {count} numbers, got {len(numbers)}")
    return numbers


def _print(plan: ChainPlan, problem: ChainProblem) -> None:
    """Prints the plan: cost and cuts, then the stage of each node."""
    forward_s = max(stage.forward_s for stage in plan.stages)
    backward_s = max(stage.backward_s for stage in plan.stages)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(
        f"{plan.objective}: {plan.cost_s * 1e3:.3f} ms per batch "
        f"(longest forward {forward_s * 1e3:.3f}, longest backward {backward_s * 1e3:.3f})"
    )
    console.print(f"cuts: {', '.join(map(str, plan.cuts)) or 'none'}")
    if problem.owner is not None:
        console.print(f"one owner's cycle: {plan.cycle_s * 1e3:.3f} ms")
    table = Table("node", "layers", *(
        f"{name}" for name in ("forward ms", "backward ms", "memory MB")
    ))  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for stage in plan.stages:
        table.add_row(
            stage.node, f"{stage.first}:{stage.stop}", f"{stage.forward_s * 1e3:.3f}",
            f"{stage.backward_s * 1e3:.3f}", f"{stage.memory_bytes / 1e6:.1f}",
        )  # fmt: skip
    console.print(table)
    layers = problem.nodes[0].layers[problem.first : problem.stop]
    if missing := sum(not (layer.forward_s and layer.backward_s) for layer in layers):
        console.print(
            f"note: {missing} of these layers have no measured forward or backward in the table; "
            "they count as 0 ms"
        )


if __name__ == "__main__":
    plain_flags.run(main)
