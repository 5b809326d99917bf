"""Names of the registered models and tasks, readable without loading jax."""

from __future__ import annotations

import difflib

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
}
MODELS: tuple[str, ...] = tuple(UNITS)
TASKS: tuple[str, ...] = ("classification", "binary", "multilabel", "regression", "language")
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
