"""Names of the registered models and tasks, readable without loading jax."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from stages.errors import StageError


def _numbered(**kinds: int) -> tuple[str, ...]:
    """Returns names in order: conv=2, fc=1 gives conv1, conv2, fc1."""
    return tuple(f"{kind}{i}" for kind, count in kinds.items() for i in range(1, count + 1))


def _framed(first: str, blocks: int, *last: str) -> tuple[str, ...]:
    """Returns the names of a first unit, numbered blocks and the last units."""
    return (first, *_numbered(block=blocks), *last)


#: The units of each registered model, in order, with which a launcher checks cuts without jax.
UNITS: dict[str, tuple[str, ...]] = {
    "mlp": _numbered(fc=4),
    "cnn": _numbered(conv=3, fc=2),
    "vgg5": _numbered(conv=3, fc=2),
    "vgg8": _numbered(conv=5, fc=3),
    "vgg11": _numbered(conv=8, fc=3),
    "vgg16": _numbered(conv=13, fc=3),
    "vgg19": _numbered(conv=16, fc=3),
    "resnet18": _framed("stem", 8, "head"),
    "resnet50": _framed("stem", 16, "head"),
    "resnet101": _framed("stem", 33, "head"),
    "mobilenetv3_small": _framed("stem", 11, "tail", "head"),
    "mobilenetv3_large": _framed("stem", 15, "tail", "head"),
    "vit_small": _framed("embed", 6, "head"),
    "decoder_small": _framed("embed", 4, "head"),
    "gpt2": _framed("embed", 12, "head"),
}
MODELS: tuple[str, ...] = tuple(UNITS)
TASKS: tuple[str, ...] = ("classification", "binary", "multilabel", "regression", "language")
#: Arguments of the networks that have some, with their defaults: those of GPT-2 small.
ARGUMENTS: dict[str, dict[str, int]] = {
    "gpt2": {"width": 768, "heads": 12, "depth": 12, "positions": 1024}
}
#: Networks whose samples are rows of tokens.
TOKEN_MODELS: tuple[str, ...] = ("decoder_small", "gpt2")
NORMS: tuple[str, ...] = ("batch", "group")
STEMS: tuple[str, ...] = ("cifar", "imagenet")


def check(kind: str, name: str, known: tuple[str, ...]) -> str:
    """Returns ``name`` if it is known.

    Args:
      kind: The kind of name, for the message ("model", "norm", …).
      name: The name to look up.
      known: All valid names.

    Raises:
      StageError: The name is unknown; the message lists the nearest ones.
    """
    if name in known:
        return name
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
    raise StageError(f"unknown {kind} {name!r}: did you mean {' or '.join(map(repr, nearest))}?")


def arguments_of(name: str, given: Mapping[str, object]) -> dict[str, int]:
    """Returns the arguments of a registered model, with defaults for those that are not given.

    Args:
      name: The model.
      given: Arguments by name.

    Raises:
      StageError: An argument is unknown or not valid.
    """
    known = ARGUMENTS.get(name, {})
    made = dict(known)
    for key, value in given.items():
        if key not in known:
            names = ", ".join(known) or "none"
            raise StageError(f"model {name!r} has no argument {key!r} (known: {names})")
        if type(value) is not int or not 1 <= value <= 10**6:
            raise StageError(f"model {name!r}: {key}={value!r} is not a number of at least 1")
        made[key] = value
    if made.get("width", 0) % made.get("heads", 1):
        raise StageError(
            f"model {name!r}: width={made['width']} is not divisible by heads={made['heads']}"
        )
    return made


def units_of(name: str, given: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the names of a registered model's units, in order.

    Args:
      name: The model.
      given: Its arguments by name.

    Raises:
      StageError: An argument is unknown or not valid.
    """
    arguments = arguments_of(name, given)
    return _framed("embed", arguments["depth"], "head") if name == "gpt2" else UNITS[name]
