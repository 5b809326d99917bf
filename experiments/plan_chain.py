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
import re
from typing import cast, get_args

from absl import flags
from rich.table import Table

from pipar_jax.cost_model.costs import FREE_LINK, LinkModel
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.binary import wrong_use
from pipar_jax.launch.plain_flags import list_of, positive
from pipar_jax.report.console import make_console
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


def _read_range(text: str) -> tuple[int, int]:
    """Reads FIRST:STOP."""
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise ValueError("write FIRST:STOP in whole numbers, such as 2:36")
    return int(match[1]), int(match[2])


def _read_rates(text: str) -> list[LinkModel]:
    """Reads UP/DOWN in Mbit/s."""
    if text.count("/") != 1:
        raise ValueError("write UP/DOWN in Mbit/s, such as 10/25")
    return [_read_rate(part) for part in text.split("/")]


def _read_rate(text: str) -> LinkModel:
    """Reads a rate in Mbit/s."""
    return LinkModel(positive(float)(text) * 1e6 / 8)


_PROFILE = plain_flags.define_path("profile", None, "Profile table (CSV).", required=True)
_DEVICE = flags.DEFINE_string("device", "VM", "Device in the table whose times the nodes have.")
_LAYERS = plain_flags.define(
    "layers", None, "FIRST:STOP, the layers on nodes.", _read_range, required=True
)
_SPEEDS = plain_flags.define(
    "speeds", [1.0], "Speed of each node; 2 halves the table's times.", list_of(positive(float))
)
_MEMORY = plain_flags.define(
    "memory_mb", [], "Memory of each node in MB; by default no limit.", list_of(positive(float))
)
_OBJECTIVE = flags.DEFINE_enum("objective", "steady", get_args(Objective), "Objective to minimise.")
_OWNERS = flags.DEFINE_integer("owners", 1, "Devices that share the chain.", lower_bound=1)
_MICRO = flags.DEFINE_integer("micro_batches", 1, "step: micro-batches per batch.", lower_bound=1)
_OWNER = flags.DEFINE_string(
    "owner", None, "Device in the table whose times the owners have; none: no cycle."
)
_OWNER_LINK = plain_flags.define(
    "owner_link", None, "An owner's link, UP/DOWN in Mbit/s.", _read_rates
)
_NODE_LINK = plain_flags.define(
    "node_mbps", FREE_LINK, "Rate between nodes in Mbit/s; by default no transfer time.", _read_rate
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "copy", ["copy", "shared"], "Weights of a node: a copy per owner, or shared."
)
_IN_FLIGHT = flags.DEFINE_integer(
    "in_flight", 0, "shared: batches in flight; 0: one per owner.", lower_bound=0
)
_RATIO = plain_flags.define(
    "codec_ratio", 1.0, "Bytes on the wire per byte of a tensor.", positive(float)
)
_ANY_ORDER = flags.DEFINE_boolean("any_order", True, "Whether the order of the nodes may change.")


def main(_: list[str]) -> None:
    """Prints the cheapest chain.

    Raises:
      ConfigError: The flags or the table are not valid.
      PlanError: There is no feasible chain.
    """
    with wrong_use():
        problem = _problem(read_profile(_PROFILE.value, _DEVICE.value))
    plan = plan_chain(problem, cast(Objective, _OBJECTIVE.value))
    _print(plan, problem)


def _problem(layers: tuple[Layer, ...]) -> ChainProblem:
    """Makes the problem of the flags.

    Raises:
      ConfigError: They do not fit each other.
      DataError: The table does not have the owner.
      PlanError: The problem is not valid.
    """
    first, stop = _LAYERS.value
    speeds, memory, link = _SPEEDS.value, _MEMORY.value, _NODE_LINK.value
    if memory and len(memory) != len(speeds):
        raise ConfigError(
            f"--memory_mb has {len(memory)} numbers and --speeds {len(speeds)}: give each node one"
        )
    owner = None
    if _OWNER.value:
        up, down = _OWNER_LINK.value or (FREE_LINK, FREE_LINK)
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
        first=first,
        stop=stop,
        owners=_OWNERS.value,
        owner=owner,
        micro_batches=_MICRO.value,
        shared=_WEIGHTS.value == "shared",
        in_flight=_IN_FLIGHT.value,
        activation_codings=(coding,),
        cotangent_codings=(coding,),
        any_order=_ANY_ORDER.value,
    )


def _print(plan: ChainPlan, problem: ChainProblem) -> None:
    """Prints the plan: cost and cuts, then the stage of each node."""
    forward_s = max(stage.forward_s for stage in plan.stages)
    backward_s = max(stage.backward_s for stage in plan.stages)
    console = make_console(110)
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
