"""Problems of the chain planner and their solutions, as values."""

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
      backward_s: Seconds of its backward, including the update.
      activation_bytes: Size of the layer's output for a batch.
      weight_bytes: Size of its weights.
    """

    forward_s: float
    backward_s: float
    activation_bytes: float = 0.0
    weight_bytes: float = 0.0


class Coding(NamedTuple):
    """The coding of a tensor on a link.

    Attributes:
      codec: Name of the codec.
      ratio: Bytes on the wire per byte of the tensor.
      s_per_byte: Seconds to encode and decode a byte of the tensor.
    """

    codec: str = "raw"
    ratio: float = 1.0
    s_per_byte: float = 0.0


class Pair(NamedTuple):
    """The codings of both tensors at a boundary.

    Attributes:
      activation: Coding of the activation.
      cotangent: Coding of the cotangent.
    """

    activation: Coding
    cotangent: Coding


@dataclasses.dataclass(frozen=True)
class Node:
    """A compute node.

    Attributes:
      name: The host's name.
      layers: Costs of each of the model's layers at speed 1.
      speed: Divisor of times.
      memory_bytes: Memory limit of its layers.
      up: Its link to the next node of the chain, whichever it is; owners have their own links.
      down: Its link from the next node.
    """

    name: str
    layers: tuple[Layer, ...]
    speed: float = 1.0
    memory_bytes: float = math.inf
    up: LinkModel = FREE_LINK
    down: LinkModel = FREE_LINK


@dataclasses.dataclass(frozen=True)
class DataOwner:
    """The device at both ends of a U-shaped chain; all owners are assumed to be equal.

    Attributes:
      layers: Costs of each of the model's layers.
      up: Its link to the nodes.
      down: Its link from the nodes.
      speed: Divisor of times.
    """

    layers: tuple[Layer, ...]
    up: LinkModel = FREE_LINK
    down: LinkModel = FREE_LINK
    speed: float = 1.0


@dataclasses.dataclass(frozen=True)
class ChainProblem:
    """A problem of the chain planner.

    Attributes:
      nodes: The nodes, in any order; a plan may leave some out.
      first: First layer on the nodes; those before it stay with the owner.
      stop: One past their last layer; those from it on stay with the owner, if there are any.
      owners: K, the number of owners that share the chain.
      micro_batches: Number of parts of a batch; only for ``step``.
      owner: Costs of the owner; None leaves the owner's cycle out.
      shared: Whether the owners share one copy of the weights on each node.
      in_flight: With shared weights, batches held at a time; 0 means all K.
      activation_codings: Candidate codings of activations, chosen for each boundary.
      cotangent_codings: Candidate codings of cotangents.
      any_order: Whether the order of the nodes may change.
    """

    nodes: tuple[Node, ...]
    first: int
    stop: int
    owners: int = 1
    owner: DataOwner | None = None
    micro_batches: int = 1
    shared: bool = False
    in_flight: int = 0
    activation_codings: tuple[Coding, ...] = (Coding(),)
    cotangent_codings: tuple[Coding, ...] = (Coding(),)
    any_order: bool = True

    def __post_init__(self) -> None:
        """Checks that the problem is consistent.

        Raises:
          PlanError: There is no node, no layer or no coding, tables differ in length, or a number
            is not valid.
        """
        if not self.nodes:
            raise PlanError("a chain needs at least one node")
        tables = [node.layers for node in self.nodes] + ([self.owner.layers] if self.owner else [])
        counts = sorted({len(table) for table in tables})
        if len(counts) > 1:
            raise PlanError(f"the hosts' profiles have different numbers of layers: {counts}")
        if not 0 <= self.first < self.stop <= counts[0]:
            raise PlanError(
                f"layers {self.first}:{self.stop} are not a valid range of this model's "
                f"{counts[0]} layers"
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
                raise PlanError(f"{name}s need at least one coding, such as raw")
            for coding in codings:
                if min(coding.ratio, coding.s_per_byte) < 0:
                    raise PlanError(
                        f"codec {coding.codec} of {name}s: ratio {coding.ratio} and "
                        f"{coding.s_per_byte} seconds per byte must not be negative"
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
      memory_bytes: Memory of its layers.
    """

    node: str
    first: int
    stop: int
    forward_s: float
    backward_s: float
    memory_bytes: float


class ChainPlan(NamedTuple):
    """A solution: an assignment of layers with its cost.

    Attributes:
      objective: The objective that was minimised.
      cost_s: Its value, in seconds per batch.
      stages: The nodes in chain order.
      cycle_s: Seconds from one owner's batch's start to its end, alone on the chain.
      pairs: Codings at each boundary, from that between the owner and the first node to that
        between the last node and the owner (unused if the model ends on the last node).
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
    """Checks the name of an objective.

    Raises:
      PlanError: There is no such objective.
    """
    if objective not in get_args(Objective):
        raise PlanError(
            f"there is no objective {objective!r}: use one of {', '.join(get_args(Objective))}"
        )
