"""The user's own network, ``model.name=module:NAME:FUNCTION``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipar_jax.config import ModelConfig, plugins
from pipar_jax.errors import RunError
from stages.signature import Signature

if TYPE_CHECKING:
    from stages import Model


def make_own(config: ModelConfig, signature: Signature, *, whole: bool) -> Model:
    """Calls the user's function, and traces its result unless that is a model.

    The function is called with ``model.args`` and, where it has parameters of these names, with
    ``input_shape``, ``classes``, ``signature`` and ``dtype`` (``model.dtype``, in which the network
    is to compute; for bfloat16 the parameter is required). It returns a ``stages.Model``, or what
    ``stages.trace`` takes: an NNX module or a function from ``nnx.Rngs`` to one, a Linen module, or
    a plain function and its parameters. What it returns is called with the input first, and with
    side inputs by their names.

    Args:
      config: Name and arguments of the function.
      signature: Shapes and dtypes of a sample.
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
        facts={
            "input_shape": signature.input.shape,
            "classes": signature.classes,
            "signature": signature,
            "dtype": config.dtype,
        },
        required=("dtype",) if config.dtype == "bfloat16" else (),
    )  # fmt: skip
    if isinstance(made, Model):
        return made
    params = None
    if isinstance(made, tuple) and len(made) == 2:
        made, params = made
    types = {"": signature.input, **signature.sides}  # without a name: the first parameter
    batches = {
        name: jax.ShapeDtypeStruct((1, *one.shape), one.dtype)  # type: ignore[no-untyped-call]
        for name, one in types.items()
    }
    example = batches if signature.sides else batches[""]
    name = value.rpartition(":")[2]
    return trace(made, example, params=params, name=name, whole=whole)
