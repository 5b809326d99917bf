"""What compute nodes alone have, as it last came to the coordinator: what is left of lost nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.config import Config
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol.values import EVERY
from pipar_jax.runtime import exchanges, unit_state
from pipar_jax.runtime.moves import holders
from pipar_jax.runtime.unit_state import Key, States, Tensors, UnitState, Wanted
from pipar_jax.schedule.plan import Plan, is_node
from pipar_jax.training import optimizer


class Salvaged(NamedTuple):
    """What is left of a unit that was on a lost node.

    Attributes:
      unit: Its name.
      rounds: How many rounds its weights contain.
      optimizer_rounds: How many rounds its optimiser state contains; None if it begins anew.
    """

    unit: str
    rounds: int
    optimizer_rounds: int | None


class NodeCopies:
    """Keeps copies of what lives on compute nodes.

    Weights, statistics and states of the rule are the aggregator's; optimiser states are here.

    Args:
      config: Resolved configuration.
      names: The model's units in order.
      aggregator: The coordinator's, with the weights that the run begins with.
      rounds: How many rounds they contain.
    """

    def __init__(
        self, config: Config, names: Sequence[str], aggregator: Aggregator, rounds: int
    ) -> None:
        self._every, self._kept = config.nodes.replicate_every, hosts_of(config).may_lose_nodes
        self._names, self._aggregator = names, aggregator
        self._tx = optimizer.build(
            config.optimizer, steps=optimizer.MANY_STEPS, proximal_mu=config.aggregation.proximal_mu
        )
        self._rounds = dict.fromkeys(names, rounds)
        self._optimizers: dict[Key, tuple[int, UnitState]] = {}

    def are_due(self, rounds: int) -> bool:
        """Returns whether copies are due after so many rounds."""
        return self._every > 0 and rounds % self._every == 0

    def wanted(self, plan: Plan, node: str, *, optimizers: bool) -> Wanted:
        """Returns what is pulled from a node between two rounds.

        Args:
          plan: The plan in force.
          node: The node.
          optimizers: Whether its optimiser states are wanted, too.
        """
        kept = exchanges.kept(plan, node, self._names, rule=self._kept)
        if not optimizers:
            return kept
        return exchanges.joined(kept, exchanges.optimizer_states(plan, node, self._names))

    def take(self, states: Mapping[Key, UnitState], rounds: int, where: str) -> None:
        """Takes over what a node has brought.

        Args:
          states: Its states.
          rounds: How many rounds they contain.
          where: The node, for the message.

        Raises:
          RunError: A state of the rule does not fit.
        """
        whole = {key: one for key, one in states.items() if key[0] == EVERY}
        unit_state.take(self._aggregator, whole, where)
        for (copy, unit), one in states.items():
            if one.params is not None:
                self._rounds[unit] = rounds
            if one.opt is not None and self._kept:
                self._optimizers[copy, unit] = rounds, UnitState(opt=one.opt)

    def rounds(self, keys: Sequence[Key]) -> int:
        """Returns how many rounds the weights of some units contain at most."""
        return max((self._rounds[unit] for _, unit in keys), default=0)

    def optimizer(self, key: Key) -> UnitState:
        """Returns the optimiser state of a copy of a unit whose host is gone."""
        if key in self._optimizers:
            return self._optimizers[key][1]
        return UnitState(opt=self._tx.init(dict(self._aggregator.params[key[1]])))

    def salvaged(self, keys: Sequence[Key]) -> tuple[Salvaged, ...]:
        """Returns what is left of some copies of units, each unit once, in the model's order."""
        found: dict[str, Salvaged] = {}
        for copy, unit in sorted(keys, key=lambda key: self._names.index(key[1])):
            known = self._optimizers.get((copy, unit))
            found[unit] = Salvaged(unit, self._rounds[unit], None if known is None else known[0])
        return tuple(found.values())

    # --- in a checkpoint ----------------------------------------------------------------------

    def optimizers(self, plan: Plan) -> States:
        """Returns the copies of optimiser states of what nodes have under a plan."""
        on_nodes = {
            (copy, self._names[unit])
            for (copy, unit), host in holders(plan, len(self._names)).items()
            if is_node(host)
        }
        return {key: one for key, (_, one) in self._optimizers.items() if key in on_nodes}

    def facts(self, plan: Plan) -> JsonObject:
        """Returns how many rounds the copies contain, JSON-ready; weights are by unit."""
        keys = self.optimizers(plan)
        return {
            "weights": dict(self._rounds),
            "optimizers": [[*key, self._optimizers[key][0]] for key in keys],
        }

    def recall(self, facts: Mapping[str, Any], tensors: Tensors) -> None:
        """Takes up the copies that a checkpoint has; the weights are in the aggregator.

        Args:
          facts: What ``facts`` returned then.
          tensors: The arrays of the checkpoint.
        """
        self._rounds |= facts["weights"]
        rounds = {(copy, unit): number for copy, unit, number in facts["optimizers"]}
        wanted: Wanted = {key: ("opt",) for key in rounds}
        kept = unit_state.unpack(tensors, wanted)
        self._optimizers = {key: (rounds[key], one) for key, one in kept.items()}
