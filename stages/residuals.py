"""Forward passes that keep residuals but no weights.

``jax.vjp`` inside a jit returns a closure whose arrays are the residuals of the forward pass. By
default they include every weight, and each weight would be copied out of the jit for every
micro-batch, as would the input. Therefore the forward pass is first traced to a jaxpr, and each
residual gets the cheapest source:

* it depends only on weights (a weight, its cast, its transpose): recomputed in the backward pass
  from the live weights;
* it is an argument of the forward pass, or its output: held by reference;
* otherwise: an output of the forward pass.

Only the jaxpr and the closure's leaves are used, so that this does not depend on the internal
structure of the closure in a version of jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from jax.extend import core as jex_core

from stages.trees import Atom, Jaxpr, PyTree

Source = Literal["weights", "argument", "output", "saved"]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """The recipe for the closure of a backward pass; static, compared by identity.

    Attributes:
      closure: Tree structure of the ``jax.vjp`` closure.
      sources: Source of each leaf of the closure, and the index in it.
      arguments: Positions, among the flat non-weight arguments, of those held by reference.
      weights_only: Computes the leaves that depend only on weights, from the flat weights.
    """

    closure: PyTree
    sources: tuple[tuple[Source, int], ...]
    arguments: tuple[int, ...]
    weights_only: Callable[..., list[jax.Array]]

    @property
    def keeps_output(self) -> bool:
        """Whether the stage's output is itself a residual."""
        return any(source == "output" for source, _ in self.sources)


@dataclasses.dataclass(frozen=True)
class KeptInputs:
    """The recipe of residuals that are the inputs of the forward pass, which is computed again.

    Attributes:
      tree: Structure of the inputs.
    """

    tree: PyTree


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Residuals:
    """The residuals of a forward pass; a pytree without weights.

    Attributes:
      saved: Arrays that the forward pass computed only for the backward pass.
      borrowed: Arguments of the forward pass, by reference.
      output: The stage's output by reference, or None.
      recipe: The recipe for the closure.
    """

    saved: tuple[jax.Array, ...]
    borrowed: tuple[jax.Array, ...]
    output: PyTree
    recipe: Recipe | KeptInputs

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], Recipe | KeptInputs]:
        """Splits into arrays and the static recipe."""
        return (self.saved, self.borrowed, self.output), self.recipe

    @classmethod
    def tree_unflatten(cls, recipe: Recipe | KeptInputs, children: tuple[PyTree, ...]) -> Residuals:
        """Inverse of ``tree_flatten``."""
        saved, borrowed, output = children
        return cls(saved, borrowed, output, recipe)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, including those held by reference."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def kept_inputs(*inputs: PyTree) -> Residuals:
    """Returns residuals that hold the inputs of a forward pass by reference."""
    leaves, tree = jax.tree.flatten(inputs)
    return Residuals((), tuple(leaves), None, KeptInputs(tree))


def run_forward(
    function: Callable[..., tuple[jax.Array, PyTree]],
    weights: PyTree,
    fixed: PyTree,
    rest: PyTree,
    x: PyTree,
) -> tuple[jax.Array, PyTree, Residuals]:
    """Runs a forward pass inside a jit and returns its residuals.

    Args:
      function: (weights, fixed, rest, x) -> (output, auxiliary); differentiated in weights, and in
        x unless x is None.
      weights: Pytree of parameters.
      fixed: Pytree of parameters that are not differentiated.
      rest: Pytree of arguments that are not differentiated, x among them where the input
        needs no gradient.
      x: The input that is differentiated, or None.

    Returns:
      Output, auxiliary and the residuals, whose references ``attach`` fills in outside the jit.
    """
    box: list[Jaxpr] = []

    def run(weights: PyTree, fixed: PyTree, rest: PyTree, x: PyTree) -> PyTree:
        output, pullback, auxiliary = jax.vjp(
            lambda weights, x: function(weights, fixed, rest, x), weights, x, has_aux=True
        )
        leaves, closure = jax.tree.flatten(pullback)
        box.append(closure)
        return output, auxiliary, leaves

    closed, shapes = jax.make_jaxpr(run, return_shape=True)(weights, fixed, rest, x)
    jaxpr, count = closed.jaxpr, len(jax.tree.leaves((weights, fixed)))
    auxiliary_tree: jax.tree_util.PyTreeDef = jax.tree.structure(shapes[1])
    first = 1 + auxiliary_tree.num_leaves
    outvars = list(jaxpr.outvars)
    sources, saved, recomputed, arguments = _sources(jaxpr, count, outvars[first:], outvars[0])
    recipe = Recipe(
        box[0], tuple(sources), tuple(arguments), _weights_only(closed, count, recomputed)
    )
    values = jex_core.jaxpr_as_fun(closed)(*jax.tree.leaves((weights, fixed, rest, x)))
    auxiliary = jax.tree.unflatten(auxiliary_tree, values[1:first])
    kept = tuple(values[first + i] for i in saved)
    return values[0], auxiliary, Residuals(kept, (), None, recipe)


def attach(residuals: Residuals, output: PyTree, rest: PyTree, x: PyTree) -> Residuals:
    """Adds the references to residuals that came out of a jit (see ``run_forward``)."""
    recipe = residuals.recipe
    assert isinstance(recipe, Recipe)
    if recipe.arguments:
        flat = jax.tree.leaves((rest, x))
        residuals.borrowed = tuple(flat[i] for i in recipe.arguments)
    if recipe.keeps_output:
        residuals.output = output
    return residuals


def pull_back(
    residuals: Residuals, weights: PyTree, fixed: PyTree, cotangent: jax.Array
) -> tuple[PyTree, PyTree]:
    """Runs the backward pass inside a jit: (gradient of the weights, cotangent of the input)."""
    recipe = residuals.recipe
    assert isinstance(recipe, Recipe)
    pools: dict[str, Sequence[jax.Array]] = {
        "weights": recipe.weights_only(*jax.tree.leaves((weights, fixed))),
        "argument": residuals.borrowed,
        "output": (residuals.output,),
        "saved": residuals.saved,
    }
    leaves = [pools[source][index] for source, index in recipe.sources]
    gradient, x_cotangent = jax.tree.unflatten(recipe.closure, leaves)(cotangent)
    return gradient, x_cotangent


def _sources(
    jaxpr: Jaxpr, count: int, leaves: list[jax.Array], output: PyTree
) -> tuple[list[tuple[Source, int]], list[int], list[Atom], list[int]]:
    """Finds the cheapest source of each residual; see the module's docstring."""
    arguments_of = {var: i for i, var in enumerate(jaxpr.invars[count:])}
    varying = set(arguments_of)
    for equation in jaxpr.eqns:
        if equation.effects or any(
            not isinstance(v, jex_core.Literal) and v in varying for v in equation.invars
        ):
            varying.update(equation.outvars)
    sources: list[tuple[Source, int]] = []
    saved: list[int] = []
    recomputed: list[Atom] = []
    arguments: list[int] = []
    seen: dict[Atom, tuple[Source, int]] = {}
    for index, var in enumerate(leaves):
        literal = isinstance(var, jex_core.Literal)
        if not literal and var in seen:
            sources.append(seen[var])
            continue
        source: tuple[Source, int]
        if literal or var not in varying:
            source = ("weights", len(recomputed))
            recomputed.append(var)
        elif var in arguments_of:
            source = ("argument", len(arguments))
            arguments.append(arguments_of[var])
        elif var is output:
            source = ("output", 0)
        else:
            source = ("saved", len(saved))
            saved.append(index)
        if not literal:
            seen[var] = source
        sources.append(source)
    return sources, saved, recomputed, arguments


def _weights_only(closed: Jaxpr, count: int, outvars: list[Atom]) -> Callable[..., list[jax.Array]]:
    """Returns a function from flat weights to the residuals that depend only on them."""
    jaxpr = closed.jaxpr
    needed = {var for var in outvars if not isinstance(var, jex_core.Literal)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            equations.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, jex_core.Literal))
    equations.reverse()

    part = jaxpr.replace(invars=jaxpr.invars[:count], outvars=outvars, eqns=equations)
    compute: Callable[..., list[jax.Array]] = jex_core.jaxpr_as_fun(
        jex_core.ClosedJaxpr(part, closed.consts)
    )
    return compute
