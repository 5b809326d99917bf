"""A stage's weights on one host: for one device, or the one copy that devices share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pipar_jax.errors import RunError
from pipar_jax.training import optimizer
from pipar_jax.training.optimizer import CompiledOptimizer
from stages import MicroBatchContext, Stage

Variables = dict[str, dict[str, jax.Array]]


class Replica:
    """The variables, optimiser state and gradient accumulator of one stage.

    Every method dispatches one compiled function and returns at once; the results are ready later.

    Attributes:
      stage: The compiled stage.
      params: For each unit its weights.
      state: For each unit its batch statistics.
      opt_state: For each unit its optimiser state.
      accumulated: For each unit the gradient of the mini-batch so far.
    """

    def __init__(
        self,
        stage: Stage,
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        compiled: CompiledOptimizer,
    ) -> None:
        """Copies the variables of the stage's units: updates donate what they change.

        Args:
          stage: The stage.
          params: Weights of at least the stage's units.
          state: Batch statistics of at least the stage's units.
          compiled: The optimiser.
        """
        self.stage = stage
        self.params: Variables = {}
        self.state: Variables = {}
        self.load(params, state)
        init = compiled.transformation.init
        self.opt_state: dict[str, Any] = {unit: init(w) for unit, w in self.params.items()}
        self.accumulated = stage.zeros(self.params)
        self._update = compiled.update

    def load(self, params: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Replaces weights and batch statistics by copies of those given.

        A unit that is missing in ``state`` has no statistics, one missing in ``params`` no weights.

        Raises:
          RunError: A unit that has weights or statistics comes without them, or with others.
        """
        for unit in self.stage.unit_names:  # one by one, so that few are there twice
            for what, held, source in (
                ("weights", self.params, params),
                ("batch statistics", self.state, state),
            ):
                given = dict(source.get(unit, {}))
                if unit in held and given.keys() != held[unit].keys():
                    raise RunError(
                        f"unit {unit!r} came with {what} {sorted(given)}, expected "
                        f"{sorted(held[unit])}: do both hosts use the same model and version?"
                    )
                held[unit] = jax.tree.map(jnp.array, given)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        held = self.params, self.state, self.opt_state, self.accumulated
        return sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    def renew_anchor(self) -> None:
        """Tells the optimiser that a round begins with the weights as they are (FedProx)."""
        self.opt_state = optimizer.anchor(self.opt_state, self.params)

    def forward(self, x: jax.Array, draw: MicroBatchContext) -> tuple[jax.Array, Any]:
        """Returns the activation [micro-batch, …] and the residuals of a micro-batch."""
        y, residuals, self.state = self.stage.forward(self.params, self.state, x, draw)
        return y, residuals

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        """Accumulates a micro-batch's gradient and returns the input's cotangent.

        The first stage has none to give; its return value only tells when the gradient is ready.
        """
        given, self.accumulated = self.stage.backward(
            self.params, residuals, cotangent, self.accumulated
        )
        return given

    def loss(
        self, x: jax.Array, labels: jax.Array, draw: MicroBatchContext
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """Runs the last stage on a micro-batch: metrics, and the input's cotangent if any."""
        metrics, cotangent, self.accumulated, self.state = self.stage.loss(
            self.params, self.state, x, labels, draw, self.accumulated
        )
        return metrics, cotangent

    def update(self, scale: float = 1.0) -> jax.Array:
        """Takes one optimiser step; returns an array that is ready when the step is.

        Args:
          scale: What the gradient is multiplied by first.
        """
        if scale != 1.0:
            self.accumulated = _scaled(self.accumulated, scale)
        self.params, self.opt_state, self.accumulated = self._update(
            self.params, self.opt_state, self.accumulated
        )
        leaves: list[jax.Array] = jax.tree.leaves(self.params)
        return leaves[0] if leaves else jnp.zeros(())  # a stage may have nothing to learn

    def clear(self) -> None:
        """Begins a mini-batch's gradient anew."""
        del self.accumulated  # before there is another
        self.accumulated = self.stage.zeros(self.params)

    def lower_update(self) -> Any:
        """Returns the optimiser step, lowered: compiling it needs no second copy of the arrays."""
        update: Any = self._update
        return update.lower(*map(_shapes, (self.params, self.opt_state, self.accumulated)))


def _shapes(tree: Any) -> Any:
    """Returns a tree of shapes."""
    return jax.eval_shape(lambda same: same, tree)


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(gradient: Variables, scale: float) -> Variables:
    """Returns a gradient times a number."""
    scaled: Variables = jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), gradient)
    return scaled
