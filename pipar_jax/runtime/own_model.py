"""The user's own network, ``model.name=module:NAME:FUNCTION``."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipar_jax.config import Config, plugins
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import RunError

if TYPE_CHECKING:
    from stages import Model

#: Prefix of the name of a user's own network.
OWN = "module:"


def read_args(text: str) -> JsonObject:
    """Reads ``model.args``: "width=16 norm=group" gives {"width": 16, "norm": "group"}.

    Args:
      text: Pairs NAME=VALUE, separated by blanks; a value that is not valid JSON is a string.
    """
    found: JsonObject = {}
    for pair in shlex.split(text):
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def make_own(config: Config, input_shape: Sequence[int], classes: int) -> Model:
    """Calls the user's function, and traces its result unless that is a model.

    The function is called with ``model.args`` and, where it has parameters of these names, with
    ``input_shape`` and ``classes``. It returns a ``stages.Model``, or what ``stages.trace`` takes:
    an NNX module or a function from ``nnx.Rngs`` to one, a Linen module, or a plain function and
    its parameters.

    Args:
      config: The configuration.
      input_shape: Shape of a sample.
      classes: Number of classes.

    Raises:
      RunError: The function cannot be found, fails, or does not take these arguments.
      StageError: Its result cannot be traced or cut.
    """
    import jax  # here: launchers need the channel's settings, and no jax

    from stages import Model, trace

    path = config.model.name.removeprefix(OWN)
    what = f"own network {config.model.name}"
    function = plugins.find(path, what, RunError)
    known = inspect.signature(function).parameters
    facts = {"input_shape": tuple(input_shape), "classes": classes}
    given = {name: one for name, one in facts.items() if name in known}
    given |= read_args(config.model.args)
    takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
    unknown = sorted(given.keys() - known.keys())
    if unknown and not takes_any:
        raise RunError(
            f"model.args={config.model.args!r}: {what} has no parameter {unknown[0]!r} "
            f"(known: {', '.join(known) or 'none'})"
        )
    made = function(**given)
    if isinstance(made, Model):
        return made
    params = None
    if isinstance(made, tuple) and len(made) == 2:
        made, params = made
    example = jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        (1, *input_shape), config.model.dtype
    )
    name = path.partition(":")[2]
    whole = config.method == "fl"
    return trace(made, example, params=params, name=name, classes=classes, whole=whole)
