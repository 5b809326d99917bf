"""Checks of ``data.pad_to`` against the data, the task and privacy."""

from __future__ import annotations

from itertools import pairwise

from pipar_jax.config import Config
from pipar_jax.config.plugins import read_args
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data.published import PUBLIC_SOURCES
from pipar_jax.errors import ConfigError

#: Each length is compiled for; more of them are a mistake, and so are longer ones.
MOST_LENGTHS, LONGEST = 32, 10_000_000


def check_padding(config: Config, *, reads_data: bool = True) -> None:
    """Checks the lengths to which mini-batches are padded.

    Args:
      config: A configuration that fits otherwise.
      reads_data: Whether hosts read ``data.source``, and are not passed their data by a program.

    Raises:
      ConfigError: They are not valid, or do not fit the data, the task or a private run.
    """
    data = config.data
    if not data.pad_to:
        return
    field = f"data.pad_to={data.pad_to[:120]!r}"
    try:
        lengths = whole_numbers(data.pad_to)
    except ValueError:
        lengths = ()
    rising = all(a < b for a, b in pairwise(lengths))
    if not lengths or lengths[0] < 1 or not rising or len(lengths) > MOST_LENGTHS:
        raise ConfigError(
            f"{field} is not valid: write up to {MOST_LENGTHS} rising lengths such as 32,64,128"
        )
    if lengths[-1] > LONGEST:
        raise ConfigError(f"{field}: lengths are at most {LONGEST:,}: lower the last one")
    if reads_data and data.source in PUBLIC_SOURCES:
        raise ConfigError(
            f"{field} is for sequences of your own; samples of data.source={data.source!r} are "
            "equally long: leave it empty"
        )
    if data.augment == "crop_flip":
        raise ConfigError(
            f"{field} is for sequences, and data.augment=crop_flip for images: set "
            "data.augment=none, or name a function of your own"
        )
    if len(lengths) == 1:
        return
    if config.privacy.on:
        raise ConfigError(
            f"{field} cannot be combined with privacy: the length of a mini-batch tells of its "
            "samples, and no noise hides it; name one length"
        )
    arguments = read_args(config.task.args) if config.task.name == "language" else {}
    if arguments.get("weighting") == "token" and not arguments.get("positions"):
        raise ConfigError(
            f"{field} cannot be combined with task.args={config.task.args[:120]!r}: it divides by "
            "the padded length, which varies, so that the same token would count differently; add "
            f"positions={lengths[-1]}, or use weighting=sequence"
        )
