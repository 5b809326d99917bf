"""The user's own network, ``model.name=module:NAME:FUNCTION``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipar_jax.config import ModelConfig, plugins
from pipar_jax.errors import RunError

if TYPE_CHECKING:
    from stages import Model


def make_own(
    config: ModelConfig, input_shape: Sequence[int], classes: int, *, whole: bool
) -> Model:
    """Calls the user's function, and traces its result unless that is a model.

    The function is called with ``model.args`` and, where it has parameters of these names, with
    ``input_shape`` and ``classes``. It returns a ``stages.Model``, or what ``stages.trace`` takes:
    an NNX module or a function from ``nnx.Rngs`` to one, a Linen module, or a plain function and
    its parameters.

    Args:
      config: Name and arguments of the function.
      input_shape: Shape of a sample.
      classes: Number of classes.
      whole: Whether the network is not going to be cut.

    Raises:
      RunError: The function cannot be found, fails, or does not take these arguments.
      StageError: Its result cannot be traced or cut.
    """
    import jax  # here: launchers need the channel's settings, and no jax

    from stages import Model, trace

    value = config.name
    made = plugins.make(
        value, f"own network {value}", RunError, args=config.args, field="model.args",
        facts={"input_shape": tuple(input_shape), "classes": classes},
    )  # fmt: skip
    if isinstance(made, Model):
        return made
    params = None
    if isinstance(made, tuple) and len(made) == 2:
        made, params = made
    example = jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        (1, *input_shape), config.dtype
    )
    name = value.rpartition(":")[2]
    return trace(made, example, params=params, name=name, classes=classes, whole=whole)
