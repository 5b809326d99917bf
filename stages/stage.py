"""Stages: runs of consecutive units as compiled, pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from stages.errors import StageError
from stages.frozen import Frozen
from stages.micro_batch_context import MicroBatchContext, make_draw
from stages.model import Model
from stages.release import PrivateRelease
from stages.residuals import Residuals, attach, kept_inputs
from stages.stage_programs import NO_SIDE, Metrics, Programs, Side, build_programs
from stages.trees import Targets, Variables

_NO_RELEASES: Mapping[int, PrivateRelease] = {}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of consecutive units on one host.

    All functions take the variables of this stage's own units, {unit: {path: array}}, and compile
    once per batch shape. Nothing is computed twice: the backward pass starts from the residuals of
    the forward pass, unless ``rematerialise`` is set.

    Attributes:
      index: Position in the chain of stages.
      unit_names: The units in order.
      is_first: Whether the input of the stage are the samples, which need no cotangent.
      is_last: Whether the stage computes the loss.
      rematerialise: Whether the backward pass computes the forward pass again instead of
        keeping residuals (less memory, about a third more time).
      sides: Names of the side inputs of the stage's units.
      frozen: Weights that are not trained.
      personal: For each unit the paths of the weights that a device keeps for itself.
      programs: The compiled functions.
      release: What of it is clipped and noised before it leaves; None: nothing.
    """

    index: int
    unit_names: tuple[str, ...]
    is_first: bool
    is_last: bool
    rematerialise: bool
    sides: tuple[str, ...]
    frozen: Frozen = dataclasses.field(repr=False)
    personal: Mapping[str, frozenset[str]] = dataclasses.field(hash=False)
    programs: Programs = dataclasses.field(repr=False)
    release: PrivateRelease | None = None

    def forward(
        self,
        params: Variables,
        state: Variables,
        x: jax.Array,
        draw: MicroBatchContext,
        side: Side = NO_SIDE,
    ) -> tuple[jax.Array, Residuals, Variables]:
        """Runs the units forward in training mode.

        Args:
          params: Parameters of the stage's units.
          state: Batch statistics of the stage's units.
          x: Input [micro-batch, …]. It is kept by reference where the backward pass needs it.
          draw: Scalars of the micro-batch.
          side: Side inputs by name, those of ``sides`` at least.

        Returns:
          The activation [micro-batch, …], the residuals (no weights among them) and the new
          batch statistics.
        """
        side = self._taken(side)
        y, state_after, residuals = self.programs.forward(params, state, x, draw, side, self.fixed)
        if residuals is None:
            return y, kept_inputs(state, x, draw._replace(noise=None), side), state_after
        if self.is_first:
            return y, attach(residuals, y, (state, x, draw, side), None), state_after
        return y, attach(residuals, y, (state, draw, side), x), state_after

    def backward(
        self,
        params: Variables,
        residuals: Residuals,
        cotangent: jax.Array,
        accumulated: Variables | None,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, Variables]:
        """Runs the units backward.

        Args:
          params: The parameters that the forward pass had.
          residuals: What the forward pass kept.
          cotangent: Gradient of the loss in the activation, same shape and dtype.
          accumulated: Gradients accumulated so far, donated; None where there are none yet, which
            is another program: for steps of one micro-batch.
          fresh: Whether ``accumulated`` is of another mini-batch, and is replaced.

        Returns:
          The input's cotangent [micro-batch, …] (for the first stage a scalar without meaning,
          ready when the gradients are) and the accumulated gradients.
        """
        result: tuple[jax.Array, Variables] = self.programs.backward(
            params, residuals, cotangent, accumulated, np.bool_(fresh), self.fixed
        )
        return result

    def loss(
        self,
        params: Variables,
        state: Variables,
        x: jax.Array,
        targets: Targets,
        draw: MicroBatchContext,
        accumulated: Variables | None,
        side: Side = NO_SIDE,
        *,
        fresh: bool = False,
        counted: np.uint32 | None = None,
    ) -> tuple[Metrics, jax.Array | None, Variables, Variables]:
        """Runs the last stage forward, the loss of the model's task, and backward, in one call.

        Args:
          params: Parameters of the stage's units.
          state: Batch statistics of the stage's units.
          x: Input [micro-batch, …].
          targets: What the task compares outputs with, [micro-batch, …] each.
          draw: Scalars of the micro-batch; gradients are those of the mini-batch's mean loss.
          accumulated: Gradients accumulated so far, donated; None where there are none yet, which
            is another program: for steps of one micro-batch.
          side: Side inputs by name, those of ``sides`` at least.
          fresh: Whether ``accumulated`` is of another mini-batch, and is replaced.
          counted: How many samples, the first ones, count; None for all, which is another program.

        Returns:
          Metrics ("loss": the sum of the samples' losses, a float scalar; and for each metric of
          the task [2], the sums of its numerators and denominators), the input's cotangent
          (None where the stage is also the first), the accumulated gradients, the new batch
          statistics.
        """
        taken, new = self._taken(side), np.bool_(fresh)
        result: tuple[Metrics, jax.Array | None, Variables, Variables] = self.programs.loss(
            params, state, x, targets, draw, accumulated, new, taken, self.fixed,
            *(() if counted is None else (counted,)),
        )  # fmt: skip
        return result

    def predict(
        self, params: Variables, state: Variables, x: jax.Array, side: Side = NO_SIDE
    ) -> jax.Array:
        """Runs the units at inference: running statistics, no dropout."""
        y: jax.Array = self.programs.predict(params, state, x, self._taken(side), self.fixed)
        return y

    def zeros(self, params: Variables) -> Variables:
        """Returns a new accumulator of gradients, all zero; nothing has to be compiled for it."""
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        accumulated: Variables = jax.device_put(zeros, may_alias=False)
        return accumulated

    def forward_shapes(
        self,
        params: Any,
        state: Any,
        x: Any,
        draw: MicroBatchContext,
        side: Mapping[str, Any] = NO_SIDE,
    ) -> tuple[Any, Residuals]:
        """Returns the shapes of the activation and of the residuals, without computing.

        Args:
          params: Abstract parameters of the stage's units.
          state: Their abstract batch statistics.
          x: Abstract input.
          draw: Scalars of the micro-batch.
          side: Abstract side inputs.
        """
        fixed = self.frozen.shapes(self.unit_names)
        forward = self.programs.forward
        y, _, residuals = jax.eval_shape(forward, params, state, x, draw, side, fixed)
        if residuals is None:
            return y, kept_inputs(state, x, draw._replace(noise=None), side)
        if self.is_first:
            return y, attach(residuals, y, (state, x, draw, side), None)
        return y, attach(residuals, y, (state, draw, side), x)

    def side_shapes(self, model: Model, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the stage's abstract side inputs of a batch by name."""
        shapes = model.side_shapes(batch)
        return {name: shapes[name] for name in self.sides}

    def trial_draw(self, samples: int) -> MicroBatchContext:
        """Returns the scalars of a mini-batch of one micro-batch, to compile or time the stage by.

        A private stage gets bits that are all zero.
        """
        draw = make_draw(samples)
        if self.release is None or not self.release.sends:
            return draw
        return draw._replace(noise=np.zeros(self.release.bits_shape(samples), np.uint32))

    @property
    def fixed(self) -> Variables:
        """The frozen weights of the stage's units; drawn when they are first asked for."""
        return self.frozen.of(self.unit_names)

    def _taken(self, side: Side) -> dict[str, jax.Array]:
        """Returns the side inputs of the stage's units.

        Raises:
          StageError: A side input is missing.
        """
        missing = [name for name in self.sides if name not in side]
        if missing:
            raise StageError(
                f"stage {self.index}: side inputs {missing} are missing; got {sorted(side)}"
            )
        return {name: side[name] for name in self.sides}


def split(
    model: Model,
    cuts: Sequence[int] = (),
    *,
    rematerialise: bool | Sequence[bool] = False,
    releases: Mapping[int, PrivateRelease] = _NO_RELEASES,
) -> tuple[Stage, ...]:
    """Cuts a model into stages.

    Args:
      model: The model.
      cuts: Positions between units, strictly increasing; a cut c lies between units[c - 1]
        and units[c].
      rematerialise: Whether backward passes recompute their forward pass; one value for all stages
        or one per stage.
      releases: For each private stage what of it is clipped and noised before it leaves.

    Returns:
      len(cuts) + 1 stages. Stages over the same units of the same model share their
      compiled functions.

    Raises:
      StageError: A cut is out of range or out of order.
    """
    cuts = tuple(cuts)
    count = len(model.units)
    if any(not 0 < cut < count for cut in cuts) or list(cuts) != sorted(set(cuts)):
        raise StageError(
            f"model {model.name!r}: cuts {list(cuts)} are not valid; cuts are strictly increasing "
            f"positions between its units, from 1 to {count - 1}"
        )
    bounds = (0, *cuts, count)
    flags = [rematerialise] * (len(cuts) + 1) if isinstance(rematerialise, bool) else rematerialise
    if len(flags) != len(cuts) + 1:
        raise StageError(
            f"model {model.name!r}: {len(flags)} values of rematerialise for {len(cuts) + 1} "
            "stages; give one, or one per stage"
        )
    return tuple(
        Stage(
            index=index,
            unit_names=model.unit_names[start:stop],
            is_first=start == 0,
            is_last=stop == count,
            rematerialise=flags[index],
            sides=tuple(sorted({s for unit in model.units[start:stop] for s in unit.sides})),
            frozen=model.frozen,
            personal={unit.name: unit.personal for unit in model.units[start:stop]},
            programs=build_programs(model, start, stop, flags[index], releases.get(index)),
            release=releases.get(index),
        )
        for index, (start, stop) in enumerate(pairwise(bounds))
    )


def join(parts: Sequence[Variables]) -> Variables:
    """Inverse of cutting variables: merges the stages' {unit: …} in order of the stages.

    Raises:
      StageError: Two parts hold the same unit.
    """
    whole: Variables = {}
    for part in parts:
        shared = sorted(whole.keys() & part.keys())
        if shared:
            raise StageError(f"units {shared} are in more than one part; join disjoint stages")
        whole.update(part)
    return whole


def select(stage: Stage, variables: Variables) -> Variables:
    """Selects the variables of one stage's units from those of a whole model.

    Raises:
      StageError: A unit of the stage is missing.
    """
    missing = [name for name in stage.unit_names if name not in variables]
    if missing:
        raise StageError(f"stage {stage.index}: units {missing} are missing; got {list(variables)}")
    return {name: variables[name] for name in stage.unit_names}


def predict(
    model: Model, params: Variables, state: Variables, x: jax.Array, side: Side = NO_SIDE
) -> jax.Array:
    """Returns the whole model's outputs [batch, …] at inference."""
    (stage,) = split(model)
    return stage.predict(params, state, x, side)
