"""What a chain planner is asked and what it answers, as values."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

from pipar_jax.cost_model.costs import FREE_LINK, LinkModel
from pipar_jax.errors import PlanError

Objective = Literal["mpsl", "steady", "accept", "step"]


class Layer(NamedTuple):
    """One row of a profile table.

    Attributes:
      forward_s: Seconds of a batch's forward.
      backward_s: Seconds of its backward, the update included.
      activation_bytes: Size of the layer's output for a batch.
      weight_bytes: Size of its weights.
    """

    forward_s: float
    backward_s: float
    activation_bytes: float = 0.0
    weight_bytes: float = 0.0


class Coding(NamedTuple):
    """A way to send a tensor.

    Attributes:
      codec: Name of the codec.
      ratio: Bytes on the wire per byte of the tensor.
      s_per_byte: Seconds to encode and decode a byte of the tensor.
    """

    codec: str = "raw"
    ratio: float = 1.0
    s_per_byte: float = 0.0


class Pair(NamedTuple):
    """How both tensors cross a boundary.

    Attributes:
      activation: The one that goes up the chain.
      cotangent: The one that comes back.
    """

    activation: Coding
    cotangent: Coding


@dataclasses.dataclass(frozen=True)
class Node:
    """A compute node.

    Attributes:
      name: The host's name.
      layers: What each of the model's layers costs there at speed 1.
      speed: Times are divided by this.
      memory_bytes: What its layers may take together.
      up: Its link to the next node of the chain, whichever that is; owners have links of their own.
      down: Its link from the next node.
    """

    name: str
    layers: tuple[Layer, ...]
    speed: float = 1.0
    memory_bytes: float = math.inf
    up: LinkModel = FREE_LINK
    down: LinkModel = FREE_LINK


@dataclasses.dataclass(frozen=True)
class Owner:
    """The device at both ends of a U-shaped chain; all owners are taken to be alike.

    Attributes:
      layers: What each of the model's layers costs on it.
      up: Its link to the nodes.
      down: Its link from the nodes.
      speed: Times are divided by this.
    """

    layers: tuple[Layer, ...]
    up: LinkModel = FREE_LINK
    down: LinkModel = FREE_LINK
    speed: float = 1.0


@dataclasses.dataclass(frozen=True)
class ChainProblem:
    """What is to be planned.

    Attributes:
      nodes: The nodes, in any order; a plan may leave some out.
      first: First layer on the nodes; those before it stay with the owner.
      stop: One past their last layer; those from it on stay with the owner, if there are any.
      owners: K, how many owners share the chain.
      micro_batches: How many parts of a batch follow one another; counts in ``step`` alone.
      owner: What the owner's parts cost; None leaves the owner's cycle out.
      shared: Whether the owners share one copy of the weights on each node.
      in_flight: With shared weights, batches held at a time; 0 means all K.
      activation_codings: Ways to send activations; every boundary takes the best for itself.
      cotangent_codings: The same for cotangents.
      any_order: Whether nodes may be put in another order than given.
    """

    nodes: tuple[Node, ...]
    first: int
    stop: int
    owners: int = 1
    owner: Owner | None = None
    micro_batches: int = 1
    shared: bool = False
    in_flight: int = 0
    activation_codings: tuple[Coding, ...] = (Coding(),)
    cotangent_codings: tuple[Coding, ...] = (Coding(),)
    any_order: bool = True

    def __post_init__(self) -> None:
        """Checks that the parts fit together.

        Raises:
          PlanError: There is no node, no layer to deal out or no way to send a tensor, tables
            differ in length, or a number is impossible.
        """
        if not self.nodes:
            raise PlanError("a chain needs at least one node")
        tables = [node.layers for node in self.nodes] + ([self.owner.layers] if self.owner else [])
        counts = sorted({len(table) for table in tables})
        if len(counts) > 1:
            raise PlanError(f"the hosts' profiles have different numbers of layers: {counts}")
        if not 0 <= self.first < self.stop <= counts[0]:
            raise PlanError(
                f"layers {self.first}:{self.stop} are no range of this model's {counts[0]} layers"
            )
        if self.owner is not None and self.first == 0:
            raise PlanError(
                "the owner of a U-shaped chain keeps at least the first layer: let the nodes' "
                "layers begin at 1 or later"
            )
        speeds = [node.speed for node in self.nodes] + ([self.owner.speed] if self.owner else [])
        if min(self.owners, self.micro_batches) < 1 or self.in_flight < 0 or min(speeds) <= 0:
            raise PlanError(
                f"owners={self.owners} and micro_batches={self.micro_batches} must be at least 1, "
                f"in_flight={self.in_flight} at least 0 and speeds {speeds} positive"
            )
        for name, codings in (("activation", self.activation_codings),
                              ("cotangent", self.cotangent_codings)):  # fmt: skip
            if not codings:
                raise PlanError(f"{name}s need at least one way to be sent, such as raw")
            for one in codings:
                if min(one.ratio, one.s_per_byte) < 0:
                    raise PlanError(
                        f"codec {one.codec} of {name}s: ratio {one.ratio} and {one.s_per_byte} "
                        "seconds per byte must not be negative"
                    )

    def memory_bytes(self, weight_bytes: float, activation_bytes: float) -> float:
        """Returns a node's memory: K(3W + A) with copies, 3W + cA shared, c in flight (or K)."""
        if self.shared:
            return 3 * weight_bytes + (self.in_flight or self.owners) * activation_bytes
        return self.owners * (3 * weight_bytes + activation_bytes)


class ChainStage(NamedTuple):
    """A node's part of a chain plan.

    Attributes:
      node: Its name.
      first: Its first layer.
      stop: One past its last layer.
      forward_s: Seconds of a batch's forward on it.
      backward_s: Seconds of its backward and update.
      memory_bytes: What its layers take.
    """

    node: str
    first: int
    stop: int
    forward_s: float
    backward_s: float
    memory_bytes: float


class ChainPlan(NamedTuple):
    """A way to deal the layers out, with its cost.

    Attributes:
      objective: What was minimised.
      cost_s: Its value, in seconds per batch.
      stages: The nodes in chain order.
      cycle_s: Seconds from one owner's batch's start to its end, alone on the chain.
      pairs: How tensors cross each boundary, from the owner's to the first node to that from the
        last node to the owner (which nothing crosses if the model ends on the last node).
    """

    objective: Objective
    cost_s: float
    stages: tuple[ChainStage, ...]
    cycle_s: float
    pairs: tuple[Pair, ...]

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions between nodes: a cut c separates layers < c from the rest."""
        return tuple(stage.first for stage in self.stages[1:])


def check_name(objective: str) -> None:
    """Checks that there is an objective of a name.

    Raises:
      PlanError: There is none.
    """
    if objective not in get_args(Objective):
        raise PlanError(
            f"there is no objective {objective!r}: use one of {', '.join(get_args(Objective))}"
        )
