"""Names of the registered models, readable without loading jax."""

from __future__ import annotations

import difflib

from stages.errors import StageError

MODELS: tuple[str, ...] = (
    "mlp",
    "cnn",
    "vgg5",
    "vgg8",
    "vgg11",
    "vgg16",
    "vgg19",
    "resnet18",
    "resnet50",
    "resnet101",
    "mobilenetv3_small",
    "mobilenetv3_large",
    "vit_small",
    "decoder_small",
)
NORMS: tuple[str, ...] = ("batch", "group")
STEMS: tuple[str, ...] = ("cifar", "imagenet")


def check(kind: str, name: str, known: tuple[str, ...]) -> str:
    """Returns `name` if it is known.

    Args:
      kind: what is being named, for the message ("model", "norm", …).
      name: the name to look up.
      known: all legal names.

    Raises:
      StageError: the name is unknown; the message lists the nearest ones.
    """
    if name in known:
        return name
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
    raise StageError(f"unknown {kind} {name!r}: did you mean {' or '.join(map(repr, nearest))}?")
