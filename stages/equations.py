"""Traced functions, evaluated equation by equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from jax.extend import core as jex_core

from stages.trees import Atom, Equation, Jaxpr, PyTree

_CALLS = ("jit", "pjit", "closed_call", "core_call")

#: Another way to compute an equation's result from its operands; None to leave it as it is.
Substitute: TypeAlias = Callable[[Equation], Callable[..., PyTree] | None]


def evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[PyTree],
    arguments: Sequence[PyTree],
    substitute: Substitute = lambda _: None,
) -> list[PyTree]:
    """Evaluates a jaxpr equation by equation, and steps into calls.

    Functions with custom derivatives and loops are single equations.

    Args:
      jaxpr: The equations.
      consts: Values of its constants.
      arguments: Values of its arguments.
      substitute: Other ways to compute equations that have a single result.
    """
    values: dict[Atom, PyTree] = {}

    def read(atom: Atom) -> PyTree:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        taken = [read(atom) for atom in equation.invars]
        inner = called(equation)
        other = substitute(equation)
        if inner is not None:
            made = evaluate(inner.jaxpr, inner.consts, taken, substitute)
        elif other is not None:
            made = [other(*taken)]
        else:
            # A jaxpr of a single equation: binding a primitive differs between versions.
            single = jaxpr.replace(
                constvars=[], invars=_distinct(equation.invars), outvars=list(equation.outvars),
                eqns=[equation], effects=equation.effects,
            )  # fmt: skip
            known = dict(zip(map(id, equation.invars), taken, strict=True))
            function = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(single, []))
            made = function(*(known[id(atom)] for atom in single.invars))
        values.update(zip(equation.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def origin(jaxpr: Jaxpr, atom: Atom) -> Atom:
    """Returns the variable of which a variable is a copy that calls passed on; else itself."""
    for equation in jaxpr.eqns:
        if atom in equation.outvars and equation.primitive.name in (
            *_CALLS,
            "remat2",
            "checkpoint",
        ):
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            inner = getattr(inner, "jaxpr", inner)
            first = origin(inner, inner.outvars[equation.outvars.index(atom)])
            if first in inner.invars:
                return origin(jaxpr, equation.invars[inner.invars.index(first)])
    return atom


def called(equation: Equation) -> PyTree:
    """Returns the closed jaxpr that an equation calls, if it is only a call, else None."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return inner if isinstance(inner, jex_core.ClosedJaxpr) else None


def _distinct(atoms: Sequence[Atom]) -> list[Atom]:
    """Returns the variables among atoms, each once."""
    distinct = {id(atom): atom for atom in atoms if not isinstance(atom, jex_core.Literal)}
    return list(distinct.values())
