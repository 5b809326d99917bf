"""The weights of a stage on one host: a copy for one device, or shared by all devices."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from comms.arrays import Array
from pipar_jax.errors import RunError
from pipar_jax.schedule.keep import Keep
from pipar_jax.training import optimizer
from pipar_jax.training.optimizer import CompiledOptimizer
from stages import MicroBatchContext, Stage
from stages.release import add_noise, bits_shape
from stages.trees import Arrays, OptState, PyTree, Targets

Variables = dict[str, dict[str, jax.Array]]


class Noise(NamedTuple):
    """The noise of a mini-batch's gradient.

    Attributes:
      bits: [3, pairs of weights] uint32 random bits; see ``stages.release.bits_shape``.
      deviation: Standard deviation of the noise.
    """

    bits: Array
    deviation: np.float32


class Replica:
    """The variables, optimiser state and gradient accumulator of one stage.

    Every method dispatches one compiled function and returns immediately; results are ready later.

    Attributes:
      stage: The compiled stage.
      params: Weights by unit.
      state: Batch statistics by unit.
      opt_state: Optimiser state by unit.
      accumulated: Gradient of the mini-batch so far, by unit; None before the first micro-batch
        of a step that has one only.
      fresh: Whether no micro-batch of the step is in it yet: what it holds is of another step.
      step: With Keep.STEP, the step that comes next.
      counts: Whether its loss is told how many samples of a micro-batch count.
    """

    def __init__(
        self,
        stage: Stage,
        params: Mapping[str, Mapping[str, PyTree]],
        state: Mapping[str, Mapping[str, PyTree]],
        compiled: CompiledOptimizer,
        keeps: Keep = Keep.NOTHING,
    ) -> None:
        """Copies the variables of the stage's units, since updates donate them.

        Args:
          stage: The stage.
          params: Weights of at least the stage's units.
          state: Batch statistics of at least the stage's units.
          compiled: The optimiser.
          keeps: What it keeps of earlier moments.
        """
        self.stage = stage
        self.step, self.counts = 0, False
        self.params: Variables = {}
        self.state: Variables = {}
        self.load(params, state)
        init = compiled.transformation.init
        self.opt_state: OptState = {unit: init(w) for unit, w in self.params.items()}
        self._single, self.fresh = False, True
        self.accumulated: Variables | None = stage.zeros(self.params)
        self._compiled, self._keeps = compiled, keeps
        self._each_step = Keep.STEP in keeps
        self._keeping = compiled.keeping_all if keeps.wholes else compiled.keeping_state
        # What it was at earlier moments, the last one behind the others.
        self._kept: collections.deque[tuple[Variables, Variables, OptState]] = collections.deque(
            maxlen=keeps.wholes
        )
        self._start: OptState | None = None  # the optimiser state of the round's start
        self._settled = self.state  # as the last step has left them
        # Whether the next step has to leave what it starts from as it is, since that is kept.
        self._held = False
        self._renewed = False  # since the last round began

    def load(
        self,
        params: Mapping[str, Mapping[str, PyTree]],
        state: Mapping[str, Mapping[str, PyTree]],
        units: Sequence[str] | None = None,
    ) -> None:
        """Replaces weights and batch statistics by copies of those given.

        A unit that is missing in ``state`` has no statistics, one missing in ``params`` no weights.
        Personal weights that are not given stay as they are.

        Args:
          params: Weights by unit.
          state: Batch statistics by unit.
          units: Names of the units to load; None for all of the stage's.

        Raises:
          RunError: Weights or statistics of a unit are missing or have other names.
        """
        for unit in self.stage.unit_names if units is None else units:  # few are there twice
            for what, held, source in (
                ("weights", self.params, params),
                ("batch statistics", self.state, state),
            ):
                given = dict(source.get(unit, {}))
                if unit in held and held is self.params:
                    own = self.stage.personal[unit] - given.keys()
                    given |= {path: held[unit][path] for path in own}
                if unit in held and given.keys() != held[unit].keys():
                    raise RunError(
                        f"unit {unit!r} has {what} {sorted(given)}, expected "
                        f"{sorted(held[unit])}: do both hosts use the same model and version?"
                    )
                # One by one, so that few are there twice, in a dictionary of its own, since that of
                # before may be kept. Copies compile nothing.
                held[unit] = fresh = dict(held.get(unit, {}))
                for path, array in given.items():
                    fresh[path] = jax.device_put(array, may_alias=False)

    @property
    def shared(self) -> Variables:
        """The weights that are averaged: all but the personal ones."""
        personal = self.stage.personal
        return {
            unit: {path: array for path, array in arrays.items() if path not in personal[unit]}
            for unit, arrays in self.params.items()
        }

    @property
    def single(self) -> bool:
        """Whether a step has one micro-batch: its gradient is written, and nothing is read."""
        return self._single

    def expect(self, *, single: bool) -> None:
        """Prepares for steps of one micro-batch or of several, between two steps."""
        if single != self._single:
            self._single = single
            self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the gradient of a mini-batch among them."""
        held = self.params, self.state, self.opt_state, self.params
        nbytes: int = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
        return nbytes + self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of what it keeps of an earlier moment, at most."""
        tree: list[Any] = []
        if Keep.OPTIMIZER in self._keeps:
            tree.append(self.opt_state)
        tree += [self.params, self.state, self.opt_state] * self._keeps.wholes
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    def begin_round(self, step: int, *, course: int | None = None, anew: bool = True) -> None:
        """Notes what a round begins with.

        Args:
          step: Its first step.
          course: Steps of the run before the round, by which schedules go on even if the replica
            has missed some; None: as the optimiser state has counted them.
          anew: Whether it is the round's start, and not that of the rest after a rewind.
        """
        self.step, self._settled = step, dict(self.state)
        if anew:
            self._kept.clear()  # nobody goes back to the round before
        if course is not None and (anew or self._renewed):
            self.opt_state = optimizer.at_step(self.opt_state, course)
        self._renewed = False
        if anew and Keep.OPTIMIZER in self._keeps:
            self._start, self._held = dict(self.opt_state), True

    def end_round(self) -> None:
        """Keeps nothing any more of the round that is over."""
        self._kept.clear()
        self._start = None
        self._held = False

    def undo_round(self) -> None:
        """Goes back to the optimiser state of the round's start, or without it begins a fresh one.

        Weights and statistics stay as they are: the round's average replaces them.
        """
        if self._start is None:
            self.renew()
            return
        self.opt_state, self._held = dict(self._start), True
        self.clear()

    def renew(self) -> None:
        """Begins with a fresh optimiser state."""
        self._renewed = True
        init = self._compiled.transformation.init
        self.opt_state = {unit: init(arrays) for unit, arrays in self.params.items()}
        self.clear()

    def begin_turn(self) -> None:
        """Keeps itself as it is now, for ``undo_turn``."""
        self._kept.clear()
        self._kept.append((dict(self.params), dict(self.state), dict(self.opt_state)))
        self._held = True

    def undo_turn(self) -> None:
        """Goes back to what it was at ``begin_turn``."""
        self._return_to(self._kept[-1])
        self._held = True

    @property
    def least_step(self) -> int:
        """The earliest step to which it can go back, with Keep.STEP."""
        return self.step - len(self._kept)

    def rewind(self, step: int) -> None:
        """Goes back to the end of the step before one, with Keep.STEP.

        Args:
          step: The step, from ``least_step`` on.

        Raises:
          RunError: It has not come to this step, or keeps nothing of it any more.
        """
        if not self.least_step <= step <= self.step:
            raise RunError(
                f"a stage that comes to step {self.step} cannot go back to step {step}: it keeps "
                f"what it was from step {self.least_step} on"
            )
        if step == self.step:
            self.state = dict(self._settled)
            self.clear()
            return
        while self.step > step:
            before = self._kept.pop()
            self.step -= 1
        self._return_to(before)

    def _return_to(self, before: tuple[Variables, Variables, OptState]) -> None:
        params, state, opt_state = before
        self.params, self.state, self.opt_state = dict(params), dict(state), dict(opt_state)
        self._settled = state
        self.clear()

    def renew_anchor(self) -> None:
        """Sets the optimiser's anchor to the current weights at the start of a round (FedProx)."""
        self.opt_state = optimizer.anchor(self.opt_state, self.params)

    def forward(
        self, x: jax.Array, draw: MicroBatchContext, sides: Arrays
    ) -> tuple[jax.Array, PyTree]:
        """Returns the activation [micro-batch, …] and the residuals of a micro-batch."""
        y, residuals, self.state = self.stage.forward(self.params, self.state, x, draw, sides)
        return y, residuals

    def backward(self, residuals: PyTree, cotangent: jax.Array) -> jax.Array:
        """Accumulates a micro-batch's gradient and returns the input's cotangent.

        For the first stage the result has no meaning except that it is ready when the gradient is.
        """
        given, self.accumulated = self.stage.backward(
            self.params, residuals, cotangent, self.accumulated, fresh=self.fresh
        )
        self.fresh = False
        return given

    def loss(
        self,
        x: jax.Array,
        targets: Targets,
        draw: MicroBatchContext,
        sides: Arrays,
        counted: int | None = None,
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """Runs the last stage on a micro-batch: metrics, and the input's cotangent if any.

        Args:
          x: Input [micro-batch, …].
          targets: What the task compares outputs with.
          draw: Scalars of the micro-batch.
          sides: Side inputs by name.
          counted: How many samples, the first ones, count; None for all. Fewer need ``counts``.
        """
        metrics, cotangent, self.accumulated, self.state = self.stage.loss(
            self.params, self.state, x, targets, draw, self.accumulated, sides,
            fresh=self.fresh, counted=self.count(len(x) if counted is None else counted),
        )  # fmt: skip
        self.fresh = False
        return metrics, cotangent

    def count(self, samples: int) -> np.uint32 | None:
        """Returns what its loss is told of a number of samples that count."""
        return np.uint32(samples) if self.counts else None

    def update(self, scale: float = 1.0, noise: Noise | None = None) -> jax.Array:
        """Takes one optimiser step; returns an array that is ready when the step is.

        Args:
          scale: Factor of the gradient.
          noise: Noise that is added to the gradient before it is scaled.
        """
        gradient = self.accumulated
        if gradient is None or self.fresh:  # no micro-batch of the step was left
            gradient = self.stage.zeros(self.params)
        if noise is not None:
            gradient = add_noise(gradient, *noise)
        if scale != 1.0:
            gradient = _scaled(gradient, scale)
        update, before = self._compiled.update, (self.params, self.opt_state)
        if self._each_step:
            update = self._compiled.keeping_all
            self._kept.append((self.params, self._settled, self.opt_state))
            self._settled = dict(self.state)
        elif self._held:
            update = self._keeping
        self.params, self.opt_state = update(*before, gradient)
        self.accumulated, self.fresh = None if self._single else gradient, True
        if self._held:
            self._held = False
            # What the step has left as it was is no array of its own, and the next gives it away.
            self.params, self.opt_state = jax.tree.map(
                _apart, (self.params, self.opt_state), before
            )
        leaves: list[jax.Array] = jax.tree.leaves(self.params)
        return leaves[0] if leaves else jnp.zeros(())  # a stage may have no trainable weights

    @property
    def weights(self) -> int:
        """Number of trained weights."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def clear(self) -> None:
        """Resets the gradient of the mini-batch."""
        self.fresh = True
        if self._single:
            self.accumulated = None
        elif self.accumulated is None:
            self.accumulated = self.stage.zeros(self.params)

    def zero_gradient(self) -> None:
        """Makes the gradient of the mini-batch zero, as if micro-batches had given it."""
        self.accumulated, self.fresh = self.stage.zeros(self.params), False

    def lower_updates(self) -> list[Any]:
        """Returns the optimiser's steps, lowered: compiling them needs no copies of the arrays."""
        updates: list[Any] = []
        if not self._each_step:
            updates.append(self._compiled.update)
        if self._keeps:
            updates.append(self._keeping)
        gradient = self.params if self.accumulated is None else self.accumulated
        shapes = [abstract(tree) for tree in (self.params, self.opt_state, gradient)]
        lowered = [update.lower(*shapes) for update in updates]
        if self.stage.release is not None:
            bits = np.empty(bits_shape(self.weights), np.uint32)
            lowered.append(add_noise.lower(shapes[2], bits, np.float32(1.0)))
        return lowered


def abstract(tree: PyTree) -> PyTree:
    """Returns a tree of arrays as a tree of ``jax.ShapeDtypeStruct``; nothing is traced."""

    def shape_of(leaf: jax.Array) -> PyTree:
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            leaf.shape, leaf.dtype, weak_type=leaf.weak_type
        )

    return jax.tree.map(shape_of, tree)


def _apart(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns an array that is another one than it was."""
    return jax.device_put(new, may_alias=False) if new is old else new


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(gradient: Variables, scale: float) -> Variables:
    """Returns a gradient multiplied by a number."""
    scaled: Variables = jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), gradient)
    return scaled
